"""How large an attention logit can be, from the weights and the norm before them.

*Problem*: attention saturates when its logits grow. The loss then gets stuck, with
neither a spike nor a NaN, and no gradient norm says why. The logits themselves are deep
inside the model, mostly in a fused kernel that never writes them out.

*Where*: on parameters; :func:`record_logit_bound` does so every few steps.

*Cost*: two products of the weights with themselves, 4·width·head_dim² FLOPs a head, and
six products of matrices of size head_dim × head_dim. No state.

*Source*: ours. The trace of a power bounds the largest eigenvalue of a positive
semidefinite matrix: Horn & Johnson, "Matrix Analysis", 2013, §5.6.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from optax_stability._core import _numerics, _parts, _validate

# Powers 2⁶ = 64: the bound is then at most head_dim^(1/128) too large.
_SQUARINGS = 6
# What rounding may take from the eigenvalue of a product of Gram matrices, as a share
# of the product of their norms. Choice: 32 units in the last place.
_ROUNDING = 32 * 2.0**-24


def _contract(equation: str, other, weight) -> jax.Array:
    """An einsum in float32 with a projection W[w, h, d]; the result is gathered.

    On an Explicit mesh the heads stay where they are until the result is small.
    """
    result = equation.partition("->")[2]
    _, of_heads, _ = specs = jax.typeof(weight).sharding.spec
    kept = PartitionSpec(*[of_heads if axis == "h" else None for axis in result])
    found = jnp.einsum(
        equation,
        other,
        weight,
        precision=lax.Precision.HIGHEST,
        out_sharding=kept if any(specs) else None,
    )
    return _parts.replicated(found)


def _largest_eigenvalue(matrix):
    """An upper bound on the largest eigenvalue of [..., d, d], tr(Pᵏ)^(1/k), k = 64.

    All eigenvalues of the matrix must be real and ≥ 0. With traces t₀ of P, and tᵢ of
    the square of the last matrix divided by its trace, it is t₀·√(t₁·√(t₂·√…)).
    """
    traces = []
    for squaring in range(_SQUARINGS + 1):
        if squaring:
            matrix = jnp.matmul(matrix, matrix, precision=lax.Precision.HIGHEST)
        # Rounding may make a trace of 0 negative.
        trace = jnp.maximum(jnp.trace(matrix, axis1=-2, axis2=-1), 0.0)
        matrix = matrix / jnp.where(trace > 0, trace, 1.0)[..., None, None]
        traces.append(trace)
    bound = jnp.ones_like(traces[0])
    for trace in reversed(traces[1:]):
        bound = _numerics.root(trace * bound)
    return traces[0] * bound


def _grams(weight):
    """(m, G) of a projection W[width, heads, d], with G = (W/m)ᵀ(W/m) for each head.

    m is the largest absolute entry of the head, so that no square overflows.
    """
    largest = jnp.max(jnp.abs(weight), axis=(0, 2), initial=0.0)
    largest = _parts.replicated(largest)
    unit = weight / jnp.where(largest > 0, largest, 1.0)[None, :, None]
    return largest, _contract("whd,whe->hde", unit, unit)


def _frobenius(matrix):
    return _numerics.root(jnp.sum(jnp.square(matrix), axis=(-2, -1)))


def _quadratic(vector, gram):
    """√(vᵀGv), the length of the image of v."""
    image = jnp.sum(gram * vector[..., None, :], axis=-1)
    return _numerics.root(jnp.maximum(jnp.sum(vector * image, axis=-1), 0.0))


def _length(vector):
    return _numerics.root(jnp.sum(jnp.square(vector), axis=-1))


def _check(query, key, scale, bias, query_bias, key_bias) -> None:
    """Raises ValueError for shapes that do not belong together."""
    for name, x in (("query", query), ("key", key)):
        if x.ndim != 3:
            raise ValueError(
                f"{name} has the shape {x.shape}, but must be [width, heads, "
                f"head_dim]; reshape the kernel, or use jax.vmap for stacked layers."
            )
    if (query.shape[0], query.shape[2]) != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"query has the shape {query.shape} and key {key.shape}; width and "
            "head_dim must be the same."
        )
    if query.shape[1] % max(key.shape[1], 1):
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}; the heads of "
            "key must divide those of query."
        )
    wanted = {
        "scale": (scale, query.shape[:1]),
        "bias": (bias, query.shape[:1]),
        "query_bias": (query_bias, query.shape[1:]),
        "key_bias": (key_bias, key.shape[1:]),
    }
    for name, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has the shape {x.shape}, but must be {shape}.")


def _moduli_if_complex(*arrays) -> list:
    """The arrays; if one of them is complex, the moduli of all, which bound the same.

    |q·k| ≤ Σ|qᵢ||kᵢ|, and |qᵢ| is at most the sum of the moduli of its terms.
    """
    given = [x for x in arrays if x is not None]
    if not any(_numerics.is_complex(x) for x in given):
        return list(arrays)
    return [None if x is None else jnp.abs(x) for x in arrays]


def attention_logit_bound(
    query: jax.Array,
    key: jax.Array,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    query_bias: jax.Array | None = None,
    key_bias: jax.Array | None = None,
    rotary: bool = False,
) -> jax.Array:
    """Bounds the attention logits of each head, from the weights alone.

    For attention whose input was normalised, by a layer norm or an RMS norm, and whose
    logits are q·k/√head_dim. No input can give a larger logit.

    **Rule**, for one head with the projections Q and K, both [width, head_dim], whose
    rows are multiplied by ``scale``, and with the offsets a = ``bias``·Q +
    ``query_bias`` and b = ``bias``·K + ``key_bias``. A normalised input x has
    ‖x‖ ≤ √width, so::

      bound·√head_dim = width·σ(Q Kᵀ) + √width·(‖K a‖ + ‖Q b‖) + |a·b|
      with rotary     = (√width·σ(Q) + ‖a‖)·(√width·σ(K) + ‖b‖)

    σ is an upper bound on the largest singular value: tr((QᵀQ·KᵀK)ᵏ)^(1/2k) with
    k = 64, from six squarings of a matrix of size head_dim × head_dim. It is at most
    head_dim^(1/128) too large, 3.3 % for 64. Power iteration would need a state, and
    approaches σ from *below*: what it gives is no bound.

    **Guarantees**

    * Never below the largest logit, up to rounding in float32, which is relative: what
      rounding takes where queries and keys are nearly orthogonal is added.
    * Without ``bias``, ``query_bias`` and ``key_bias``, some inputs on the sphere
      ‖x‖ = √width reach it, up to the 3.3 %. Inputs that occur are far below it.
    * Weights of a head up to 1e18 do not overflow inside.

    **Edge cases**

    * With rotary embeddings, also partial ones, the matrix between query and key
      depends on their distance: the product of both norms holds for all distances, and
      is looser.
    * A weight that is not finite gives NaN for its heads. Heads of zeros give 0.
    * If a weight is complex, all count by their moduli: the bound holds, and is looser.
    * Queries and keys that are normalised themselves (qk-layernorm) need no bound.
    * Activations in bfloat16 are rounded, and may exceed it by a percent.
    * If the model divides its logits by anything else than √head_dim, multiply.
    * Sharded weights: the products sum over their shards, which sends 2·head_dim²
      numbers a head. Under ``shard_map`` a device has only a part: not there.

    Args:
      query: weights of the queries, [width, heads, head_dim].
      key: weights of the keys, [width, heads, head_dim], or fewer heads, which groups
        of successive query heads share.
      scale: scale of the norm, [width]; 1 by default.
      bias: bias of the norm, [width]; 0 by default.
      query_bias: bias of the queries, [heads, head_dim]; 0 by default.
      key_bias: bias of the keys, like the heads of ``key``; 0 by default.
      rotary: whether queries and keys are rotated by their position.

    Returns:
      float32[heads], a bound on |logit| of each query head.

    Raises:
      TypeError: ``rotary`` is not True or False.
      ValueError: shapes do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> eye = jnp.eye(4)[:, None, :]  # one head, q = k = x, and ‖x‖² = 4
      >>> bound = attention_logit_bound(eye, eye, scale=jnp.array([3.0, 0, 0, 0]))
      >>> print(bound.round(3))
      [18.]
    """
    _validate.check_flags(rotary=rotary)
    _check(query, key, scale, bias, query_bias, key_bias)
    query, key, scale, bias, query_bias, key_bias = _moduli_if_complex(
        query, key, scale, bias, query_bias, key_bias
    )
    width, heads, head_dim = query.shape
    shared = heads // key.shape[1]

    def project(weight, offset):
        """Norms, Gram matrices and offsets of the heads of a projection."""
        # A NumPy array would be scaled in place, while the product below reads it.
        weight = jnp.asarray(weight, jnp.float32)
        added = jnp.zeros(weight.shape[1:], jnp.float32)
        if bias is not None:
            added = _contract("w,whd->hd", jnp.asarray(bias, jnp.float32), weight)
        if offset is not None:
            added += _parts.replicated(jnp.asarray(offset, jnp.float32))
        if scale is not None:
            weight *= jnp.asarray(scale, jnp.float32)[:, None, None]
        return *_grams(weight), added

    q_size, q_gram, a = project(query, query_bias)
    k_size, k_gram, b = (jnp.repeat(x, shared, axis=0) for x in project(key, key_bias))
    radius = width**0.5
    if rotary:
        q_norm = q_size * _numerics.root(_largest_eigenvalue(q_gram))
        k_norm = k_size * _numerics.root(_largest_eigenvalue(k_gram))
        bound = (radius * q_norm + _length(a)) * (radius * k_norm + _length(b))
    else:
        product = jnp.matmul(q_gram, k_gram, precision=lax.Precision.HIGHEST)
        # Where queries and keys are nearly orthogonal, it is all that is left of both.
        lost = _ROUNDING * _frobenius(q_gram) * _frobenius(k_gram)
        sigma = q_size * k_size * _numerics.root(_largest_eigenvalue(product) + lost)
        linear = k_size * _quadratic(a, k_gram) + q_size * _quadratic(b, q_gram)
        bound = width * sigma + radius * linear + jnp.abs(jnp.sum(a * b, axis=-1))
    return bound / head_dim**0.5
