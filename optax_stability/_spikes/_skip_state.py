"""The state of ``skip_spikes``, its decision and its metrics.

*Cost*: a few dozen scalars.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _tree, _validate
from optax_stability._core._leaves import places_of
from optax_stability._core._numerics import increment
from optax_stability._spikes._detection import KINDS, DetectorState, Reading
from optax_stability._spikes._guarded_step import Assessment

_NEVER = -1


class SkipSpikesState(NamedTuple):
    """State of :func:`skip_spikes`.

    Attributes:
      step: int32[] – calls of ``update``.
      skipped: bool[] – whether the last step was skipped.
      total: int32[] – steps skipped.
      consecutive: int32[] – steps skipped in a row, for any reason.
      spikes_in_row: int32[] – finite spikes skipped since a step was taken.
      credit: int32[] – skips of finite spikes saved up, in normal steps.
      left: int32[] – finite spikes that may be skipped before more are earned.
      declined_total: int32[] – finite spikes taken because none was left.
      accepted_total: int32[] – finite spikes taken after ``max_consecutive`` skips.
      last_step: int32[] – last step skipped, counted from 0; −1 if none was.
      kind_total: int32[4] – steps found abnormal by NaN, Inf, norm, loss, skipped or
        not.
      kind_step: int32[4] – last step of each kind, counted from 0; −1 if none was.
      leaf_nonfinite: int32[n_leaves] – steps at which each leaf of the gradient held a
        NaN or Inf.
      leaves: placeholders that give the names of the leaves.
      norm: real[] – last L2 norm of the gradient; "real" is float64 if a parameter is
        float64 or complex128, else float32.
      norm_limit: real[] – last limit of the norm, ∞ where none is set.
      value: float32[] – last loss, 0 if none was given.
      value_limit: float32[] – last limit of the loss, ∞ where none is set.
      detector: state of the detector.
      inner_state: state of ``inner``.
    """

    step: jax.Array
    skipped: jax.Array
    total: jax.Array
    consecutive: jax.Array
    spikes_in_row: jax.Array
    credit: jax.Array
    left: jax.Array
    declined_total: jax.Array
    accepted_total: jax.Array
    last_step: jax.Array
    kind_total: jax.Array
    kind_step: jax.Array
    leaf_nonfinite: jax.Array
    leaves: Any
    norm: jax.Array
    norm_limit: jax.Array
    value: jax.Array
    value_limit: jax.Array
    detector: DetectorState
    inner_state: Any

    reports_metrics = True  # For ost.metrics.

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``skip/…``: the last verdict, its measurements, and counts by kind."""
        by_kind = {}
        for i, kind in enumerate(KINDS):
            by_kind[f"skip/{kind}_total"] = self.kind_total[i]
            by_kind[f"skip/{kind}_last_step"] = self.kind_step[i]
        return {
            "skip/skipped": self.skipped,
            "skip/total": self.total,
            "skip/nonfinite_total": self.kind_total[0] + self.kind_total[1],
            "skip/nonfinite/per_leaf": self.leaf_nonfinite,
            "skip/accepted_total": self.accepted_total,
            "skip/declined_total": self.declined_total,
            "skip/left": self.left,
            "skip/consecutive": self.consecutive,
            "skip/last_step": self.last_step,
            "skip/norm": self.norm,
            "skip/norm_limit": self.norm_limit,
            "skip/value": self.value,
            "skip/value_limit": self.value_limit,
            **by_kind,
        }


class Bucket(NamedTuple):
    """How many finite spikes may be skipped; counted in normal steps.

    Attributes:
      price: normal steps that earn one skip.
      capacity: normal steps that are saved up at most.
      start: normal steps that are saved up at first.
    """

    price: int | jax.Array
    capacity: int | jax.Array
    start: int


def make_bucket(budget: int, max_share: float | None) -> Bucket:
    """A full bucket that refills quickly, or an empty one that bounds the share.

    With a share the number of skips is at most that share of the steps so far, because
    every skip has been earned before. ``budget`` was checked before.
    """
    if max_share is None:
        return Bucket(budget, budget * budget, budget * budget)
    _validate.check_interval(
        "max_share", max_share, "[1e-05, 0.5]", "0.001 skips one step in 1,000"
    )
    if _validate.is_concrete(max_share):
        price = math.ceil(1 / max_share)
    else:
        price = jnp.ceil(1 / max_share).astype(jnp.int32)
    return Bucket(price, budget * price, 0)


class Verdict(NamedTuple):
    """Whether a step is skipped, or accepted as the new normal; else it is taken."""

    skip: jax.Array
    accept: jax.Array


def decide(
    reading: Reading, state: SkipSpikesState, max_consecutive: int, bucket: Bucket
) -> Verdict:
    """The rule of ``skip_spikes``."""
    full = state.spikes_in_row >= max_consecutive
    affordable = state.credit >= bucket.price
    return Verdict(
        skip=reading.nonfinite | (reading.spike & ~full & affordable),
        accept=reading.spike & full,
    )


def _next_credit(reading: Reading, verdict: Verdict, credit, bucket: Bucket):
    """A skipped spike costs its price, a normal step earns one."""
    spent = jnp.where(verdict.skip & reading.spike, bucket.price, 0)
    earned = jnp.where(reading.spike | reading.nonfinite, 0, 1)
    return jnp.minimum(credit - spent + earned, bucket.capacity)


def _next_row(reading: Reading, verdict: Verdict, spikes_in_row):
    """A taken step ends the row; a non-finite one neither counts nor ends it."""
    row = jnp.where(verdict.skip, spikes_in_row + 1, 0)
    return jnp.where(reading.nonfinite, spikes_in_row, row)


def count(total, event):
    """The total, plus one where ``event`` holds."""
    return jnp.where(event, increment(total), total)


def init_state(
    params: Any,
    detector: DetectorState,
    inner_state: Any,
    bucket: Bucket,
    norm_dtype: Any,
) -> SkipSpikesState:
    """The state before the first step: nothing skipped, the bucket as it starts."""
    num_leaves = len(jax.tree.leaves(params))
    return SkipSpikesState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), bool),
        total=jnp.zeros((), jnp.int32),
        consecutive=jnp.zeros((), jnp.int32),
        spikes_in_row=jnp.zeros((), jnp.int32),
        credit=jnp.full((), bucket.start, jnp.int32),
        left=jnp.full((), bucket.start // bucket.price, jnp.int32),
        declined_total=jnp.zeros((), jnp.int32),
        accepted_total=jnp.zeros((), jnp.int32),
        last_step=jnp.full((), _NEVER, jnp.int32),
        kind_total=jnp.zeros((len(KINDS),), jnp.int32),
        kind_step=jnp.full((len(KINDS),), _NEVER, jnp.int32),
        leaf_nonfinite=jnp.zeros((num_leaves,), jnp.int32),
        leaves=_tree.mark_leaves(params),
        norm=jnp.zeros((), norm_dtype),
        norm_limit=jnp.zeros((), norm_dtype),
        value=jnp.zeros((), jnp.float32),
        value_limit=jnp.zeros((), jnp.float32),
        detector=detector,
        inner_state=inner_state,
    )


def _count_leaves(state: SkipSpikesState, assessment: Assessment):
    """Counts the leaves that are not finite; some may have no gradient."""
    bad = ~jnp.isfinite(assessment.norms.leaves)
    places = places_of(state.leaves, assessment.leaves)
    if places is None:
        return count(state.leaf_nonfinite, bad)
    counts = state.leaf_nonfinite
    return counts.at[places].set(count(counts[places], bad))


def update_after_failed_probe(
    state: SkipSpikesState, assessment: Assessment
) -> SkipSpikesState:
    """The state after a failed probe, which is neither a taken nor a skipped step."""
    reading = assessment.reading
    bad = reading.kinds & reading.nonfinite
    return state._replace(
        step=increment(state.step),
        skipped=jnp.zeros((), bool),
        kind_total=count(state.kind_total, bad),
        kind_step=jnp.where(bad, state.step, state.kind_step),
        leaf_nonfinite=_count_leaves(state, assessment),
        norm=reading.norm.astype(state.norm.dtype),
        norm_limit=reading.norm_limit.astype(state.norm.dtype),
        value=reading.value,
        value_limit=reading.value_limit,
    )


def update_state(
    state: SkipSpikesState,
    assessment: Assessment,
    verdict: Verdict,
    bucket: Bucket,
    inner_state: Any,
) -> SkipSpikesState:
    """The state after a step; a skipped step is counted but not learned."""
    reading, skip = assessment.reading, verdict.skip
    credit = _next_credit(reading, verdict, state.credit, bucket)
    declined = reading.spike & ~reading.nonfinite & ~skip & ~verdict.accept
    learned = optax.tree.where(verdict.accept, assessment.rebased, assessment.learned)
    return SkipSpikesState(
        step=increment(state.step),
        skipped=skip,
        total=count(state.total, skip),
        consecutive=jnp.where(skip, increment(state.consecutive), 0),
        spikes_in_row=_next_row(reading, verdict, state.spikes_in_row),
        credit=credit,
        left=credit // bucket.price,
        declined_total=count(state.declined_total, declined),
        accepted_total=count(state.accepted_total, verdict.accept),
        last_step=jnp.where(skip, state.step, state.last_step),
        kind_total=count(state.kind_total, reading.kinds),
        kind_step=jnp.where(reading.kinds, state.step, state.kind_step),
        leaf_nonfinite=_count_leaves(state, assessment),
        leaves=state.leaves,
        norm=reading.norm.astype(state.norm.dtype),
        norm_limit=reading.norm_limit.astype(state.norm.dtype),
        value=reading.value,
        value_limit=reading.value_limit,
        detector=optax.tree.where(skip, state.detector, learned),
        inner_state=inner_state,
    )
