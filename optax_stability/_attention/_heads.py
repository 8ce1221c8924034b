"""Where the attention heads of a model are, as a function of the user says.

*Problem*: one model has a kernel for queries, keys and values together, another three,
a third shares keys between heads. No rule finds them by their names.

*Cost*: none but slices and reshapes, which XLA fuses.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from optax_stability._attention._bound import attention_logit_bound
from optax_stability._core import _tree


class AttentionHeads(NamedTuple):
    """Queries and keys of one layer, and the norm before them.

    All have one more axis in front if they are those of stacked layers.

    Attributes:
      query: [width, heads, head_dim] – weights of the queries.
      key: [width, heads, head_dim], or fewer heads – weights of the keys.
      scale: [width] – scale of the norm, or None for 1.
      bias: [width] – bias of the norm, or None for 0.
      query_bias: [heads, head_dim] – bias of the queries, or None for 0.
      key_bias: [heads, head_dim] – bias of the keys, or None for 0.
    """

    query: jax.Array
    key: jax.Array
    scale: jax.Array | None = None
    bias: jax.Array | None = None
    query_bias: jax.Array | None = None
    key_bias: jax.Array | None = None


# From parameters, or any tree like them, to the heads of each layer, by its name.
HeadsOf = Callable[[Any], Mapping[str, AttentionHeads]]


def check_heads_of(heads_of: Any) -> None:
    """Raises TypeError unless ``heads_of`` can be called."""
    if not callable(heads_of):
        raise TypeError(
            f"heads_of={heads_of!r} must be a function from the parameters to a dict "
            "of AttentionHeads, one for each layer."
        )


def find_heads(heads_of: HeadsOf, params: Any) -> dict[str, AttentionHeads]:
    """What the function of the user returns, checked, in the order of the names."""
    found = heads_of(_tree.pure(params))
    valid = isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(heads, AttentionHeads)
        for name, heads in found.items()
    )
    if not valid:
        raise TypeError(
            "heads_of must return a dict from names to AttentionHeads, got "
            f"{type(found).__name__}: {found!r:.200}."
        )
    return dict(sorted(found.items()))


def bounds(heads: dict[str, AttentionHeads], rotary: bool) -> dict[str, jax.Array]:
    """The bound of each head, [heads], or [layers, heads] of stacked layers."""

    @jax.jit  # One trace for all layers of a shape.
    def bound(each: AttentionHeads) -> jax.Array:
        return attention_logit_bound(**each._asdict(), rotary=rotary)

    return {
        name: jax.vmap(bound)(each) if each.query.ndim == 4 else bound(each)
        for name, each in heads.items()
    }
