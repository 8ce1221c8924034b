"""Leaves out the steps that would do harm, and never more than it may.

*Problem*: one bad batch or one NaN undoes hours. Rules that skip what is unusual are
poisoned by the NaN they should stop, or skip for ever once the level has moved.

*Where in the chain*: outermost, around everything that learns from the gradient.

*Cost*: one norm, a few scalars, and a conditional around ``inner``; no buffer the size
of a parameter beside the gradient.

*Source*: the skip rules of OLMo-core, MaxText and Levanter, with bounds of our own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability import _tree, _validate, thresholds
from optax_stability._detection import (
    KINDS,
    Detector,
    DetectorState,
    Reading,
    check_threshold,
    loss_of,
)
from optax_stability._in_place import run_if
from optax_stability._numerics import increment, scale
from optax_stability.thresholds import Threshold

_FAR_ABOVE_THE_TREND = thresholds.detrended_mad(5.0, floor=5.0)
# A level is accepted only so far above its limit at once: what enters Adam's second
# moment stays there for long.
_MAX_RISE = 10.0
_NEVER = -1


class SkipSpikesState(NamedTuple):
    """State of :func:`skip_spikes`.

    Attributes:
      step: int32[] – calls of ``update``.
      skipped: bool[] – whether the last step was skipped.
      total: int32[] – steps skipped.
      consecutive: int32[] – steps skipped in a row, for whatever reason.
      spikes_in_row: int32[] – finite spikes skipped since a step was taken.
      credit: int32[] – skips of finite spikes saved up, in units of 1/``budget``.
      accepted_total: int32[] – finite spikes taken because the row was full.
      last_step: int32[] – last step skipped, counted from 0; −1 if none was.
      kind_total: int32[4] – steps found abnormal by NaN, Inf, norm, loss, skipped or
        not.
      kind_step: int32[4] – the last of each, counted from 0; −1 if there was none.
      norm: float32[] – last L2 norm of the gradient.
      norm_limit: float32[] – last limit of it, ∞ where none is set.
      value: float32[] – last loss, 0 if none was given.
      value_limit: float32[] – last limit of it, ∞ where none is set.
      detector: what the thresholds have learned.
      inner_state: state of ``inner``.
    """

    step: jax.Array
    skipped: jax.Array
    total: jax.Array
    consecutive: jax.Array
    spikes_in_row: jax.Array
    credit: jax.Array
    accepted_total: jax.Array
    last_step: jax.Array
    kind_total: jax.Array
    kind_step: jax.Array
    norm: jax.Array
    norm_limit: jax.Array
    value: jax.Array
    value_limit: jax.Array
    detector: DetectorState
    inner_state: Any

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``skip/…``: the last decision, what it rests on, and counts by kind."""
        by_kind = {}
        for i, kind in enumerate(KINDS):
            by_kind[f"skip/{kind}_total"] = self.kind_total[i]
            by_kind[f"skip/{kind}_last_step"] = self.kind_step[i]
        return {
            "skip/skipped": self.skipped,
            "skip/total": self.total,
            "skip/nonfinite_total": self.kind_total[0] + self.kind_total[1],
            "skip/accepted_total": self.accepted_total,
            "skip/consecutive": self.consecutive,
            "skip/last_step": self.last_step,
            "skip/norm": self.norm,
            "skip/norm_limit": self.norm_limit,
            "skip/value": self.value,
            "skip/value_limit": self.value_limit,
            **by_kind,
        }


class _Decision(NamedTuple):
    """What is done with a step: skipped, or taken, or taken as the new normal."""

    skip: jax.Array
    accept: jax.Array


def _decide(reading: Reading, state: SkipSpikesState, max_consecutive, budget):
    full = state.spikes_in_row >= max_consecutive
    affordable = state.credit >= budget
    return _Decision(
        skip=reading.nonfinite | (reading.spike & ~full & affordable),
        accept=reading.spike & full,
    )


def _next_credit(reading: Reading, decision: _Decision, credit, budget):
    """A skipped spike costs ``budget`` units, a normal step earns one."""
    spent = jnp.where(decision.skip & reading.spike, budget, 0)
    earned = jnp.where(reading.spike | reading.nonfinite, 0, 1)
    return jnp.minimum(credit - spent + earned, budget * budget)


def _next_row(reading: Reading, decision: _Decision, spikes_in_row):
    """A taken step ends the row; a non-finite one neither counts nor ends it."""
    row = jnp.where(decision.skip, spikes_in_row + 1, 0)
    return jnp.where(reading.nonfinite, spikes_in_row, row)


def _apply_unless(skip, inner_update, updates, inner_state):
    """``inner_update(updates, inner_state)``, or zeros and the old state if ``skip``.

    Where the update has the dtype of the gradient it takes over its buffer.
    """
    outputs, _ = jax.eval_shape(inner_update, updates, inner_state)

    def start(leaf, output):
        same = leaf.dtype == output.dtype
        return leaf if same else jnp.zeros_like(leaf, dtype=output.dtype)

    def step(carry):
        in_place, inner_state = carry

        def given(leaf, output):
            return output if leaf.dtype == output.dtype else leaf

        return inner_update(jax.tree.map(given, updates, in_place), inner_state)

    carry = jax.tree.map(start, updates, outputs), inner_state
    updates, inner_state = run_if(~skip, step, carry)

    def zero(leaf):
        return jnp.where(skip, jnp.zeros((), leaf.dtype), leaf)

    return jax.tree.map(zero, updates), inner_state


def _count(total, event):
    return jnp.where(event, increment(total), total)


def skip_spikes(
    inner: optax.GradientTransformation,
    *,
    grad_norm: Threshold | None = _FAR_ABOVE_THE_TREND,
    value: Threshold | None = None,
    confirm: Threshold | None = None,
    max_consecutive: int = 5,
    budget: int = 16,
    axis_name: _tree.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Leaves out steps whose gradient norm or loss is far above the recent past.

    A skipped step gives zero updates, and ``inner`` does not see it. For the setting we
    recommend, which watches the loss as well, see :func:`spike_guard`.

    **Rule**, n = ‖g‖₂ and l = the loss; limits from the steps before::

      non-finite  if n or l is NaN or Inf
      spike       if l > limit of value
                  or n > limit of grad_norm, and l > limit of confirm if that is given

      non-finite                                    skip
      spike, the max_consecutive before it skipped  step, and rebase the thresholds
      spike, no skip left in the bucket             step
      any other spike                               skip
      all else                                      step

    A step whose norm is above its limit is taken at the limit, g·limit/n. What is
    skipped is not learned. Rebasing takes the present loss for the new normal, and the
    present norm up to ten times its limit. The bucket holds ``budget`` skips at first
    and at most; a skipped spike takes one, a normal step gives 1/``budget`` back.

    **Guarantees**

    * A non-finite gradient never reaches ``inner``, nor a non-finite loss, at any step,
      however many there are. Such steps cost nothing from the bucket.
    * On a skipped step the state of ``inner`` is untouched, bit for bit.
    * On a normal step the gradient passes bit for bit.
    * Nothing freezes: of finite steps at most ``max_consecutive`` in a row are skipped,
      and of any T at most ``budget`` + T/(``budget`` + 1).
    * All devices decide alike.

    **Edge cases**

    * ``max_consecutive`` is a trade: the length of a corrupted stretch that is left out
      whole, and the delay after a lasting change of the data, both in steps. Beyond it,
      what is there is taken for the new normal. The bucket bounds what a *mixture*
      loses: every second batch of another kind 17 steps in all, alternating blocks of
      ten 35 (``python benchmarks/fault_table.py``). A kind rarer than one in
      ``budget`` + 1 is never learned.
    * Until the thresholds are armed only what they say in that time is a spike: see
      :func:`thresholds.detrended_mad`. A finite spike in the very first gradient has
      nothing to be compared with, and Adam's second moment remembers it: 1e30 would
      hold the update near 0 for thousands of steps. If that can happen, put
      ``clip_by_threshold(thresholds.constant(1.0))`` around or before.
    * A norm jump with a normal loss is for clipping: with ``confirm`` it is not
      skipped, but the step is shortened to the limit.
    * Inside ``optax.MultiSteps`` a NaN microbatch stays in its accumulator, and every
      later mean is skipped: put ``skip_spikes`` around it, or give
      ``should_skip_update_fn=optax.skip_not_finite`` as well.
    * Skipping does not cure a divergence: the parameters are bad by then. Rewind.
    * Reverse-mode differentiation does not pass (see ``_in_place``).

    Args:
      inner: what is protected: the whole chain from clipping to the learning rate.
      grad_norm: threshold on the L2 norm of the gradient; None watches non-finite
        values only.
      value: threshold on the loss, or None.
      confirm: lower threshold on the loss, above which a norm counts as a spike; None
        believes the norm alone.
      max_consecutive: finite spikes skipped in a row before one is taken, ≥ 1.
      budget: finite spikes that may be skipped before normal steps have to earn more,
        from 1 to 10,000.
      axis_name: under ``shard_map``, the mesh axes that shard gradient and batch: norms
        are summed, the loss is averaged over them. Leave it None under ``jit``.

    Returns:
      A transformation with state :class:`SkipSpikesState`. Its ``update`` takes the
      loss as the extra argument ``value=`` (or ``loss=``), which it needs if ``value``
      or ``confirm`` is given, and passes all extra arguments on. Metrics:
      ``skip/skipped`` (this step), ``skip/total``, ``skip/nonfinite_total``,
      ``skip/accepted_total`` (spikes taken for the new normal), ``skip/consecutive``,
      ``skip/last_step``, ``skip/norm``, ``skip/norm_limit``, ``skip/value``,
      ``skip/value_limit``; and ``skip/<kind>_total``, ``skip/<kind>_last_step`` with
      the kinds nan, inf, norm, value. Steps are counted from 0; −1 is never.

    Raises:
      TypeError: a threshold is not a ``Threshold``.
      ValueError: an argument is outside its range; at ``update``, the loss is needed
        and missing, or not a scalar.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones(2)}
      >>> tx = skip_spikes(optax.adam(0.1))
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([jnp.nan, 1.0])}, state, params)
      >>> print(updates["w"], state.metrics["skip/nan_total"])
      [0. 0.] 1

    References:
      ``SkipStepOptimizer`` of OLMo-core and its ports skip what is 6 deviations above a
      window's mean. Deviations: the threshold is a matter of its own; non-finite values
      are told apart and never learned; the two bounds on skipping.
    """
    for name, threshold in (
        ("grad_norm", grad_norm),
        ("value", value),
        ("confirm", confirm),
    ):
        check_threshold(name, threshold)
    _validate.check_count("max_consecutive", max_consecutive, 1, "5 is the default")
    _validate.check_count("budget", budget, 1, "16 is the default")
    _validate.check_interval("budget", budget, "[1, 10000]", "16 is the default")
    detector = Detector(grad_norm, value, confirm)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return SkipSpikesState(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), bool),
            total=jnp.zeros((), jnp.int32),
            consecutive=jnp.zeros((), jnp.int32),
            spikes_in_row=jnp.zeros((), jnp.int32),
            credit=jnp.full((), budget * budget, jnp.int32),
            accepted_total=jnp.zeros((), jnp.int32),
            last_step=jnp.full((), _NEVER, jnp.int32),
            kind_total=jnp.zeros((len(KINDS),), jnp.int32),
            kind_step=jnp.full((len(KINDS),), _NEVER, jnp.int32),
            norm=jnp.zeros((), jnp.float32),
            norm_limit=jnp.zeros((), jnp.float32),
            value=jnp.zeros((), jnp.float32),
            value_limit=jnp.zeros((), jnp.float32),
            detector=detector.init(),
            inner_state=inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        norm = _tree.global_norm(updates, axis_name)
        loss = loss_of(extra_args, needed=detector.needs_loss, axis_name=axis_name)
        reading, learned = detector.judge(norm, loss, state.detector)
        decision = _decide(reading, state, max_consecutive, budget)
        level = jnp.minimum(norm, _MAX_RISE * reading.norm_limit)
        rebased = detector.rebase(level, loss, state.detector)
        learned = optax.tree.where(decision.accept, rebased, learned)

        skip, row = decision.skip, state.spikes_in_row
        # In place and rarely: a factor of 1 would cost a pass over the gradient.
        factor = reading.norm_limit / norm
        updates = run_if(
            (norm > reading.norm_limit) & ~skip,
            lambda updates: jax.tree.map(lambda x: scale(x, factor), updates),
            updates,
        )
        updates, inner_state = _apply_unless(
            skip,
            lambda updates, state: inner.update(updates, state, params, **extra_args),
            updates,
            state.inner_state,
        )
        return updates, SkipSpikesState(
            step=increment(state.step),
            skipped=skip,
            total=_count(state.total, skip),
            consecutive=jnp.where(skip, increment(state.consecutive), 0),
            spikes_in_row=_next_row(reading, decision, row),
            credit=_next_credit(reading, decision, state.credit, budget),
            accepted_total=_count(state.accepted_total, decision.accept),
            last_step=jnp.where(skip, state.step, state.last_step),
            kind_total=_count(state.kind_total, reading.kinds),
            kind_step=jnp.where(reading.kinds, state.step, state.kind_step),
            norm=reading.norm,
            norm_limit=reading.norm_limit,
            value=reading.value,
            value_limit=reading.value_limit,
            detector=optax.tree.where(skip, state.detector, learned),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def spike_guard(
    inner: optax.GradientTransformation, **overrides: Any
) -> optax.GradientTransformationExtraArgs:
    """Skips what is abnormal by loss, or by norm and loss together: recommended.

    :func:`skip_spikes` with all three thresholds::

      grad_norm = detrended_mad(5.0, floor=5.0)             five times the trend
      value     = detrended_mad(7.0, floor=0.5, log=False)  half a nat above it
      confirm   = detrended_mad(4.0, floor=0.3, log=False)

    A norm alone cries wolf in the early descent and with small batches. Rules that
    compare with a window of raw losses miss everything there. Figures for both, over
    seeds, sizes and learning rates: ``python benchmarks/spike_detection.py``.

    Guarantees and edge cases are those of :func:`skip_spikes`.

    **Edge cases**: corruption is told from clean data by how surprising it is: within
    the first 30 or so steps, when the model knows nothing, random bytes are not. What
    stays within the spread of the batches is no spike. Batches of very few sequences
    from mixed sources do differ by more than the floor; expect a skip now and then.

    Args:
      inner: what is protected: the whole chain from clipping to the learning rate.
      overrides: any argument of :func:`skip_spikes`, such as ``max_consecutive=25``.

    Returns:
      A transformation with state :class:`SkipSpikesState`, whose ``update`` needs the
      loss as ``value=`` (or ``loss=``).

    Raises:
      TypeError: an override is no argument of :func:`skip_spikes`.
      ValueError: as :func:`skip_spikes`.

    Example:
      >>> import optax
      >>> from optax_stability import clip_by_zscore, safe_adamw
      >>> tx = spike_guard(optax.chain(clip_by_zscore(), safe_adamw(1e-3)))
    """
    settings: dict[str, Any] = {
        "value": thresholds.detrended_mad(7.0, floor=0.5, log=False),
        "confirm": thresholds.detrended_mad(4.0, floor=0.3, log=False),
    }
    return skip_spikes(inner, **settings | overrides)
