"""A flight recorder: the metrics of the last steps, kept in the optimizer state.

*Problem*: when a run dies, the log that would explain it is on another machine, has
every hundredth step only, and has no values per layer.

*Where in the chain*: around everything but ``accumulate_moments``:
``accumulate_moments(record_history(skip_spikes(chain)))`` has one row per step; the
opposite order has one row per microbatch.

*Cost*: one row of float32 per step. State: ``length`` × (numbers per step), on the
device; nothing goes to the host. Metrics that need a pass over the moments
(``adam/…``) are read every ``slow_every`` steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_stability._core import (
    _known_norms,
    _mesh_axes,
    _metrics,
    _numerics,
    _parts,
    _states,
    _tree,
    _validate,
)
from optax_stability._core._checked import checked
from optax_stability._core._in_place import run_if
from optax_stability._core._look import is_due
from optax_stability._core._losses import given_losses, loss_of

States = list[tuple[tuple, Any]]

# Marks what was not recorded, in place of NaN: jax.debug_nans would stop there. The
# greatest negative float32 is no loss and no metric.
_NOT_RECORDED = -_numerics.HUGE


class RecordHistoryState(NamedTuple):
    """State of :func:`record_history`.

    Attributes:
      step: int32[] – calls of ``update``.
      rows: real[length, n_numbers], float64 if a parameter is float64 or complex128,
        else float32 – ring buffer of loss and metrics; step i is in
        row i mod ``length``. What was not recorded, such as a loss that was not given,
        is −3.4e38.
      has_loss: bool[] – whether a loss was ever given.
      inner_state: state of ``inner``; its structure defines the columns of ``rows``.
    """

    step: jax.Array
    rows: jax.Array
    has_loss: jax.Array
    inner_state: Any

    reports_metrics = True  # For ost.metrics.

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``history/steps``: steps recorded so far, including overwritten ones."""
        return {"history/steps": self.step}


def _split_by_cost(inner_state: Any) -> tuple[States, States]:
    """The states with cheap metrics, and those that need a pass over arrays."""
    found = _metrics.reporting_states(inner_state)
    costly = [getattr(type(node), "costly_metrics", False) for _, node in found]
    pairs = list(zip(found, costly, strict=True))
    return [each for each, slow in pairs if not slow], [
        each for each, slow in pairs if slow
    ]


def _recorded_metrics(node: Any) -> dict[str, jax.Array]:
    """The metrics of a state that are scalars, or vectors with named entries."""
    return {
        key: value
        for key, value in sorted(node.metrics.items())
        if value.ndim == _metrics.is_vector(key)
    }


def _row(states: States, dtype) -> jax.Array:
    """Concatenates the recorded metrics of all states, in one dtype."""
    values = [value for _, node in states for value in _recorded_metrics(node).values()]
    # Without a metric the concatenation is an empty float32 vector.
    row = _parts.concatenate([value.astype(dtype) for value in values])
    return row.astype(dtype)


def _columns(states: States, rows: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Splits rows made by :func:`_row` into metrics by key; the last axis is time."""
    columns, start = [], 0
    for _, node in states:
        column = {}
        shapes = jax.eval_shape(lambda node=node: _recorded_metrics(node))
        for key, value in shapes.items():
            end = start + value.size
            column[key] = rows[:, start:end].T.reshape(*value.shape, -1)
            start = end
        columns.append(column)
    return columns


def history(state: Any) -> dict[str, np.ndarray]:
    """Returns the steps that :func:`record_history` has kept, oldest first.

    Fetches the rows from the device in one transfer.

    **Guarantees**

    * Every recorded metric has the name that ``metrics(state, params=params)`` gives
      it; vectors are split by leaf.
    * The steps are consecutive and end with the last step, also after the ring buffer
      has wrapped around and after a restart from a checkpoint.

    **Edge cases**: before the first step all arrays are empty. If no loss was given,
      there is no ``loss``. With several recorders the outermost is read.

    Args:
      state: any optimizer state, or an object that holds one.

    Returns:
      ``step``, int64[n]: calls of the recorder's ``update``, counted from 0; ``loss``
      and the metrics, float32[n].

    Raises:
      ValueError: there is no recorder in ``state``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_stability import record
      >>> tx = record_history(record("grad"), length=2)
      >>> params = {"w": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> for g in (1.0, 2.0, 3.0):
      ...     _, state = tx.update({"w": jnp.array([g, 0.0])}, state, value=g * g)
      >>> kept = history(state)
      >>> print(kept["step"], kept["loss"], kept["grad/norm/w"])
      [1 2] [4. 9.] [2. 3.]
    """
    found = _metrics.find(state, RecordHistoryState)
    if not found:
        raise ValueError(
            f"state={type(state).__name__} holds no history; put record_history(...) "
            "around the chain."
        )
    recorder = found[0]
    # Only the first three fields: the inner state contains the moments.
    step, ring, has_loss = jax.device_get(recorder[:3])
    step = int(step)
    cheap, costly = _split_by_cost(recorder.inner_state)
    steps = np.arange(max(0, step - len(ring)), step)
    rows = ring[steps % len(ring)]
    rows = np.where(rows == _NOT_RECORDED, np.float32(np.nan), rows)
    columns = _metrics.by_leaf(cheap + costly, _columns(cheap + costly, rows[:, 1:]))
    loss = {"loss": rows[:, 0]} if has_loss else {}
    return {"step": steps} | loss | columns


def record_history(
    inner: optax.GradientTransformation,
    *,
    length: int = 256,
    slow_every: int = 50,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the loss and the metrics of the last steps in the optimizer state.

    The updates are those of ``inner``. The history is part of the checkpoint, so it
    can be read after a crash: by :func:`history`, :func:`diagnose` and
    :func:`write_report`.

    **Rule**: after every step of ``inner`` one row overwrites the oldest row. It holds
    the loss and all metrics of the inner states that are scalars, or vectors with one
    entry per leaf, or per entry of :func:`record_extra`.

    **Guarantees**

    * Updates and state of ``inner`` are bit for bit those without the recorder.
    * Nothing is sent to the host, and no step is missing: a step that
      :func:`skip_spikes` skips has a row with its measurements.
    * A metric that does not change in a step, such as one of a skipped ``inner``, is
      written with its last value.
    * The norms of the gradient are measured once, for every ``record``, ``skip_…`` and
      ``clip_…`` inside that receives this same gradient.

    **Edge cases**: counts are kept in float32, exact up to 2²⁴. A loss that is not
    given is read as NaN. Histograms are not kept. Under ``shard_map`` each device
    measures ``adam/…`` on its shard; the mean over devices is kept.

    Args:
      inner: the transformation to record: the whole chain.
      length: steps to keep, ≥ 1.
      slow_every: steps between readings of metrics that need passes over the moments
        (``adam/…``); in between they keep their value. If the model takes most of the
        time, a smaller value costs little, and findings from them come sooner. The
        extra argument ``look=`` decides instead if it is given, see :func:`record`.
      axis_name: under ``shard_map``, the mesh axes that shard the gradient. Leave it
        None under ``jit``.

    Returns:
      A transformation with state :class:`RecordHistoryState`. Its ``update`` takes the
      loss as ``value=`` or ``loss=`` and passes all extra arguments on. Metrics: those
      of ``inner``, and ``history/steps``.

    Raises:
      TypeError: ``inner`` is not a transformation.
      ValueError: ``length`` or ``slow_every`` is below 1.

    Example:
      >>> import optax
      >>> from optax_stability import record, safe_adamw, spike_guard
      >>> tx = record_history(
      ...     optax.chain(record("grad"), spike_guard(safe_adamw(1e-3))), length=1000
      ... )
    """
    _validate.check_transformation("inner", inner)
    _validate.check_size("length", length, 1)
    _validate.check_count("slow_every", slow_every, 1, "50 is the default")
    _validate.check_axis_name("axis_name", axis_name)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        inner_state = inner.init(params)
        dtype = _numerics.real_dtype(_tree.pure(params))
        shape = jax.eval_shape(
            lambda: _row(_metrics.reporting_states(inner_state), dtype)
        )
        return RecordHistoryState(
            step=jnp.zeros((), jnp.int32),
            rows=jnp.full((length, 1 + shape.size), _NOT_RECORDED, dtype),
            has_loss=jnp.zeros((), bool),
            inner_state=inner_state,
        )

    def next_row(state, loss, inner_state, extra_args):
        cheap, costly = _split_by_cost(inner_state)
        dtype = state.rows.dtype
        head = jnp.concatenate([loss[None].astype(dtype), _row(cheap, dtype)])
        last_tail = state.rows[(state.step - 1) % length, len(head) :]

        def read(_):
            return _mesh_axes.mean_over_varying(_row(costly, dtype), axis_name)

        due = is_due(extra_args, lambda: state.step % slow_every == 0)
        tail = run_if(due, read, last_tail)
        return jnp.concatenate([head, tail])

    def update_fn(updates, state, params=None, **extra_args):
        if len(state.rows) != length:
            raise _states.WrongStateError(
                f"record_history(length={length}) got a state of "
                f"length={len(state.rows)}; give that length, or the state of "
                "tx.init(params)."
            )
        given = bool(given_losses(extra_args))
        loss = loss_of(extra_args, needed=False, axis_name=axis_name)
        norms = _known_norms.measure(updates, axis_name)
        with _known_norms.reuse_norms(updates, norms, axis_name):
            updates, inner_state = inner.update(
                updates, state.inner_state, params, **extra_args
            )
        shown = loss if given else jnp.full_like(loss, _NOT_RECORDED)
        row = next_row(state, shown, inner_state, extra_args)
        return updates, RecordHistoryState(
            step=_numerics.increment(state.step),
            rows=state.rows.at[state.step % length].set(row),
            has_loss=state.has_loss | given,
            inner_state=inner_state,
        )

    return checked("record_history", RecordHistoryState, init_fn, update_fn)
