"""The state of ``branch_on_spike`` and its transitions: a small state machine.

*Cost*: a dozen scalars, and the snapshot.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core._numerics import increment
from optax_stability._spikes._detection import Detector, DetectorState, Reading
from optax_stability._spikes._skip_state import SkipSpikesState, Verdict, count

# The parameters at which the next gradient is taken: the only ones; those of the
# branch; or, for one step, those of the snapshot.
NORMAL, BRANCH, PROBE = range(3)
# Normal steps that earn one rollback.
STEPS_PER_ROLLBACK = 60
# A branch probes the snapshot after _GAP steps even without a reason. A surprise
# triggers a probe after _PATIENCE steps at the earliest. Each failed probe doubles its
# own number of steps, the patience up to _MAX_PATIENCE.
_GAP, _PATIENCE, _MAX_PATIENCE = 16, 2, 32


class Snapshot(NamedTuple):
    """Copy of the parameters from before a branch; unused while no branch is open.

    Attributes:
      params: tree like the parameters, of their dtypes.
      detector: state of the detector.
      inner_state: state of ``inner`` with ``keep="all"``, else ().
    """

    params: Any
    detector: DetectorState
    inner_state: Any

    @property
    def is_snapshot(self) -> bool:
        """True: metrics of the states in a snapshot are not reported."""
        return True


class BranchOnSpikeState(NamedTuple):
    """State of :func:`branch_on_spike`.

    Attributes:
      mode: int32[] – 0 normal; 1 a branch is open; 2 the next step is a probe: the
        parameters in use are those of the snapshot.
      probed: bool[] – whether the last step was a probe, so that its loss is that of
        the snapshot.
      length: int32[] – steps since the branch was opened, 0 if none is open.
      waited: int32[] – steps since the branch was opened or last probed, 0 if none is
        open.
      gap: int32[] – steps after which a probe needs no reason.
      patience: int32[] – steps before a surprise may trigger a probe.
      trusting: bool[] – whether a familiar loss triggers a probe: until such a probe
        has failed.
      reasons: bool[2] – whether a familiar loss, and whether a surprise, triggered the
        last probe.
      credit: int32[] – rollbacks saved up, in units of 1/60.
      rollbacks: int32[] – branches dropped because the old data returned.
      probes: int32[] – probes, including failed ones.
      accepted: int32[] – branches accepted as the run because they became too long.
      kept: the snapshot, which a rollback restores.
      skip: the counts and the detector of ``skip_spikes``, and the state of ``inner``.
    """

    mode: jax.Array
    probed: jax.Array
    length: jax.Array
    waited: jax.Array
    gap: jax.Array
    patience: jax.Array
    trusting: jax.Array
    reasons: jax.Array
    credit: jax.Array
    rollbacks: jax.Array
    probes: jax.Array
    accepted: jax.Array
    kept: Snapshot
    skip: SkipSpikesState

    reports_metrics = True  # For ost.metrics.
    number = "mode"  # This field is one number.

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``branch/…``: the mode, the length of the branch, and the counts."""
        return {
            "branch/mode": self.mode,
            "branch/probed": self.probed,
            "branch/length": self.length,
            "branch/rollbacks": self.rollbacks,
            "branch/probes": self.probes,
            "branch/accepted": self.accepted,
        }


class Transition(NamedTuple):
    """How a step changes the mode; at most one field is True.

    A failed probe is not taken as a step. For all other steps the guard decides.

    Attributes:
      opens: takes the snapshot, and is the first step of a branch.
      starts_probe: after the step, the snapshot comes into use for the next step.
      probe_fails: the step is abnormal for the snapshot too: the branch continues.
      rolls_back: the step is normal for the snapshot: the branch is dropped.
      accepts: the branch is too long for a fault: it becomes the run.
    """

    opens: jax.Array
    starts_probe: jax.Array
    probe_fails: jax.Array
    rolls_back: jax.Array
    accepts: jax.Array

    @property
    def swaps(self) -> jax.Array:
        """Whether the parameters in use and the snapshot are exchanged."""
        return self.starts_probe | self.probe_fails


def init_state(snapshot: Snapshot, skip: SkipSpikesState, rollback_budget: int):
    """The state before the first step: no branch, the full rollback budget."""

    def number(value: int = 0):
        return jnp.full((), value, jnp.int32)

    return BranchOnSpikeState(
        mode=number(NORMAL),
        probed=jnp.zeros((), bool),
        length=number(),
        waited=number(),
        gap=number(_GAP),
        patience=number(_PATIENCE),
        trusting=jnp.ones((), bool),
        reasons=jnp.zeros((2,), bool),
        credit=number(rollback_budget * STEPS_PER_ROLLBACK),
        rollbacks=number(),
        probes=number(),
        accepted=number(),
        kept=snapshot,
        skip=skip,
    )


def _reasons(state: BranchOnSpikeState, reading: Reading, detector: Detector):
    """bool[2]: whether a familiar loss, and whether a surprise, triggers a probe."""
    familiar = detector.is_normal_loss(reading.value, state.kept.detector)
    surprising = (reading.norm > reading.norm_limit) | (
        reading.value > reading.value_limit
    )
    patient = increment(state.waited) >= state.patience
    return jnp.stack([familiar & state.trusting, surprising & patient])


def next_transition(
    state: BranchOnSpikeState,
    reading: Reading,
    verdict: Verdict,
    detector: Detector,
    max_length: int,
) -> tuple[Transition, jax.Array]:
    """The rule of ``branch_on_spike``, and the reasons for a probe."""
    normal, probe = state.mode == NORMAL, state.mode == PROBE
    abnormal = reading.spike | reading.nonfinite
    # A spike that exceeds the skip budget is part of a mixture: it is learned.
    repeated = (verdict.skip | verdict.accept) & (state.skip.spikes_in_row >= 1)
    accepts = (state.mode == BRANCH) & (state.length >= max_length)
    reasons = _reasons(state, reading, detector)
    due = reasons.any() | (increment(state.waited) >= state.gap)
    may_probe = (state.mode == BRANCH) & ~accepts & ~reading.nonfinite
    transition = Transition(
        opens=normal & reading.spike & repeated & (state.credit >= STEPS_PER_ROLLBACK),
        starts_probe=may_probe & due,
        probe_fails=probe & abnormal,
        rolls_back=probe & ~abnormal,
        accepts=accepts,
    )
    return transition, reasons


def update_state(
    state: BranchOnSpikeState,
    transition: Transition,
    reading: Reading,
    *,
    reasons: jax.Array,
    rollback_budget: int,
    snapshot: Snapshot,
    skip: SkipSpikesState,
) -> BranchOnSpikeState:
    """The state after a step."""
    opens, probe_fails = transition.opens, transition.probe_fails
    starts_probe = transition.starts_probe
    ends = transition.rolls_back | transition.accepts
    mode = jnp.where(ends, NORMAL, jnp.where(starts_probe, PROBE, state.mode))
    mode = jnp.where(opens | probe_fails, BRANCH, mode)
    stays = (mode == BRANCH) & ~(opens | probe_fails)
    failed = probe_fails & state.reasons
    scheduled_failed = probe_fails & ~state.reasons.any()
    familiar_failed, surprise_failed = failed
    patience = jnp.minimum(2 * state.patience, _MAX_PATIENCE)
    earns = (state.mode == NORMAL) & ~reading.spike & ~reading.nonfinite
    spent = jnp.where(transition.rolls_back, STEPS_PER_ROLLBACK, 0)
    credit = state.credit + earns.astype(jnp.int32) - spent
    return BranchOnSpikeState(
        mode=mode.astype(jnp.int32),
        probed=state.mode == PROBE,
        length=jnp.where(mode == NORMAL, 0, increment(state.length)),
        waited=jnp.where(stays, increment(state.waited), 0),
        gap=jnp.where(
            opens, _GAP, jnp.where(scheduled_failed, 2 * state.gap, state.gap)
        ),
        patience=jnp.where(
            opens, _PATIENCE, jnp.where(surprise_failed, patience, state.patience)
        ),
        trusting=opens | (state.trusting & ~familiar_failed),
        reasons=jnp.where(starts_probe, reasons, state.reasons),
        credit=jnp.minimum(credit, rollback_budget * STEPS_PER_ROLLBACK),
        rollbacks=count(state.rollbacks, transition.rolls_back),
        probes=count(state.probes, state.mode == PROBE),
        accepted=count(state.accepted, transition.accepts),
        kept=snapshot,
        skip=skip,
    )
