"""What ``branch_on_spike`` remembers, and how its mode changes: a small state machine.

*Cost*: a dozen scalars, and what is kept aside.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core._numerics import increment
from optax_stability._spikes._detection import Detector, DetectorState, Reading
from optax_stability._spikes._skip_state import SkipSpikesState, Verdict, count

# What the parameters are that the next gradient will be of: the only ones; those of the
# branch; those that were kept, put back for one step.
NORMAL, BRANCH, PROBE = range(3)
# Normal steps that earn a rollback.
PRICE = 60
# A branch asks the kept parameters after so many steps without a reason, doubled each
# time it was in vain, and for a reason not before so many, doubled too.
_GAP, _PATIENCE, _MOST_PATIENCE = 16, 2, 32


class Kept(NamedTuple):
    """What is kept aside while a branch is open; leftovers while none is.

    Attributes:
      params: tree like the parameters, of their dtypes.
      detector: what the thresholds had learned.
      inner_state: state of ``inner`` with ``keep="all"``, else ().
    """

    params: Any
    detector: DetectorState
    inner_state: Any

    @property
    def aside(self) -> bool:
        """True: metrics of states in here are none of the run."""
        return True


class BranchOnSpikeState(NamedTuple):
    """State of :func:`branch_on_spike`.

    Attributes:
      mode: int32[] – 0 normal; 1 a branch is open; 2 the next step is a probe: the
        parameters are the kept ones.
      probed: bool[] – whether the last step was a probe, its loss not the branch's.
      length: int32[] – steps since the branch was opened, 0 if none is open.
      waited: int32[] – steps since it was opened or last probed, 0 if none is open.
      gap: int32[] – steps after which it probes without a reason.
      patience: int32[] – steps before it probes because of a surprise.
      trusting: bool[] – whether a familiar loss is a reason: until that was in vain.
      reasons: bool[2] – whether the last probe was for a familiar loss, a surprise.
      credit: int32[] – rollbacks saved up, in units of 1/60.
      rollbacks: int32[] – branches dropped because the old data were back.
      probes: int32[] – probes, those that failed included.
      accepted: int32[] – branches that became too long and are the run now.
      kept: what a rollback goes back to.
      skip: the counts and the detector that ``skip_spikes`` has, and the state of
        ``inner``.
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
    kept: Kept
    skip: SkipSpikesState

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``branch/…``: where the run is, and how often it went where."""
        return {
            "branch/mode": self.mode,
            "branch/probed": self.probed,
            "branch/length": self.length,
            "branch/rollbacks": self.rollbacks,
            "branch/probes": self.probes,
            "branch/accepted": self.accepted,
        }


class Transition(NamedTuple):
    """What a step does to the mode; at most one of them holds.

    A step that fails is not taken; with all others that is for the guard to say.

    Attributes:
      opens: keeps everything, and is the first step of a branch.
      asks: the kept parameters are put back after the step, to be asked.
      fails: was asked of them, and they find it abnormal too: on with the branch.
      rolls_back: was asked of them, and they find it normal: the branch is dropped.
      accepts: the branch is too long for a fault; it is the run now.
    """

    opens: jax.Array
    asks: jax.Array
    fails: jax.Array
    rolls_back: jax.Array
    accepts: jax.Array

    @property
    def swaps(self) -> jax.Array:
        """Whether parameters in use and parameters kept change places."""
        return self.asks | self.fails


def init_state(kept: Kept, skip: SkipSpikesState, rollback_budget: int):
    """The state before the first step: no branch, all rollbacks to be had."""

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
        credit=number(rollback_budget * PRICE),
        rollbacks=number(),
        probes=number(),
        accepted=number(),
        kept=kept,
        skip=skip,
    )


def _reasons(state: BranchOnSpikeState, reading: Reading, detector: Detector):
    """bool[2]: whether to ask for a familiar loss, and whether for a surprise."""
    familiar = detector.is_usual(reading.value, state.kept.detector)
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
    """The rule of ``branch_on_spike``, and the reasons there are to ask."""
    normal, probe = state.mode == NORMAL, state.mode == PROBE
    abnormal = reading.spike | reading.nonfinite
    # A spike that the bucket would not pay for is part of a mixture: it is learned.
    again = (verdict.skip | verdict.accept) & (state.skip.spikes_in_row >= 1)
    accepts = (state.mode == BRANCH) & (state.length >= max_length)
    reasons = _reasons(state, reading, detector)
    due = reasons.any() | (increment(state.waited) >= state.gap)
    may_ask = (state.mode == BRANCH) & ~accepts & ~reading.nonfinite
    transition = Transition(
        opens=normal & reading.spike & again & (state.credit >= PRICE),
        asks=may_ask & due,
        fails=probe & abnormal,
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
    kept: Kept,
    skip: SkipSpikesState,
) -> BranchOnSpikeState:
    """The state after a step."""
    opens, asks, fails = transition.opens, transition.asks, transition.fails
    ends = transition.rolls_back | transition.accepts
    mode = jnp.where(ends, NORMAL, jnp.where(asks, PROBE, state.mode))
    mode = jnp.where(opens | fails, BRANCH, mode)
    stays = (mode == BRANCH) & ~(opens | fails)
    failed, by_clock = fails & state.reasons, fails & ~state.reasons.any()
    familiar_failed, surprise_failed = failed
    patience = jnp.minimum(2 * state.patience, _MOST_PATIENCE)
    earns = (state.mode == NORMAL) & ~reading.spike & ~reading.nonfinite
    credit = state.credit + earns - PRICE * transition.rolls_back
    return BranchOnSpikeState(
        mode=mode.astype(jnp.int32),
        probed=state.mode == PROBE,
        length=jnp.where(mode == NORMAL, 0, increment(state.length)),
        waited=jnp.where(stays, increment(state.waited), 0),
        gap=jnp.where(opens, _GAP, jnp.where(by_clock, 2 * state.gap, state.gap)),
        patience=jnp.where(
            opens, _PATIENCE, jnp.where(surprise_failed, patience, state.patience)
        ),
        trusting=opens | (state.trusting & ~familiar_failed),
        reasons=jnp.where(asks, reasons, state.reasons),
        credit=jnp.minimum(credit, rollback_budget * PRICE),
        rollbacks=count(state.rollbacks, transition.rolls_back),
        probes=count(state.probes, state.mode == PROBE),
        accepted=count(state.accepted, transition.accepts),
        kept=kept,
        skip=skip,
    )
