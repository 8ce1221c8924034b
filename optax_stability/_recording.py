"""Measures what passes through a chain, and passes it on.

*Problem*: one number per step, the global norm, hides which layer broke first.

*Where in the chain*: anywhere, as often as you like: ``record("grad")`` first,
``record("update")`` last.

*Cost*: two reductions per leaf (squares and maximum). State: three scalars and three
float32[n_leaves] vectors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_stability import _tree


class RecordState(NamedTuple):
    """State of :func:`record`.

    Attributes:
      metrics: ``<name>/…`` – float32[] and, for ``…/per_leaf``, float32[n_leaves]: what
        was measured at the last step; zeros before the first.
      leaves: marks that name the entries of the per-leaf vectors, or None without them.
    """

    metrics: dict[str, jax.Array]
    leaves: Any


def _largest_entries(leaves, axis_name: _tree.AxisName):
    """max|x| of each leaf, float32[n_leaves]; 0 for a leaf without entries."""
    largest = [jnp.max(jnp.abs(x), initial=0).astype(jnp.float32) for x in leaves]
    stacked = jnp.stack(largest) if largest else jnp.zeros((0,), jnp.float32)
    return stacked if axis_name is None else lax.pmax(stacked, axis_name)


def _measure(tree, axis_name: _tree.AxisName) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Each quantity as (global, per leaf)."""
    leaves = jax.tree.leaves(tree)
    norms, sizes = _tree.leaf_norms(tree, axis_name), _tree.leaf_sizes(tree, axis_name)
    largest, norm = _largest_entries(leaves, axis_name), _tree.join_norms(norms)
    return {
        "norm": (norm, norms),
        "rms": (
            norm / jnp.sqrt(jnp.maximum(jnp.sum(sizes), 1.0)),
            norms / jnp.sqrt(jnp.maximum(sizes, 1.0)),
        ),
        "max_abs": (jnp.max(largest, initial=0.0), largest),
    }


def record(
    name: str,
    *,
    per_leaf: bool = True,
    axis_name: _tree.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Records norms and largest entries of the updates at this place in the chain.

    **Guarantees**

    * The updates pass bit for bit, whatever they hold.
    * What is reported is what passed: a NaN gradient has the norm NaN. The next step
      does not remember it.
    * A finite norm is reported right even where its square overflows float32.

    **Edge cases**: an empty tree or leaf has norm, rms and largest entry 0.

    Args:
      name: first part of the metric names, such as ``"grad"``.
      per_leaf: also keep a vector with one entry per leaf, in ``leaf_names`` order.
      axis_name: under ``shard_map``, the mesh axes that shard the updates.

    Returns:
      A transformation with state :class:`RecordState` and metrics ``<name>/norm`` (L2,
      float32), ``<name>/rms`` (norm/√size) and ``<name>/max_abs``, each global and,
      with ``per_leaf``, also ``…/per_leaf``.

    Raises:
      ValueError: ``name`` is empty or no string.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = record("grad")
      >>> grads = {"w": jnp.array([3.0, -4.0])}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> print(state.metrics["grad/norm"], state.metrics["grad/max_abs"])
      5.0 4.0
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name={name!r} must be a non-empty string, such as 'grad'.")

    def named(measured):
        scalars = {f"{name}/{key}": whole for key, (whole, _) in measured.items()}
        if not per_leaf:
            return scalars
        vectors = {
            f"{name}/{key}/per_leaf": each for key, (_, each) in measured.items()
        }
        return scalars | vectors

    def init_fn(params):
        size = len(jax.tree.leaves(params))
        measured = {
            key: (jnp.zeros((), jnp.float32), jnp.zeros((size,), jnp.float32))
            for key in ("norm", "rms", "max_abs")
        }
        return RecordState(
            metrics=named(measured),
            leaves=_tree.mark_leaves(params) if per_leaf else None,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        measured = _measure(updates, axis_name)
        return updates, RecordState(metrics=named(measured), leaves=state.leaves)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
