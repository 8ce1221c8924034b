"""A step of the trainer that is run twice."""

import chex
import jax
import jax.numpy as jnp
import pytest
from verifying import verified

from optax_stability.faults import FaultInjector, parse_faults
from optax_stability.loop import FailedError


def test_a_verified_step_says_what_differed_and_repeats_it():
    state = {"layer": {"w": jnp.float32([1.0, 2.0])}, "n": jnp.int32(3)}
    leaves, structure = jax.tree.flatten(state)

    def step(leaves, batch):
        return [x + batch.astype(x.dtype) for x in leaves], {"loss": batch}

    faulty, said = FaultInjector(parse_faults(["flip@3"]), vocabulary=50), []
    for batch, texts in ((3, ["state/layer/w had other bits"]), (4, [])):
        run = verified(faulty.flipping(step, batch), structure, said.append)
        found, metrics = run(leaves, jnp.float32(2))
        chex.assert_trees_all_equal(found, step(leaves, jnp.float32(2))[0])
        assert metrics["verify/differs"] == len(texts)
        assert all(text in line for text, line in zip(texts, said, strict=True))
        said.clear()
    count = iter(range(99))

    def broken(leaves, batch):
        return [x + next(count) for x in leaves], {"loss": batch}

    with pytest.raises(FailedError, match="train on another device"):
        verified(broken, structure, said.append)(leaves, jnp.float32(2))
