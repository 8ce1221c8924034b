"""Statistics of K microbatch gradients that their mean does not contain.

*Problem*: the mean does not show how much the K gradients differ, and the square of the
mean is not the mean of the squares. Deviation and mean square are sums that can be
updated together with the mean.

*Cost*: one reduction over each microbatch gradient (its distance from the mean, which
also shows whether it is finite) and one scalar per leaf; with the mean square one
buffer like the parameters.

*Source*: Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983,
eq. 2.1, with weights. No difference of large sums is formed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_stability._core import _mesh_axes, _norms, _numerics, _tree
from optax_stability._core._in_place import depends_on
from optax_stability._core._leafwise import leafwise_sums
from optax_stability._core._numerics import (
    by_component,
    promote,
    real_dtype,
    wide_dtype,
)
from optax_stability._core._platform import by_platform
from optax_stability._moments import _signs

# Weights are float32: the difference of two below this limit does not overflow.
_LARGEST_WEIGHT = _numerics.HUGE / 4


class Moments(NamedTuple):
    """Statistics of the K microbatch gradients mₖ, with weights nₖ, and mean ḡ.

    Computed by :func:`microbatch_gradients` and :func:`accumulate_moments`.
    ``scale_by_safe_adam(second_moment="microbatch")`` reads them from the extra
    argument ``moments=``. N = Σnₖ and ḡ = Σnₖ·mₖ/N, over the kept microbatches.

    Attributes:
      num_microbatches: int32[] – K, the number of kept microbatches.
      weight: float32[] – N, in the unit of the weights: examples or tokens.
      deviation: real[n_leaves] – Σ nₖ‖mₖ − ḡ‖² of each leaf; "real" is float64 if a
        leaf is float64 or complex128, else float32. It is ∞ where a distance is above
        1e19 (1e154 in float64); distances below 1e-19 (1e-154) are lost. It loses
        digits where one weight is more than 1e4 times the sum of the weights before it.
        It is −1 where it is unknown, see :func:`flax.per_example_gradients`.
      mean_square: tree like the gradients, but real – Σ nₖ·|mₖ|²/N of each entry, or
        None. It saturates at 3e38; entries below 1e-19 are lost (1e308 and 1e-154 in
        float64).
      norm: real[n_leaves] – ‖ḡ‖ of each leaf when ḡ was computed, under
        ``shard_map`` ‖ḡ‖ of the local shard. It shows by what factor a later clip
        scaled the leaf. None if unknown.
      leaves: leaf marks that name the entries of ``deviation`` and ``norm``, or None.
      l1: :class:`SignMoments`, for ``estimate_noise_scale(norm="l1")``, or None.
    """

    num_microbatches: jax.Array
    weight: jax.Array
    deviation: jax.Array
    mean_square: Any
    norm: Any = None
    leaves: Any = None
    l1: Any = None


class Aggregate(NamedTuple):
    """Several microbatches as one: mean gradient, mean loss and statistics.

    Attributes:
      mean: tree like the gradients – ḡ, in float32 at least unless created narrower;
        complex where the gradients are.
      value: real[] – mean of the losses, with the same weights.
      moments: statistics of the gradients in ``mean``.
    """

    mean: Any
    value: jax.Array
    moments: Moments


def widen(tree: Any) -> Any:
    """Casts leaves narrower than float32 to float32."""
    return jax.tree.map(_numerics.widen, tree)


def _stack(scalars: list) -> jax.Array:
    return jnp.stack(scalars) if scalars else jnp.zeros((0,), jnp.float32)


def _total(leaf, dtype=_numerics.FLOAT32):
    """The sum over a leaf, of a dtype."""
    return jnp.sum(leaf, dtype=dtype)


def _square(leaf):
    return _numerics.capped(_numerics.abs_sq(leaf))


def empty(
    like: Any, *, mean_square: bool, l1: bool = False, dtype: Any = None
) -> Aggregate:
    """The aggregate of no microbatches.

    ``dtype`` is the dtype of the mean, or None for that of each leaf, but at least
    float32. The mean of a complex leaf is complex.
    """

    def mean_dtype(leaf):
        if dtype is None:
            return wide_dtype(leaf)
        is_complex = _numerics.is_complex(leaf)
        return promote(dtype, jnp.complex64) if is_complex else dtype

    zeros = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf, dtype=mean_dtype(leaf)), like
    )
    squares = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf, dtype=real_dtype(leaf)), like
    )
    return Aggregate(
        mean=zeros,
        value=jnp.zeros((), real_dtype(like)),
        moments=Moments(
            num_microbatches=jnp.zeros((), jnp.int32),
            weight=jnp.zeros((), jnp.float32),
            deviation=jnp.zeros((len(jax.tree.leaves(like)),), real_dtype(like)),
            mean_square=squares if mean_square else None,
            leaves=_tree.mark_leaves(like),
            l1=_signs.no_signs(like) if l1 else None,
        ),
    )


@functools.partial(jax.jit, static_argnames="axis_name")
def all_finite(
    tree: Any,
    value: Any = 0.0,
    *,
    sq_distances: Any = None,
    axis_name: _mesh_axes.AxisName = None,
) -> jax.Array:
    """Whether the loss and all entries are finite and no leaf norm is too large.

    That is, above 8e37, or 4e307 where norms are float64.

    Uses sums, not maxima: on some backends, the maximum of a number and NaN over
    devices is the number.

    Args:
      tree: the gradients to check.
      value: the loss to check.
      sq_distances: float32[n_leaves] – :func:`squared_distances` of the tree from
        another tree, if known: if they are finite, so is the tree, and no other pass is
        needed.
      axis_name: under ``shard_map``, the mesh axes over which ``sq_distances`` was
        summed.
    """

    def by_norms(_):
        norms = _norms.leaf_norms(tree, axis_name)
        return jnp.all(norms <= _numerics.huge(norms.dtype) / 4)

    def unless_known(distances):
        known = jnp.all(jnp.isfinite(distances))
        return lax.cond(known, lambda: known, lambda: by_norms(None))

    dtype = real_dtype(tree)

    def by_squares(_):
        # XLA makes one reduction of these sums and the distances.
        (sums,) = leafwise_sums(
            lambda leaf: (_coarse_square(leaf, dtype),),
            jax.tree.leaves(tree),
            outputs=1,
        )
        return _mesh_axes.everywhere(jnp.all(sums <= _numerics.huge(dtype)), axis_name)

    on_cpu = by_norms if sq_distances is None else unless_known
    finite = by_platform(sq_distances, cpu=on_cpu, accelerator=by_squares)
    return finite & jnp.isfinite(value)


def _coarse_square(leaf, dtype) -> jax.Array:
    """|x|², scaled such that its sum overflows where the norm is too large."""
    half = jnp.finfo(dtype).maxexp // 2
    return _numerics.square_at(2.0 ** (2 - half), leaf, dtype)


def each_finite(
    trees: Any, values: Any, axis_name: _mesh_axes.AxisName = None
) -> jax.Array:
    """:func:`all_finite` for each of k trees that are stacked along axis 0, bool[k]."""
    finite = jnp.isfinite(values)
    for leaf in jax.tree.leaves(trees):
        dtype = real_dtype(leaf)
        axes = tuple(range(1, leaf.ndim))
        squares = jnp.sum(_coarse_square(leaf, dtype), axis=axes)
        finite &= squares <= _numerics.huge(dtype)
    return _mesh_axes.everywhere(finite, axis_name)


def usable_weight(weight) -> jax.Array:
    """Whether a weight is positive and finite, bool[]."""
    return (weight > 0) & (weight <= _LARGEST_WEIGHT)


def single(grads, value, weight, *, mean_square: bool, l1: bool = False) -> Aggregate:
    """The aggregate of one microbatch; weight 0 excludes the microbatch."""
    weight = jnp.asarray(weight, jnp.float32)
    return Aggregate(
        mean=grads,
        value=jnp.asarray(value, real_dtype(grads)),
        moments=Moments(
            num_microbatches=(weight > 0).astype(jnp.int32),
            weight=weight,
            deviation=jnp.zeros((len(jax.tree.leaves(grads)),), real_dtype(grads)),
            mean_square=jax.tree.map(_square, widen(grads)) if mean_square else None,
            leaves=_tree.mark_leaves(grads),
            l1=_signs.no_signs(grads) if l1 else None,
        ),
    )


def if_kept(given: Aggregate, keep) -> Aggregate:
    """The aggregate if ``keep`` holds, else the same buffers with weight 0."""
    moments = given.moments
    return given._replace(
        moments=moments._replace(
            num_microbatches=jnp.where(keep, moments.num_microbatches, 0),
            weight=jnp.where(keep, moments.weight, 0),
            deviation=jnp.where(keep, moments.deviation, 0),
            l1=jax.tree.map(lambda x: jnp.where(keep, x, 0), moments.l1),
        )
    )


@functools.partial(jax.jit, static_argnames="axis_name")
def squared_distances(
    a: Aggregate, mean: Any, axis_name: _mesh_axes.AxisName = None
) -> jax.Array:
    """‖mean − ḡ‖² of each leaf, real[n_leaves].

    Args:
      a: the aggregate with mean ḡ; if its weight is 0, ḡ is what its buffers hold.
      mean: another tree.
      axis_name: under ``shard_map``, the mesh axes that shard the means.
    """
    dtype = real_dtype(a.mean)

    def square(x, y):
        difference = y.astype(wide_dtype(x)) - x.astype(wide_dtype(x))
        return (_numerics.abs_sq(difference).astype(dtype),)

    olds, news = jax.tree.leaves(a.mean), jax.tree.leaves(mean)
    (squares,) = leafwise_sums(square, olds, news, outputs=1)
    return _mesh_axes.sum_shards(squares, news, axis_name)


@jax.jit
def _weighted_mean(x, y, distance=(), *, weights):
    """The mean of two means; one of weight 0 is ignored, whatever it holds.

    x is overwritten only after ``distance`` was computed from it.
    """
    before, added = weights
    counts = depends_on(added > 0, *distance)
    wide, real = wide_dtype(x), real_dtype(x)
    share = _numerics.ratio(added.astype(real), (before + added).astype(real))
    old = jnp.where(before > 0, x.astype(wide), 0)
    new = old + by_component(lambda part: share * part, y.astype(wide) - old)
    return jnp.where(counts, new, old).astype(x.dtype)


def merge(
    a: Aggregate,
    b: Aggregate,
    sq_distances: Any = None,
    axis_name: _mesh_axes.AxisName = None,
) -> Aggregate:
    """Merges two aggregates, with the dtypes of the first.

    An aggregate of weight 0 is ignored, whatever its arrays hold.

    Args:
      a: an aggregate, for example of the earlier microbatches.
      b: another aggregate, with sign moments if the first has them.
      sq_distances: the :func:`squared_distances` between both means, if known.
      axis_name: under ``shard_map``, the mesh axes that shard the means.
    """
    if sq_distances is None:
        sq_distances = squared_distances(a, b.mean, axis_name)
    l1, read = None, []
    if a.moments.l1 is not None:
        l1 = _signs.between(a, b, axis_name)
        read = [l1.deviation, l1.agreement]
        l1 = jax.tree.map(
            lambda x, y, z: (x + y + z).astype(x.dtype), a.moments.l1, b.moments.l1, l1
        )
    weight = a.moments.weight + b.moments.weight

    weighted_mean = functools.partial(
        _weighted_mean, weights=(a.moments.weight, b.moments.weight)
    )

    factor = b.moments.weight * _numerics.ratio(a.moments.weight, weight)
    factor = factor.astype(sq_distances.dtype)
    between = jnp.where(factor > 0, factor * sq_distances, 0.0)
    olds, treedef = jax.tree.flatten(a.mean)
    means = [
        weighted_mean(x, y, [each[i] for each in (sq_distances, *read)])
        for i, (x, y) in enumerate(zip(olds, jax.tree.leaves(b.mean), strict=True))
    ]
    return Aggregate(
        mean=jax.tree.unflatten(treedef, means),
        value=weighted_mean(a.value, b.value),
        moments=Moments(
            num_microbatches=a.moments.num_microbatches + b.moments.num_microbatches,
            weight=weight,
            deviation=(a.moments.deviation + b.moments.deviation + between).astype(
                a.moments.deviation.dtype
            ),
            mean_square=jax.tree.map(
                weighted_mean, a.moments.mean_square, b.moments.mean_square
            ),
            leaves=a.moments.leaves,
            l1=l1,
        ),
    )


def stacked(
    grads,
    values,
    weights,
    *,
    mean_square: bool,
    l1: bool = False,
    axis_name: _mesh_axes.AxisName = None,
) -> Aggregate:
    """The aggregate of microbatches that are stacked along axis 0 of every array.

    Microbatches of weight 0 are ignored, whatever their arrays hold. Under
    ``shard_map``, ``axis_name`` are the mesh axes that shard the gradients.
    """
    kept, weight = weights > 0, jnp.sum(weights)
    shares = _numerics.ratio(weights, weight)

    def broadcast(vector, leaf):
        return vector.reshape(-1, *[1] * (leaf.ndim - 1))

    def average(leaf):
        share = broadcast(shares, leaf).astype(real_dtype(leaf))
        parts = by_component(lambda part: share * part, leaf)
        return jnp.sum(jnp.where(broadcast(kept, leaf), parts, 0), axis=0)

    def deviation(leaf, mean):
        squares = _numerics.abs_sq(leaf - mean[None])
        squares = broadcast(weights, leaf).astype(squares.dtype) * squares
        return _total(jnp.where(broadcast(kept, leaf), squares, 0), dtype)

    grads, dtype = widen(grads), real_dtype(grads)
    mean = jax.tree.map(average, grads)
    squares = jax.tree.map(lambda leaf: average(_square(leaf)), grads)
    leaves = jax.tree.leaves(mean)
    deviations = _stack(jax.tree.leaves(jax.tree.map(deviation, grads, mean)))
    return Aggregate(
        mean=mean,
        value=average(values.astype(dtype)),
        moments=Moments(
            # In float32, so that one all-reduce carries it with the deviations.
            num_microbatches=_total(kept).astype(jnp.int32),
            weight=weight,
            deviation=_mesh_axes.sum_shards(deviations, leaves, axis_name),
            mean_square=squares if mean_square else None,
            leaves=_tree.mark_leaves(mean),
            l1=_signs.stacked_signs(grads, mean, weights, axis_name) if l1 else None,
        ),
    )


def check_moments(moments: Any) -> None:
    """Raises unless ``moments`` are the statistics of one gradient.

    Raises:
      TypeError: they are no :class:`Moments`.
      ValueError: they have a leading axis, as ``vmap`` and ``pmap`` return them.
    """
    if not isinstance(moments, Moments):
        raise TypeError(
            f"moments must be Moments, got a {type(moments).__name__}; pass the third "
            "output of microbatch_gradients, or put accumulate_moments around the "
            "chain."
        )
    if jnp.ndim(moments.weight) or jnp.ndim(moments.deviation) != 1:
        raise ValueError(
            f"moments.weight has the shape {jnp.shape(moments.weight)} in place of (): "
            "the moments of several steps or devices are stacked; call update inside "
            "the same vmap or pmap."
        )


def _same_tree(marks: Any, updates: Any) -> bool:
    return jax.tree.structure(marks) == jax.tree.structure(_tree.mark_leaves(updates))


def _visible_part(updates: Any, tree: Any) -> Any:
    """The tree with ``optax.MaskedNode`` wherever the updates have it."""

    def is_masked(node):
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(
        lambda update, part: update if is_masked(update) else part,
        updates,
        tree,
        is_leaf=is_masked,
    )


def visible(moments: Moments, updates: Any) -> Moments:
    """The moments of the leaves that are not masked in the gradients.

    ``optax.masked`` and ``optax.partition`` hide leaves of the gradients from the inner
    transformation, but pass extra arguments on unchanged.

    Args:
      moments: the moments of all leaves.
      updates: the gradients, with ``optax.MaskedNode`` in place of hidden leaves.

    Raises:
      TypeError: they are no :class:`Moments`.
      ValueError: the moments have another tree than the gradients, or are stacked.
    """
    check_moments(moments)
    if moments.leaves is None and moments.mean_square is None:
        return moments
    if moments.leaves is not None and _same_tree(moments.leaves, updates):
        return moments
    try:
        squares = moments.mean_square
        squares = None if squares is None else _visible_part(updates, squares)
        leaves = moments.leaves
        leaves = _tree.mark_leaves(moments.mean_square) if leaves is None else leaves
        marks = _visible_part(_tree.pure(updates), _tree.number_leaves(leaves))
    except ValueError as error:
        raise ValueError(
            "moments belong to another tree than the gradients; give the moments that "
            "microbatch_gradients or accumulate_moments computed with these "
            f"gradients. {error}"
        ) from error
    places = np.array(jax.tree.leaves(marks), np.int32)
    return moments._replace(
        mean_square=squares,
        deviation=moments.deviation[places],
        norm=None if moments.norm is None else moments.norm[places],
        leaves=_tree.mark_leaves(updates),
        l1=jax.tree.map(lambda x: x[places], moments.l1),
    )


def _scale_factors(
    moments: Moments, grads: Any, axis_name: _mesh_axes.AxisName = None
) -> jax.Array:
    """How much each leaf of ḡ was scaled after its computation, real[n_leaves]."""
    leaves = jax.tree.leaves(grads)
    if moments.norm is None:
        return jnp.ones((len(leaves),), real_dtype(grads))
    original_norms = _norms.join_shard_norms(moments.norm, leaves, axis_name)
    known = original_norms > 0
    factors = _norms.leaf_norms(grads, axis_name) / jnp.where(known, original_norms, 1)
    return jnp.where(known & jnp.isfinite(factors), factors, 1.0)


def rescaled(
    moments: Moments, grads: Any, axis_name: _mesh_axes.AxisName = None
) -> Moments:
    """Scales the moments as ḡ was scaled after its computation."""
    if moments.norm is None:
        return moments
    factors = _scale_factors(moments, grads, axis_name)
    squared_factors = jnp.square(factors)
    leaves, treedef = jax.tree.flatten(moments.mean_square)
    scaled = [
        _numerics.scale(leaf, squared_factors[i]) for i, leaf in enumerate(leaves)
    ]
    return moments._replace(
        deviation=moments.deviation * squared_factors,
        mean_square=jax.tree.unflatten(treedef, scaled),
        l1=jax.tree.map(lambda x: x * factors, moments.l1),
    )


def rms(moments: Moments, grads: Any) -> Any:
    """Root mean square of the microbatch gradients, entry by entry; real.

    If a leaf of ḡ was scaled since ḡ was computed, its root mean square is scaled by
    the same factor. The result is at least |ḡ|: exact squares satisfy this bound, and
    it replaces squares that underflowed.

    Args:
      moments: moments with a ``mean_square``.
      grads: the current ḡ, in float32 at least.
    """
    leaves, treedef = jax.tree.flatten(grads)
    factors = _scale_factors(moments, grads)

    def leaf_rms(square, g, i):
        dtype = _numerics.real_dtype((square, g, factors))
        root = _numerics.root(square).astype(dtype) * factors[i].astype(dtype)
        size = jnp.abs(g).astype(dtype)
        # Where a square or the sum of the squares is not finite, the result is |ḡ|.
        return jnp.maximum(jnp.where(_numerics.is_finite(root), root, 0), size)

    squares = jax.tree.leaves(moments.mean_square)
    return jax.tree.unflatten(
        treedef, map(leaf_rms, squares, leaves, range(len(leaves)))
    )
