"""What is worth knowing of K microbatch gradients once only their mean is left.

*Problem*: the mean hides how far the K gradients were apart, and the square of the mean
is not the mean of the squares. Both are sums that can be kept while the mean is formed.

*Cost*: one reduction over each microbatch gradient (how far it is from the mean, which
also tells whether it is finite) and one scalar per leaf; with the mean square one
buffer like the parameters.

*Source*: Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983,
eq. 2.1, with weights. No difference of large sums is formed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_stability._core import _mesh_axes, _norms, _numerics, _tree
from optax_stability._core._in_place import cond_is_cheap, depends_on

# Two numbers below it can be subtracted without overflow.
_LARGEST = _numerics.HUGE / 4


class Moments(NamedTuple):
    """Statistics of the K microbatch gradients mₖ, of weight nₖ, behind a mean ḡ.

    Made by :func:`microbatch_gradients` and :func:`accumulate_moments`; read, as the
    extra argument ``moments=``, by ``scale_by_safe_adam(second_moment="microbatch")``.
    N = Σnₖ and ḡ = Σnₖ·mₖ/N, over the microbatches that were kept.

    Attributes:
      num_microbatches: int32[] – K, how many were kept.
      weight: float32[] – N, in the unit of the weights: examples or tokens.
      deviation: float32[n_leaves] – Σ nₖ‖mₖ − ḡ‖² of each leaf. It is ∞ where a
        distance is above 1e19, loses distances below 1e-19, and digits where one weight
        is more than 1e4 times the sum of those before.
      mean_square: tree like the gradients – Σ nₖ·mₖ²/N of each entry, or None. It ends
        at 3e38, and loses entries below 1e-19.
      norm: float32[n_leaves] – ‖ḡ‖ of each leaf when it was made, under ``shard_map``
        of the local shard: what a later clip did to it can be told from that. None
        where it is not known.
      leaves: marks that name the entries of the vectors, or None.
    """

    num_microbatches: jax.Array
    weight: jax.Array
    deviation: jax.Array
    mean_square: Any
    norm: Any = None
    leaves: Any = None


class Aggregate(NamedTuple):
    """Some microbatches as one: what is averaged, and how it was spread.

    Attributes:
      mean: tree like the gradients – ḡ, at least float32 unless it was made narrower.
      value: float32[] – mean of their losses, with the same weights.
      moments: statistics of what went into ``mean``.
    """

    mean: Any
    value: jax.Array
    moments: Moments


def _wide(leaf) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def widen(tree: Any) -> Any:
    """The tree with float32 in place of narrower leaves."""
    return jax.tree.map(lambda leaf: leaf.astype(_wide(leaf)), tree)


def _stack(scalars: list) -> jax.Array:
    return jnp.stack(scalars) if scalars else jnp.zeros((0,), jnp.float32)


def _total(leaf):
    """The sum over a leaf, float32[]."""
    return jnp.sum(leaf, dtype=jnp.float32)


def _square(leaf):
    return jnp.minimum(jnp.square(leaf), _numerics.HUGE)


def empty(like: Any, *, mean_square: bool, dtype: Any = None) -> Aggregate:
    """The aggregate of no microbatch; ``dtype`` is that of the mean.

    Raises:
      TypeError: a leaf is complex.
    """
    for leaf in jax.tree.leaves(like):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"gradients of dtype {leaf.dtype} cannot be accumulated; wrap all in "
                "optax.contrib.split_real_and_imaginary."
            )
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf, dtype=dtype or _wide(leaf)), like
    )
    squares = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=_wide(leaf)), like)
    return Aggregate(
        mean=zeros,
        value=jnp.zeros((), jnp.float32),
        moments=Moments(
            num_microbatches=jnp.zeros((), jnp.int32),
            weight=jnp.zeros((), jnp.float32),
            deviation=jnp.zeros((len(jax.tree.leaves(like)),), jnp.float32),
            mean_square=squares if mean_square else None,
            leaves=_tree.mark_leaves(like),
        ),
    )


def all_finite(
    tree: Any,
    value: Any = 0.0,
    *,
    apart: Any = None,
    axis_name: _mesh_axes.AxisName = None,
) -> jax.Array:
    """Whether no entry is NaN or Inf, no leaf has a norm above 8e37, and so the loss.

    By sums: over devices, the maximum of numbers and NaN is a number on some backends.

    Args:
      tree: what may not be finite.
      value: a loss.
      apart: float32[n_leaves] – its :func:`distances` from something, if they are
        known: where they are finite so is the tree, and no other pass is needed.
      axis_name: under ``shard_map``, the mesh axes over which ``apart`` was summed.
    """

    def measured():
        return jnp.all(_norms.leaf_norms(tree, axis_name) <= _LARGEST)

    if apart is None:
        return measured() & jnp.isfinite(value)
    surely = jnp.all(jnp.isfinite(apart))
    if not cond_is_cheap():
        return (surely | measured()) & jnp.isfinite(value)
    return lax.cond(surely, lambda: surely, measured) & jnp.isfinite(value)


def each_finite(
    trees: Any, values: Any, axis_name: _mesh_axes.AxisName = None
) -> jax.Array:
    """:func:`all_finite` for each of k trees that are stacked along axis 0, bool[k].

    Not by ``vmap`` of it: the loop in the norms does not pass one over a mesh axis.
    """
    finite = jnp.isfinite(values)
    for leaf in jax.tree.leaves(trees):
        # Above _LARGEST a square at this scale overflows.
        squares = jnp.square(leaf.astype(jnp.float32) * 2.0**-62)
        finite &= jnp.sum(squares, axis=tuple(range(1, leaf.ndim))) <= _numerics.HUGE
    return _mesh_axes.everywhere(finite, axis_name)


def usable_weight(weight) -> jax.Array:
    """Whether a weight is a number above 0, bool[]."""
    return (weight > 0) & (weight <= _LARGEST)


def single(grads, value, weight, *, mean_square: bool) -> Aggregate:
    """One microbatch as an aggregate; of weight 0 if it does not count."""
    weight = jnp.asarray(weight, jnp.float32)
    return Aggregate(
        mean=grads,
        value=jnp.asarray(value, jnp.float32),
        moments=Moments(
            num_microbatches=(weight > 0).astype(jnp.int32),
            weight=weight,
            deviation=jnp.zeros((len(jax.tree.leaves(grads)),), jnp.float32),
            mean_square=jax.tree.map(_square, widen(grads)) if mean_square else None,
            leaves=_tree.mark_leaves(grads),
        ),
    )


def if_kept(given: Aggregate, keep) -> Aggregate:
    """The aggregate, or an empty one, its buffers untouched."""
    moments = given.moments
    return given._replace(
        moments=moments._replace(
            num_microbatches=jnp.where(keep, moments.num_microbatches, 0),
            weight=jnp.where(keep, moments.weight, 0),
            deviation=jnp.where(keep, moments.deviation, 0),
        )
    )


def distances(
    a: Aggregate, mean: Any, axis_name: _mesh_axes.AxisName = None
) -> jax.Array:
    """‖mean − ḡ‖² of each leaf, float32[n_leaves].

    Args:
      a: ḡ is its mean, or whatever is there if it is of no microbatch.
      mean: another tree.
      axis_name: under ``shard_map``, the mesh axes that shard the means.
    """

    def distance(x, y):
        return _total(jnp.square(y.astype(_wide(x)) - x.astype(_wide(x))))

    squares = _stack(jax.tree.leaves(jax.tree.map(distance, a.mean, mean)))
    return _mesh_axes.add_up(squares, jax.tree.leaves(mean), axis_name)


def merge(a: Aggregate, b: Aggregate, apart: Any = None) -> Aggregate:
    """Two aggregates as one, with the dtypes of the first.

    One of weight 0 counts for nothing, whatever its arrays hold.

    Args:
      a: an aggregate, say of what came before.
      b: another.
      apart: the :func:`distances` of both, if they are known.
    """
    apart = distances(a, b.mean) if apart is None else apart
    weight = a.moments.weight + b.moments.weight

    def towards(x, y, measured=()):
        # The mean is written over once it was read for its distance.
        counts = depends_on(b.moments.weight > 0, *measured)
        wide = _wide(x)
        share = _numerics.ratio(b.moments.weight.astype(wide), weight.astype(wide))
        old = jnp.where(a.moments.weight > 0, x.astype(wide), 0)
        new = old + share * (y.astype(wide) - old)
        return jnp.where(counts, new, old).astype(x.dtype)

    factor = b.moments.weight * _numerics.ratio(a.moments.weight, weight)
    spread = jnp.where(factor > 0, factor * apart, 0.0)
    olds, treedef = jax.tree.flatten(a.mean)
    means = [
        towards(x, y, [apart[i]])
        for i, (x, y) in enumerate(zip(olds, jax.tree.leaves(b.mean), strict=True))
    ]
    return Aggregate(
        mean=jax.tree.unflatten(treedef, means),
        value=towards(a.value, b.value),
        moments=Moments(
            num_microbatches=a.moments.num_microbatches + b.moments.num_microbatches,
            weight=weight,
            deviation=a.moments.deviation + b.moments.deviation + spread,
            mean_square=jax.tree.map(
                towards, a.moments.mean_square, b.moments.mean_square
            ),
            leaves=a.moments.leaves,
        ),
    )


def stacked(
    grads,
    values,
    weights,
    *,
    mean_square: bool,
    axis_name: _mesh_axes.AxisName = None,
) -> Aggregate:
    """Microbatches along the first axis of every array, as one aggregate.

    Those of weight 0 count for nothing, whatever their arrays hold. ``axis_name`` are
    the mesh axes that shard the gradients, under ``shard_map``.
    """
    kept, weight = weights > 0, jnp.sum(weights)
    shares = _numerics.ratio(weights, weight)

    def along(vector, leaf):
        return vector.reshape(-1, *[1] * (leaf.ndim - 1))

    def average(leaf):
        parts = along(shares, leaf) * leaf
        return jnp.sum(jnp.where(along(kept, leaf), parts, 0), axis=0)

    def deviation(leaf, mean):
        distances = along(weights, leaf) * jnp.square(leaf - mean)
        return _total(jnp.where(along(kept, leaf), distances, 0))

    grads = widen(grads)
    mean = jax.tree.map(average, grads)
    squares = jax.tree.map(lambda leaf: average(_square(leaf)), grads)
    leaves = jax.tree.leaves(mean)
    deviations = _stack(jax.tree.leaves(jax.tree.map(deviation, grads, mean)))
    return Aggregate(
        mean=mean,
        value=average(values.astype(jnp.float32)),
        moments=Moments(
            # As float32, so that over devices it travels with the deviations.
            num_microbatches=_total(kept).astype(jnp.int32),
            weight=weight,
            deviation=_mesh_axes.add_up(deviations, leaves, axis_name),
            mean_square=squares if mean_square else None,
            leaves=_tree.mark_leaves(mean),
        ),
    )


def _shown(updates: Any, tree: Any) -> Any:
    """The part of a tree that a mask leaves of the updates."""

    def is_masked(node):
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(
        lambda update, part: update if is_masked(update) else part,
        updates,
        tree,
        is_leaf=is_masked,
    )


def visible(moments: Moments, updates: Any) -> Moments:
    """The moments of those leaves that a mask leaves of the gradients.

    ``optax.masked`` and ``optax.partition`` hide leaves of the gradients from what they
    wrap, but hand on extra arguments as they are.

    Args:
      moments: of all leaves.
      updates: the gradients, with ``optax.MaskedNode`` for what is hidden.

    Raises:
      ValueError: the moments are not those of these gradients.
    """
    if moments.leaves is None and moments.mean_square is None:
        return moments
    try:
        squares = moments.mean_square
        squares = None if squares is None else _shown(updates, squares)
        leaves = moments.leaves
        leaves = _tree.mark_leaves(moments.mean_square) if leaves is None else leaves
        marks = _shown(_tree.pure(updates), _tree.number_leaves(leaves))
    except ValueError as error:
        raise ValueError(
            "moments are of another tree than the gradients; give those that came "
            f"with them from microbatch_gradients or accumulate_moments. {error}"
        ) from error
    places = np.array(jax.tree.leaves(marks), np.int32)
    return moments._replace(
        mean_square=squares,
        deviation=moments.deviation[places],
        norm=None if moments.norm is None else moments.norm[places],
        leaves=_tree.mark_leaves(updates),
    )


def _factors(
    moments: Moments, grads: Any, axis_name: _mesh_axes.AxisName = None
) -> jax.Array:
    """By what each leaf of the mean was scaled since it was made, float32[n_leaves]."""
    leaves = jax.tree.leaves(grads)
    if moments.norm is None:
        return jnp.ones((len(leaves),), jnp.float32)
    then = _norms.whole_leaves(moments.norm, leaves, axis_name)
    factors = _norms.leaf_norms(grads, axis_name) / then
    return jnp.where(jnp.isfinite(factors), factors, 1.0)


def rescaled(
    moments: Moments, grads: Any, axis_name: _mesh_axes.AxisName = None
) -> Moments:
    """The moments as if every microbatch gradient had been scaled as their mean was."""
    if moments.norm is None:
        return moments
    squares = jnp.square(_factors(moments, grads, axis_name))
    leaves, treedef = jax.tree.flatten(moments.mean_square)
    scaled = [leaf * squares[i] for i, leaf in enumerate(leaves)]
    return moments._replace(
        deviation=moments.deviation * squares,
        mean_square=jax.tree.unflatten(treedef, scaled),
    )


def sizes(moments: Moments, grads: Any) -> Any:
    """Root mean square of the microbatch gradients, entry by entry, float32.

    By what a leaf of their mean was scaled since then, it is scaled as well. It is at
    least |ḡ|, which holds for exact squares and is needed where they underflowed.

    Args:
      moments: with a ``mean_square``.
      grads: ḡ as it is now, float32.
    """
    leaves, treedef = jax.tree.flatten(grads)
    factors = _factors(moments, grads)

    def size(square, g, i):
        root = jnp.sqrt(square) * factors[i]
        # A square that was not finite, or a sum of them that is not.
        return jnp.maximum(jnp.where(_numerics.is_finite(root), root, 0), jnp.abs(g))

    squares = jax.tree.leaves(moments.mean_square)
    return jax.tree.unflatten(treedef, map(size, squares, leaves, range(len(leaves))))
