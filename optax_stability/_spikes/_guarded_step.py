"""A guarded step: judged, scaled to its limit, and taken if the verdict allows it.

*Cost*: one norm and a few scalars; no buffer of the size of a parameter besides the
gradient. On CPU a conditional around ``inner``; on accelerators a select in the pass
that applies the update.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _known_norms, _mesh_axes, _norms, _tree, _validate
from optax_stability._core._in_place import depends_on, run_if
from optax_stability._core._losses import loss_of
from optax_stability._core._numerics import scale
from optax_stability._core._platform import by_platform
from optax_stability._spikes._detection import Detector, DetectorState, Reading
from optax_stability.thresholds import Threshold
from optax_stability.thresholds._threshold import check_threshold

# Rebasing accepts a norm up to this multiple of its limit: a large norm would stay in
# Adam's second moment for long.
_MAX_RISE = 10.0


class Guard(NamedTuple):
    """Settings that ``skip_spikes`` and ``branch_on_spike`` share.

    Attributes:
      detector: decides which steps are abnormal.
      max_consecutive: finite spikes skipped in a row before one is taken.
      budget: finite spikes skipped before normal steps have to earn more.
      axis_name: as in the public functions.
    """

    detector: Detector
    max_consecutive: int
    budget: int
    axis_name: _mesh_axes.AxisName


class Assessment(NamedTuple):
    """What is measured of a step before it is decided on.

    Attributes:
      norms: norms of the gradient.
      leaves: marks that name the leaves of the gradient.
      reading: findings of the detector.
      learned: state of the detector if it learns the step.
      rebased: state of the detector if the step is accepted as the new normal.
    """

    norms: _norms.Norms
    leaves: Any
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
    """Checks the settings and collects them."""
    named = {"grad_norm": grad_norm, "value": value, "confirm": confirm}
    for name, threshold in named.items():
        check_threshold(name, threshold, optional=True)
    _validate.check_count("max_consecutive", max_consecutive, 1, "5 is the default")
    _validate.check_count("budget", budget, 1, "16 is the default")
    _validate.check_interval("budget", budget, "[1, 10000]", "16 is the default")
    _validate.check_axis_name("axis_name", axis_name)
    detector = Detector(grad_norm, value, confirm)
    return Guard(detector, max_consecutive, budget, axis_name)


def assess(guard: Guard, updates, state: DetectorState, extra_args) -> Assessment:
    """Measures a step and compares it with its limits."""
    detector, axis_name = guard.detector, guard.axis_name
    norms = _known_norms.measure(updates, axis_name)
    loss = loss_of(extra_args, needed=detector.needs_loss, axis_name=axis_name)
    reading, learned = detector.judge(norms.total, loss, state)
    level = jnp.minimum(norms.total, _MAX_RISE * reading.norm_limit)
    return Assessment(
        norms=norms,
        leaves=_tree.mark_leaves(updates),
        reading=reading,
        learned=learned,
        rebased=detector.rebase(level, loss, state),
    )


def _gradient_measurements(extra_args: dict[str, Any]) -> list:
    """The measurements of the gradient in ``moments``, if they are an argument."""
    moments = extra_args.get("moments")
    known = [getattr(moments, name, None) for name in ("deviation", "norm")]
    return [each for each in known if each is not None]


@jax.jit
def _scaled_if(x, factor, above, take):
    """A leaf, scaled if it is above its limit.

    A step that is not taken is computed as well: on zeros, not on NaN.
    """
    return jnp.where(take, jnp.where(above, scale(x, factor), x), jnp.zeros_like(x))


def prepare_step(
    guard: Guard, inner, take, assessment: Assessment, updates, params, extra_args
):
    """Scales a gradient that is taken to its limit, and prepares the step.

    Returns:
      The gradient, and a function from it and the state of ``inner`` to the update and
      the next state.
    """
    reading, norms = assessment.reading, assessment.norms
    above = reading.norm > reading.norm_limit
    factor = reading.norm_limit / jnp.where(above, reading.norm, 1.0)
    factor = jnp.where(above, factor, 1.0)

    def scaled(updates):
        return jax.tree.map(lambda x: scale(x, factor), updates)

    def scale_in_place(updates):
        # A multiplication by 1 would cost a pass over the gradient.
        due = depends_on(above & take, *_gradient_measurements(extra_args))
        return run_if(due, scaled, updates)

    def scale_in_the_step(updates):
        return jax.tree.map(lambda x: _scaled_if(x, factor, above, take), updates)

    updates = by_platform(updates, cpu=scale_in_place, accelerator=lambda x: x)
    norms = optax.tree.where(above, optax.tree.scale(factor, norms), norms)
    norms = optax.tree.where(take, norms, optax.tree.zeros_like(norms))

    def step(updates, inner_state):
        updates = by_platform(updates, cpu=lambda x: x, accelerator=scale_in_the_step)
        with _known_norms.reuse_norms(updates, norms, guard.axis_name):
            return inner.update(updates, inner_state, params, **extra_args)

    return updates, step
