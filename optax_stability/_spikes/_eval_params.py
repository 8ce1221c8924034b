"""Which parameters to evaluate or serve while ``branch_on_spike`` has a branch open.

*Cost*: a select between two copies of the parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _metrics, _tree
from optax_stability._core._memory_space import to_device
from optax_stability._spikes._branch_state import BRANCH, BranchOnSpikeState


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by where they are."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(_tree.pure(tree))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def eval_params(params: optax.Params, state: Any) -> optax.Params:
    """The parameters to evaluate or to serve: the kept ones while a branch is open.

    Until a branch of :func:`branch_on_spike` is dropped or accepted, nobody knows
    whether it learns from corrupted data.

    **Rule**: the kept parameters in mode 1, ``params`` in the modes 0 and 2; in mode 2
    they are the kept ones.

    **Edge cases**: under ``optax.masked`` and ``optax.partition`` each part has a mode
    of its own, and parameters that none of them covers come back as they are. Works
    inside ``jit`` and outside; outside, all parameters are copied.

    Args:
      params: the parameters as training has them: any tree, or an NNX state.
      state: the state of the optimizer for them, with :func:`branch_on_spike` anywhere
        in it: of a chain, an ``nnx.Optimizer``, a Flax train state.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: there is no state of :func:`branch_on_spike` in ``state``, or it is
        one of other parameters.

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
            "state has no state of branch_on_spike in it; pass the state of the "
            "optimizer, as eval_params(params, opt_state). Without branch_on_spike the "
            "parameters to evaluate are those that are trained."
        )
    leaves = _by_path(params)
    for branch in branches:
        for path, kept in _by_path(branch.kept.params).items():
            if path not in leaves or leaves[path].shape != kept.shape:
                raise ValueError(
                    f"params has no leaf {path} of shape {kept.shape}, which is kept; "
                    "pass the parameters that the optimizer state was made for."
                )
            leaves[path] = jnp.where(
                branch.mode == BRANCH, to_device(kept), leaves[path]
            )
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values())
