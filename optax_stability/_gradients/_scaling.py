"""Scales the gradients of chosen leaves by constant factors.

*Problem*: in early training the embedding's gradient is often ten times larger than
any other, and spikes start there.

*Where in the chain*: before clipping. *Cost*: one multiplication, fused into what
follows; no state.

*Source*: Zeng et al., "GLM-130B: An Open Bilingual Pre-trained Model", 2022,
arXiv:2210.02414, §3.3 (embedding gradient shrink, α = 0.1).
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _numerics, _tree, _validate


def _factor_of_each(names: list[str], factors: Mapping[str, float]) -> list[float]:
    """The factor of the first pattern found in each name, 1 where none is."""

    def factor(name):
        return next((by for key, by in factors.items() if re.search(key, name)), 1.0)

    for pattern in factors:
        if names and not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"factors has {pattern!r}, which no leaf name contains; the leaves are "
                f"{', '.join(names)}."
            )
    return [factor(name) for name in names]


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"factors has {pattern!r}, which is no regular expression ({error}); "
            "write special characters with a backslash."
        ) from error


def scale_gradients(
    factors: Mapping[str, float],
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradients of leaves whose names match.

    **Rule**: g ← factor·g for the first pattern that is found in the leaf's name, as
    :func:`leaf_names` gives it; other leaves pass bit for bit.

    **Guarantees**: a factor of 0 gives zeros whatever the gradient, NaN included.

    **Edge cases**: Adam without ε does not see a constant factor: its update is the
    same whatever α is. What the factor then changes is the *global norm* that a clip
    looks at, and with it when and how much is clipped. With SGD, or where ε counts, it
    is a learning rate of the leaf. Non-finite gradients pass.

    Args:
      factors: regular expression (searched in the leaf name) to factor ≥ 0. For
        GLM-130B's embedding gradient shrink ``{"embed": 0.1}``.

    Returns:
      A transformation without state.

    Raises:
      ValueError: a factor is negative, a pattern no regular expression; at ``init``
        and ``update``, a pattern matches no leaf.
      TypeError: ``factors`` is not a mapping.

    Example:
      >>> import jax.numpy as jnp
      >>> grads = {"embed": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = scale_gradients({"embed": 0.5})
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["embed"], updates["head"])
      [0.5 0.5] [1. 1.]

    References:
      GLM-130B, arXiv:2210.02414, §3.3. There it is written as
      ``e·α + stop_gradient(e)·(1 − α)`` in the model; on the gradient it is this.
    """
    if not isinstance(factors, Mapping):
        raise TypeError(
            f"factors must map patterns to numbers, got {factors!r}; give "
            "{'embed': 0.1}."
        )
    for pattern, by in factors.items():
        _check_pattern(pattern)
        _validate.check_interval(
            f"factors[{pattern!r}]", by, "[0, inf)", "0.1 is GLM-130B's"
        )

    def init_fn(params: Any) -> optax.EmptyState:
        _factor_of_each(_tree.leaf_names(params), factors)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        by_leaf = _factor_of_each(_tree.leaf_names(updates), factors)

        def scaled(leaf, factor):
            if factor == 1.0:
                return leaf
            return _numerics.scale(leaf, factor) if factor else jnp.zeros_like(leaf)

        scaled_leaves = map(scaled, leaves, by_leaf)
        return jax.tree.unflatten(treedef, list(scaled_leaves)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
