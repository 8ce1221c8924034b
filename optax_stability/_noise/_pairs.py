"""Estimates the noise from pairs of successive gradients.

*Cost*: one buffer like the gradient, and three reductions over it.

*Source*: Qiao et al., "Pollux", 2021, arXiv:2008.12260, as AdaptDL does with one
replica. Deviation: pairs do not overlap, so that they are independent.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core import _mesh_axes
from optax_stability._core._numerics import inner_product, is_complex
from optax_stability._noise._statistics import Observed


class Pairs(NamedTuple):
    """The stored gradient, to be paired with the next one.

    Attributes:
      previous: tree like the gradient, float32 or complex64; meaningless while
        ``weight`` is 0.
      weight: float32[] – its examples, or 0 if no gradient is stored.
    """

    previous: Any
    weight: jax.Array


def init_pairs(like: Any) -> Pairs:
    """The initial state: no gradient is stored."""

    def zeros(x):
        return jnp.zeros_like(x, dtype=jnp.complex64 if is_complex(x) else jnp.float32)

    return Pairs(previous=jax.tree.map(zeros, like), weight=jnp.zeros((), jnp.float32))


def _inner_products(a: Any, b: Any, axis_name: _mesh_axes.AxisName):
    """⟨a, b⟩ of each leaf, the real part of a complex one; float32[n_leaves]."""

    def product(x, y):
        return jnp.sum(inner_product(x, y))

    products = jax.tree.leaves(jax.tree.map(product, a, b))
    stacked = jnp.stack(products) if products else jnp.zeros((0,), jnp.float32)
    return _mesh_axes.sum_shards(stacked, jax.tree.leaves(a), axis_name)


def update_pairs(
    pairs: Pairs, grads: Any, weight, axis_name: _mesh_axes.AxisName
) -> tuple[Pairs, Observed]:
    """Pairs a gradient with the stored one, or stores it.

    For the gradient g of weight n and the stored gradient h of weight m::

      S = ‖g − h‖²·n·m/(n + m)    G² = ⟨g, h⟩

    Args:
      pairs: the stored gradient.
      grads: g.
      weight: float32[] – n. With 0, g is ignored and the stored gradient is cleared. If
        g is not finite, g is ignored and the stored gradient is kept.
      axis_name: under ``shard_map``, the mesh axes that shard the gradient.

    Returns:
      The new stored gradient, and S and G² of the pair: ∞, of weight 0, if there is no
      pair.
    """
    grads = jax.tree.map(lambda g, old: g.astype(old.dtype), grads, pairs.previous)
    finite = jnp.all(jnp.isfinite(_inner_products(grads, grads, axis_name)))
    complete = finite & (weight > 0) & (pairs.weight > 0)
    total = weight + pairs.weight
    differences = jax.tree.map(lambda g, old: g - old, grads, pairs.previous)
    squares = _inner_products(differences, differences, axis_name)
    factor = weight * pairs.weight / jnp.where(complete, total, 1.0)
    products = _inner_products(grads, pairs.previous, axis_name)
    observed = Observed(
        trace=jnp.where(complete, factor * squares, jnp.inf),
        grad_sq=jnp.where(complete, products, jnp.inf),
        weight=jnp.where(complete, total, 0.0),
        parts=jnp.float32(2),
    )
    store = finite & (weight > 0) & ~complete
    previous = jax.tree.map(
        lambda g, old: jnp.where(store, g, old), grads, pairs.previous
    )
    stored_weight = jnp.where(store, weight, jnp.where(finite, 0.0, pairs.weight))
    return Pairs(previous, jnp.where(weight > 0, stored_weight, 0.0)), observed
