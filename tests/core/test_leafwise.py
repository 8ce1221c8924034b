"""Numbers of leaves that are measured in batches."""

import jax.numpy as jnp
import numpy as np

from optax_stability._core._leafwise import leafwise


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
