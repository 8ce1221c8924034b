"""Scales the gradients of chosen leaves by constant factors.

*Problem*: in early training the embedding's gradient is often ten times larger than
any other, and spikes start there.

*Where in the chain*: before clipping. *Cost*: one multiplication, fused into
the next operation; no state.

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
from optax_stability._core._checked import checked


def _leaf_factors(names: list[str], factors: Mapping[str, float]) -> list[float]:
    """For each name, the factor of the first pattern found in it, or 1."""

    def factor_of(name):
        found = (x for pattern, x in factors.items() if re.search(pattern, name))
        return next(found, 1.0)

    for pattern in factors:
        if names and not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"factors has {pattern!r}, which matches no leaf name; the names are "
                f"{', '.join(names)}."
            )
    return [factor_of(name) for name in names]


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"factors has {pattern!r}, which is not a regular expression ({error}); "
            "write special characters with a backslash."
        ) from error


def scale_gradients(
    factors: Mapping[str, float],
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradients of leaves whose names match a pattern.

    **Rule**: g ← factor·g for the first pattern that is found in the leaf's name, as
    :func:`leaf_names` gives it; other leaves are unchanged, bit for bit.

    **Guarantees**: a factor of 0 gives zeros for every gradient, including NaN.

    **Edge cases**: the update of Adam without ε does not depend on a constant factor.
    The factor then changes only the *global norm* that a clip uses, and so when and how
    much is clipped. With SGD, or where ε matters, the factor acts as a learning rate of
    the leaf. Non-finite gradients pass through.

    Args:
      factors: maps regular expressions, searched in the leaf name, to factors ≥ 0.
        GLM-130B's embedding gradient shrink is ``{"embed": 0.1}``.

    Returns:
      A transformation without state.

    Raises:
      ValueError: a factor is negative, or a pattern is not a regular expression; at
        ``init`` and ``update``, a pattern matches no leaf.
      TypeError: ``factors`` is not a mapping.

    Example:
      >>> import jax.numpy as jnp
      >>> grads = {"embed": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = scale_gradients({"embed": 0.5})
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["embed"], updates["head"])
      [0.5 0.5] [1. 1.]

    References:
      GLM-130B, arXiv:2210.02414, §3.3. The paper writes
      ``e·α + stop_gradient(e)·(1 − α)`` in the model, with the same effect on the
      gradient.
    """
    if not isinstance(factors, Mapping):
        raise TypeError(
            f"factors must map patterns to numbers, got {factors!r}; give "
            "{'embed': 0.1}."
        )
    for pattern, factor in factors.items():
        _check_pattern(pattern)
        _validate.check_interval(
            f"factors[{pattern!r}]", factor, "[0, inf)", "GLM-130B uses 0.1"
        )

    def init_fn(params: Any) -> optax.EmptyState:
        _leaf_factors(_tree.leaf_names(params), factors)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        leaf_factors = _leaf_factors(_tree.leaf_names(updates), factors)

        def scaled(leaf, factor):
            if factor == 1.0:
                return leaf
            return _numerics.scale(leaf, factor) if factor else jnp.zeros_like(leaf)

        scaled_leaves = map(scaled, leaves, leaf_factors)
        return jax.tree.unflatten(treedef, list(scaled_leaves)), state

    return checked(
        "scale_gradients", optax.EmptyState, init_fn, update_fn, inexact=True
    )
