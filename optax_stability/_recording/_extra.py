"""Records a value that the training loop knows and the gradient does not show.

*Problem*: the largest attention logit, the load of an expert, log Z or an accuracy is
computed in the forward pass. In another log than the gradient, nobody reads both.

*Where in the chain*: anywhere inside ``record_history``; the value is an extra argument
of ``update``. Outside of a guard, so that skipped steps are recorded too.

*Cost*: none but the numbers themselves; nothing is asked of the host. State: one
float32 per number.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_stability._core import _metrics, _parts, _tree
from optax_stability._core._checked import checked


class RecordExtraState(NamedTuple):
    """State of :func:`record_extra`.

    Attributes:
      metrics: ``extra/<name>`` – float32[], or ``extra/<name>/per_entry`` –
        float32[n_numbers]: the last value that was given; zeros before the first.
      entries: one mark per number, to name it; None if the value is a single number.
    """

    metrics: dict[str, jax.Array]
    entries: Any

    reports_metrics = True  # For ost.metrics.
    number = "first"

    @property
    def first(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the first number, which is () in a single state."""
        (value,) = self.metrics.values()
        shape = np.shape(value)
        return jax.ShapeDtypeStruct(
            shape if self.entries is None else shape[1:], jnp.float32
        )


def _shapes(tree: Any) -> Any:
    return jax.tree.map(np.shape, tree)


def _numbers(tree: Any) -> jax.Array:
    """All numbers of a tree of small arrays, float32[n]."""
    leaves = [jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves(tree)]
    return _parts.concatenate([_parts.replicated(x).reshape(-1) for x in leaves])


def record_extra(
    name: str, *, like: Any = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Records an extra argument of ``update``: any numbers of your own.

    They are metrics like all others: in :func:`metrics`, in the flight recorder, and so
    in :func:`history`, :func:`plot_history` and :func:`write_report`.
    ``"attention_logits"``, the largest attention logits of the step, has a check of its
    own in :func:`diagnose`.

    **Rule**: ``extra/<name>`` is the argument of this name, in float32.

    **Guarantees**

    * The updates pass bit for bit.
    * A value that is not finite is reported in its step and in no other.

    **Edge cases**: in a step in which the argument is missing or None, the last value
    stays. Under ``shard_map`` give a value that is the same on all devices, such as
    ``jax.lax.pmax(x, axes)``.

    Args:
      name: name of the argument, and of the metric.
      like: a tree of numbers, arrays or shapes like the argument; by default a single
        number. Each number is one column of the history, so keep it small.

    Returns:
      A transformation with state :class:`RecordExtraState`. Its ``update`` takes the
      argument ``<name>=``. Metrics: ``extra/<name>``, float32[]; if ``like`` is
      anything else than one number, ``extra/<name>/per_entry``, float32[n_numbers], in
      the order of ``jax.tree.leaves``. Their names are paths and indices in ``like``:
      ``extra/<name>/blocks/0/3``.

    Raises:
      ValueError: ``name`` is not a Python name, or ``like`` is empty; at ``update``,
        the argument has other shapes than ``like``.

    Example:
      >>> from optax_stability import metrics
      >>> params = {"w": jnp.ones(2)}
      >>> tx = record_extra("router_load", like=jnp.zeros(2))
      >>> load = jnp.array([0.75, 0.25])
      >>> _, state = tx.update(params, tx.init(params), params, router_load=load)
      >>> {key: float(x) for key, x in metrics(state, params=params).items()}
      {'extra/router_load/0': 0.75, 'extra/router_load/1': 0.25}
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"name={name!r} must be a Python name, such as 'accuracy': update takes "
            "the value as a keyword argument."
        )
    shapes = _shapes(like)
    size = sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(like))
    if not size:
        raise ValueError(f"like={like!r} holds no number; give a tree like {name}.")
    single = jax.tree.structure(like) == jax.tree.structure(0) and np.shape(like) == ()
    key = f"extra/{name}" if single else f"extra/{name}{_metrics.PER_ENTRY}"

    def init_fn(params):
        del params
        return RecordExtraState(
            metrics={key: jnp.zeros(() if single else (size,), jnp.float32)},
            entries=None
            if single
            else jax.tree.map(lambda leaf: _tree.mark_entries(np.shape(leaf)), like),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params
        given = extra_args.get(name)
        if given is None:
            return updates, state
        if _shapes(given) != shapes:
            raise ValueError(
                f"{name} has the shapes {_shapes(given)}, but record_extra({name!r}) "
                f"was made for {shapes}; give like=… the same shapes."
            )
        numbers = _numbers(given)
        return updates, state._replace(metrics={key: numbers[0] if single else numbers})

    return checked("record_extra", RecordExtraState, init_fn, update_fn)
