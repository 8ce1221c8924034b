"""A step under guard: read, shortened to its limit, and taken if it may be.

*Cost*: one norm, a few scalars, and a conditional around ``inner``; no buffer the size
of a parameter beside the gradient.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core import _known_norms, _mesh_axes, _norms, _validate
from optax_stability._core._in_place import depends_on, run_if
from optax_stability._core._losses import loss_of
from optax_stability._core._numerics import scale
from optax_stability._spikes._detection import Detector, DetectorState, Reading
from optax_stability.thresholds import Threshold
from optax_stability.thresholds._threshold import check_threshold

# A level is accepted only so far above its limit at once: what enters Adam's second
# moment stays there for long.
_MAX_RISE = 10.0


class Guard(NamedTuple):
    """What ``skip_spikes`` and ``branch_on_spike`` have in common.

    Attributes:
      detector: says what is abnormal.
      max_consecutive: finite spikes skipped in a row before one is taken.
      budget: finite spikes skipped before normal steps have to earn more.
      axis_name: as the public functions take it.
    """

    detector: Detector
    max_consecutive: int
    budget: int
    axis_name: _mesh_axes.AxisName


class Assessment(NamedTuple):
    """A step before anything is done with it.

    Attributes:
      norms: of the gradient.
      reading: what the detector found.
      learned: the detector, having learned the step.
      rebased: the detector, taking the step for the new normal.
    """

    norms: _norms.Norms
    reading: Reading
    learned: DetectorState
    rebased: DetectorState


def make_guard(
    grad_norm: Threshold | None,
    value: Threshold | None,
    confirm: Threshold | None,
    max_consecutive: int,
    budget: int,
    axis_name: _mesh_axes.AxisName,
) -> Guard:
    """The settings, checked."""
    named = {"grad_norm": grad_norm, "value": value, "confirm": confirm}
    for name, threshold in named.items():
        check_threshold(name, threshold, optional=True)
    _validate.check_count("max_consecutive", max_consecutive, 1, "5 is the default")
    _validate.check_count("budget", budget, 1, "16 is the default")
    _validate.check_interval("budget", budget, "[1, 10000]", "16 is the default")
    detector = Detector(grad_norm, value, confirm)
    return Guard(detector, max_consecutive, budget, axis_name)


def assess(guard: Guard, updates, state: DetectorState, extra_args) -> Assessment:
    """Reads a step by the past."""
    detector, axis_name = guard.detector, guard.axis_name
    norms = _known_norms.measure(updates, axis_name)
    loss = loss_of(extra_args, needed=detector.needs_loss, axis_name=axis_name)
    reading, learned = detector.judge(norms.whole, loss, state)
    level = jnp.minimum(norms.whole, _MAX_RISE * reading.norm_limit)
    return Assessment(norms, reading, learned, detector.rebase(level, loss, state))


def _measured(extra_args: dict[str, Any]) -> list:
    """What was measured on the gradient, where moments are among the arguments."""
    moments = extra_args.get("moments")
    known = () if moments is None else (moments.deviation, moments.norm)
    return [each for each in known if each is not None]


def prepare_step(
    guard: Guard, inner, take, assessment: Assessment, updates, params, extra_args
):
    """The gradient, at its limit if it is taken and above, and a step on it.

    Returns:
      The gradient, and a function from it and the state of ``inner`` to the update and
      the next state.
    """
    reading = assessment.reading
    # In place and rarely: a factor of 1 would cost a pass over the gradient.
    above = reading.norm > reading.norm_limit
    factor = reading.norm_limit / reading.norm
    updates = run_if(
        depends_on(above & take, *_measured(extra_args)),
        lambda updates: jax.tree.map(lambda x: scale(x, factor), updates),
        updates,
    )
    norms = jax.tree.map(lambda x: jnp.where(above, x * factor, x), assessment.norms)

    def step(updates, inner_state):
        with _known_norms.reuse_norms(updates, norms, guard.axis_name):
            return inner.update(updates, inner_state, params, **extra_args)

    return updates, step
