"""Which parameters to evaluate or serve while ``branch_on_spike`` has a branch open.

*Cost*: a select between two copies of the parameters.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from optax_stability._core import _metrics, _tree
from optax_stability._core._memory_space import to_device
from optax_stability._spikes._branch_state import BRANCH, BranchOnSpikeState

Params = TypeVar("Params")


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(_tree.pure(tree))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def eval_params(params: Params, state: Any) -> Params:
    """Selects the parameters to evaluate or serve: the snapshot during a branch.

    Until a branch of :func:`branch_on_spike` is dropped or accepted, it is unknown
    whether it learns from corrupted data.

    **Rule**: the snapshot in mode 1, ``params`` in modes 0 and 2. In mode 2, ``params``
    are those of the snapshot.

    **Edge cases**: under ``optax.masked`` and ``optax.partition`` each part has its own
    mode, and parameters outside all parts are returned unchanged. Works inside ``jit``
    and outside; outside, all parameters are copied.

    Args:
      params: the parameters in training: any tree, or an NNX state.
      state: their optimizer state, with a state of :func:`branch_on_spike` anywhere in
        it: of a chain, an ``nnx.Optimizer``, a Flax train state.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: there is no state of :func:`branch_on_spike` in ``state``, or it
        belongs to other parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_stability import branch_on_spike
      >>> params = {"w": jnp.ones(2)}
      >>> tx = branch_on_spike(optax.adam(0.1))
      >>> eval_params(params, tx.init(params))["w"]
      Array([1., 1.], dtype=float32)
    """
    branches = _metrics.find(state, BranchOnSpikeState)
    if not branches:
        raise ValueError(
            "state holds no state of branch_on_spike; pass the optimizer state, as in "
            "eval_params(params, opt_state). Without branch_on_spike, evaluate params."
        )
    leaves = _by_path(params)
    for branch in branches:
        for path, kept in _by_path(branch.kept.params).items():
            if path not in leaves or leaves[path].shape != kept.shape:
                raise ValueError(
                    f"params has no leaf {path} of shape {kept.shape}, which the "
                    "snapshot has; pass the parameters that the optimizer state was "
                    "made for."
                )
            leaves[path] = jnp.where(
                branch.mode == BRANCH, to_device(kept), leaves[path]
            )
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values())
