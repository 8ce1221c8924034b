"""Where the attention heads are in a model with one kernel for query, key and value.

``record_logit_bound`` and ``clip_attention_logits`` take such a function. For a model
with separate kernels it is one ``reshape`` for each.
"""

from typing import Any

import jax

import optax_stability as ost


def fused_heads(params: Any, heads: int) -> dict[str, ost.AttentionHeads]:
    """Queries and keys of each block, and the layer norm before them.

    Args:
      params: the parameters of the GPT, or of a part of it; other names are left out.
      heads: attention heads per block.
    """
    leaves = dict(zip(ost.leaf_names(params), jax.tree.leaves(params), strict=True))

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], heads, 3, -1)

    found = {}
    for name in leaves:
        block, _, part = name.partition("/query_key_value/")
        if part == "kernel":
            kernel = split(leaves[name])
            bias = split(leaves[f"{block}/query_key_value/bias"])
            found[block] = ost.AttentionHeads(
                query=kernel[:, :, 0],
                key=kernel[:, :, 1],
                scale=leaves[f"{block}/attention_norm/scale"],
                bias=leaves[f"{block}/attention_norm/bias"],
                query_bias=bias[:, 0],
                key_bias=bias[:, 1],
            )
    return found
