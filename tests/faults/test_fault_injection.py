"""Faults that are injected on purpose: at their batches, and nowhere else."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_stability.faults import (
    Fault,
    FaultInjector,
    parse_faults,
    scale_by_surge,
    with_gradient_factor,
)

WINDOWS = np.arange(12, dtype=np.int32).reshape(3, 4)


def injector(*texts):
    return FaultInjector(parse_faults(texts), vocabulary=50)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("scale@3", Fault("scale", 3, 1, 1e4)),
        ("scale=1e6@300", Fault("scale", 300, 1, 1e6)),
        ("scale=-0.5@3x2", Fault("scale", 3, 2, -0.5)),
        ("surge@3", Fault("surge", 3, 1, 30.0)),
        ("surge=30@300x20", Fault("surge", 300, 20, 30.0)),
    ],
)
def test_a_fault_is_read(text, fault):
    assert parse_faults([text]) == (fault,)


def test_faults_without_a_size_are_read():
    nan, other = parse_faults(["nan@300", "bytes@300x5"])
    assert (nan.kind, nan.first, nan.length) == ("nan", 300, 1)
    assert math.isnan(nan.size)
    assert (other.kind, other.first, other.length) == ("bytes", 300, 5)


@pytest.mark.parametrize(
    "text",
    [
        "nan",
        "nan@",
        "nan@0",
        "nan@-1",
        "nan@1.5",
        "nan@3x",
        "nan@3x0",
        "nan@3,4",
        "xnan@3",
        "fire@3",
        "NAN@3",
        "scale=@3",
        "scale=nan@3",
    ],
)
def test_what_is_no_fault_is_an_error_with_the_remedy(text):
    with pytest.raises(ValueError, match="is not a fault; write KIND@BATCH, ") as error:
        parse_faults(["nan@1", text])
    assert str(error.value).startswith(f"{text} is not a fault")
    assert "nan, scale, bytes, surge, flip" in str(error.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("scale=1e@3", "scale=1e@3: 1e is not a number"),
        ("nan=3@3", "nan=3@3: nan has no size; leave the size out"),
        ("bytes=3@3", "bytes=3@3: bytes has no size; leave the size out"),
    ],
)
def test_a_size_that_cannot_be_is_an_error(text, match):
    with pytest.raises(ValueError, match=match):
        parse_faults([text])


def test_a_fault_hits_its_batches_alone():
    (fault,) = parse_faults(["scale@3x2"])
    assert [batch for batch in range(9) if fault.hits(batch)] == [3, 4]


def test_random_tokens_are_the_same_for_a_batch_whenever_it_comes():
    faulty = injector("bytes@2x2", "nan@5")
    first, second = (faulty.corrupt(WINDOWS, batch) for batch in (2, 3))
    assert first.shape == WINDOWS.shape
    assert first.dtype == WINDOWS.dtype
    assert first.min() >= 0
    assert first.max() < 50
    assert (first != second).any()
    # In another process, after other batches.
    again = injector("bytes@1x5").corrupt(np.zeros_like(WINDOWS), 2)
    np.testing.assert_array_equal(again, first)


def test_a_batch_without_a_fault_is_handed_on_as_it_is():
    faulty = injector("bytes@2x2", "nan@5")
    for batch in (1, 4, 5):
        assert faulty.corrupt(WINDOWS, batch) is WINDOWS


def test_factors_multiply_and_are_one_elsewhere():
    faulty = injector("scale=3@2x2", "scale=-2@3", "nan@9", "surge=5@3", "surge=2@3x9")
    expected = {1: (1, 1), 2: (3, 1), 3: (-6, 10), 4: (1, 2), 9: (math.nan, 2)}
    for batch, (gradient, surge) in expected.items():
        factors = faulty.factors(batch)
        np.testing.assert_array_equal(factors["gradient"], np.float32(gradient))
        np.testing.assert_array_equal(factors["surge"], np.float32(surge))
        # Or every fault would compile the step anew.
        assert {x.dtype for x in factors.values()} == {np.dtype(np.float32)}


def test_without_a_surge_updates_pass_bit_for_bit():
    # XLA would make 0 of the last one.
    updates = {"w": jnp.float32([1.1, -0.0, jnp.nan, jnp.inf, 1e-40])}
    tx = optax.chain(optax.identity(), scale_by_surge())
    found, _ = tx.update(updates, tx.init(updates), updates, value=1.0)
    assert np.asarray(found["w"]).tobytes() == np.asarray(updates["w"]).tobytes()


def test_a_surge_multiplies_updates_in_their_dtype():
    updates = {"w": jnp.float32([1.5, -2.0]), "b": jnp.bfloat16([0.5])}
    tx = scale_by_surge()
    found, _ = tx.update(updates, tx.init(updates), surge=np.float32(30))
    expected = {"w": jnp.float32([45.0, -60.0]), "b": jnp.bfloat16([15.0])}
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_dtypes(found, updates)


@pytest.mark.parametrize("factor", [1.0, -3.0, 1e4, math.nan])
def test_a_factor_is_on_the_gradient_and_not_on_the_loss(factor):
    def loss_fn(w, *, power):
        return jnp.sum(w**power)

    faulty = with_gradient_factor(loss_fn, jnp.float32(factor))
    w = jnp.float32([1.5, -2.0])
    loss, grads = jax.value_and_grad(faulty)(w, power=2)
    np.testing.assert_array_equal(grads, factor * 2 * w)
    if math.isfinite(factor):
        assert loss == loss_fn(w, power=2)


def test_a_flip_is_one_wrong_bit_when_the_step_is_first_run():
    def step(x):
        return [jnp.int32([7]), x, x], {"loss": x.sum()}

    x = jnp.float32([[1.0, 2.0]])
    faulty = injector("flip@3")
    for batch in (2, 4):
        leaves, _ = faulty.flipping(step, batch)(x)
        chex.assert_trees_all_equal(leaves, step(x)[0])
    flipping = faulty.flipping(step, 3)
    leaves, metrics = flipping(x)
    assert float(metrics["loss"]) == 3
    bits = [np.asarray(each).view(np.uint32) for each in (leaves[1], x)]
    np.testing.assert_array_equal(bits[0] ^ bits[1], [[1, 0]])
    chex.assert_trees_all_equal(leaves[2], x)
    chex.assert_trees_all_equal(flipping(x)[0], step(x)[0])
