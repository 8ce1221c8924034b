"""Numbers of leaves that are measured in batches, and programs of many leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_stability as ost
from optax_stability._core._leafwise import leafwise, leafwise_sums


def sums(x, y):
    return jnp.sum(x, axis=1), jnp.sum(x * y, axis=1)


def test_numbers_come_back_in_the_order_of_the_leaves():
    """Batches are leaves 0 and 3, leaf 1 with its two layers, and leaf 2."""
    x = [np.full(2, 1.0), np.array([[2.0] * 3, [3.0] * 3]), np.full(3, 4.0)]
    x = [*x, np.full(2, 5.0)]
    total, squares = leafwise(
        sums, x, x, outputs=2, layered=(False, True, False, False)
    )
    np.testing.assert_array_equal(total, [2, 6, 9, 12, 10])
    np.testing.assert_array_equal(squares, [2, 12, 27, 48, 50])


@pytest.mark.parametrize("platform", ["cpu", "tpu", "default"])
@pytest.mark.parametrize("batches_on_cpu", [False, True])
def test_sums_are_those_of_every_part_on_every_platform(
    monkeypatch, platform, batches_on_cpu
):
    """Of large and small leaves, of layers, and of leaves without rows."""

    def take(*args, **forms):
        return forms[platform](*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", take)
    shapes = [(70, 80), (), (5,), (3, 40, 50), (5,), (4, 2000), (6, 2), (9000,)]
    layered = [False, False, False, True, False, True, True, False]
    rng = np.random.default_rng(0)
    a, b = ([rng.integers(0, 9, shape).astype("f4") for shape in shapes] for _ in "ab")
    found = leafwise_sums(
        lambda x, y: (x * y, x - y),
        list(map(jnp.asarray, a)),
        list(map(jnp.asarray, b)),
        outputs=2,
        layered=tuple(layered),
        batches_on_cpu=batches_on_cpu,
    )
    for sums, term in zip(found, (np.multiply, np.subtract), strict=True):
        expected = [
            np.atleast_1d(term(x, y).sum(axis=tuple(range(int(split), x.ndim))))
            for x, y, split in zip(a, b, layered, strict=True)
        ]
        # Sums of small integers are exact in any order.
        np.testing.assert_array_equal(
            sums, np.concatenate(list(map(np.atleast_1d, expected)))
        )


def lines_per_leaf(tx):
    """How many lines one leaf more of a known shape adds to the program of a step."""

    def lines(count):
        params = {f"leaf {i:02}": jnp.ones((3, 4)) for i in range(count)}
        tx_with_loss = optax.with_extra_args_support(tx)
        step = jax.jit(lambda g, s, p: tx_with_loss.update(g, s, p, value=1.0))
        return step.lower(params, tx.init(params), params).as_text().count("\n")

    return (lines(20) - lines(10)) / 10


def test_a_leaf_more_of_a_known_shape_adds_half_of_what_it_does_in_optax():
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    ours = ost.spike_guard(optax.chain(ost.clip_by_zscore(), ost.safe_adamw(1e-3)))
    assert lines_per_leaf(ours) < 0.6 * lines_per_leaf(plain)
