"""Skips the steps that would do harm, within a budget.

*Problem*: one bad batch or one NaN destroys hours of training. Rules that skip outliers
are corrupted by the NaN they should stop, or skip every step once the level has
changed.

*Where in the chain*: outermost, around everything that learns from the gradient.

*Cost*: one norm and a few scalars; no buffer of the size of a parameter besides the
gradient. On CPU a skipped step does not run ``inner``. On accelerators ``inner`` runs
on zeros then, and its results are discarded, element by element in the pass that
computes them: nothing is asked of the host, and the step moves as many bytes as one
without a guard.

*Source*: the skip rules of OLMo-core, MaxText and Levanter, with our own bounds.
"""

import optax

from optax_stability._core import _mesh_axes, _tree, _validate
from optax_stability._core._checked import checked
from optax_stability._core._in_place import apply_if, select_if
from optax_stability._core._numerics import real_dtype
from optax_stability._spikes import _guarded_step
from optax_stability._spikes._detection import (
    ABOVE_THE_SCATTER,
    FAR_ABOVE_THE_TREND,
    HALF_A_NAT_ABOVE,
)
from optax_stability._spikes._skip_state import (
    SkipSpikesState,
    decide,
    init_state,
    make_bucket,
    update_state,
)
from optax_stability.thresholds import Threshold

# A large norm alone is often no harm: on logs of real runs, rules on the norm skip
# clean steps by the dozen (benchmarks/real_logs.py).
_SHARE_WITHOUT_LOSS = 0.001


def skip_spikes(
    inner: optax.GradientTransformation,
    *,
    grad_norm: Threshold | None = FAR_ABOVE_THE_TREND,
    value: Threshold | None = None,
    confirm: Threshold | None = None,
    max_consecutive: int = 5,
    budget: int = 16,
    max_share: float | None = None,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose gradient norm or loss is far above the recent past.

    A skipped step gives zero updates, and ``inner`` does not see it. The recommended
    setting, which checks the loss as well, is :func:`spike_guard`.

    **Rule**, n = ‖g‖₂ and l = the loss; limits from earlier steps::

      non-finite  if n or l is NaN or Inf
      spike       if l > limit of value
                  or n > limit of grad_norm, and l > limit of confirm if that is given

      non-finite                                    skip
      spike after max_consecutive skipped spikes    step, and rebase the thresholds
      spike, no skip left in the bucket             step
      any other spike                               skip
      otherwise                                     step

    If a step with a norm above its limit is taken, the gradient is scaled to the limit,
    g·limit/n. Skipped steps are not learned. Rebasing takes the present loss as the new
    normal, and the present norm up to ten times its limit. The bucket starts full, with
    ``budget`` skips; a skipped spike takes one, a normal step gives 1/``budget`` back.

    **Guarantees**

    * A non-finite gradient or loss never reaches ``inner``, at any step, however many
      there are. Such steps take nothing from the bucket.
    * On a skipped step the state of ``inner`` is unchanged, bit for bit.
    * On a normal step the gradient reaches ``inner`` unchanged, bit for bit.
    * Training never freezes: of finite steps at most ``max_consecutive`` in a row are
      skipped, and of any T at most ``budget`` + T/(``budget`` + 1).
    * With ``max_share``, of the first T finite steps at most ``max_share``·T are
      skipped, for every T, and of any T in a row at most ``budget`` + ``max_share``·T:
      on any stream, whatever the data, the losses or the limits.
    * All devices make the same decision.

    **Edge cases**

    * ``max_consecutive`` is a trade-off: it is the length of a corrupted stretch that
      is skipped entirely, and the delay after a lasting change of the data, both in
      steps. After that, the present data are taken as the new normal. The bucket bounds
      the steps that a *mixture* loses: with every second batch of another kind 17 in
      all, with alternating blocks of ten 35 (``python benchmarks/fault_table.py``). A
      kind rarer than one in ``budget`` + 1 is never learned.
    * Until the thresholds are armed, their warm-up limits decide what is a spike: see
      :func:`thresholds.detrended_mad`. A finite spike in the very first gradient cannot
      be compared with anything, and stays in Adam's second moment: 1e30 would hold the
      update near 0 for thousands of steps. If that can happen, put
      ``clip_by_threshold(thresholds.constant(1.0))`` first in ``inner``. In front of
      the guard it would hide a NaN from it.
    * A jump of the norm with a normal loss is a case for clipping: with ``confirm`` the
      step is not skipped, but scaled to the limit.
    * ``max_share`` has its price. The first spike can be skipped after 1/``max_share``
      normal steps, 1,000 for a share of 0.001; earlier ones are taken, scaled to the
      limit of the norm. A long corruption is skipped as far as there are skips left
      (``skip/left``); ``skip/declined_total`` counts the spikes that were taken because
      there was none. It is for losses with a heavy tail, such as that of one microbatch
      of one device, where a few steps in a thousand look like spikes and are not.
      Figures: ``python benchmarks/real_logs.py``.
    * A NaN in a leaf that is never trained stops every step: the norm is that of all
      leaves. ``skip/nonfinite/per_leaf`` counts it, and with ``metrics(state,
      params=params)`` has its name. Keep such leaves out of the guard, not only out of
      the optimizer inside: ``optax.partition({"train": spike_guard(inner), "stop":
      optax.set_to_zero()}, labels)``, or ``optax.masked(spike_guard(inner), trained)``
      where their gradients are zeros.
    * A leaf without gradient (None) may be there at ``init``.
    * To accumulate gradients, put :func:`accumulate_moments` around: it averages the
      loss as well. ``optax.MultiSteps`` keeps a NaN microbatch in its accumulator, so
      that every later mean is skipped.
    * Skipping does not cure a divergence: the parameters are bad by then. Rewind.
    * Reverse mode passes: the derivative is that of the steps that are taken.

    Args:
      inner: transformation to protect: the whole chain from clipping to the learning
        rate.
      grad_norm: threshold on the L2 norm of the gradient; None sets no limit on finite
        norms.
      value: threshold on the loss, or None.
      confirm: lower threshold on the loss, above which a norm counts as a spike; with
        None the norm alone decides.
      max_consecutive: finite spikes skipped in a row before one is taken, ≥ 1.
      budget: finite spikes that may be skipped before normal steps have to earn more,
        from 1 to 10,000.
      max_share: largest share of finite steps that are skipped, from 1e-5 to 0.5. The
        bucket is empty at first, and a normal step gives ``max_share`` of a skip, in
        place of 1/``budget``. With None the bucket starts full.
      axis_name: under ``shard_map``, the mesh axes that shard gradient and batch: norms
        are summed, as in :func:`clip_by_threshold`, and the loss is averaged over them.
        Leave it None under ``jit``.

    Returns:
      A transformation with state :class:`SkipSpikesState`. Its ``update`` takes the
      loss as the extra argument ``value=`` (or ``loss=``), which it needs if ``value``
      or ``confirm`` is given, and passes all extra arguments on. Metrics:
      ``skip/skipped`` (this step), ``skip/total``, ``skip/nonfinite_total``,
      ``skip/accepted_total`` (spikes taken as the new normal), ``skip/declined_total``
      (spikes taken because no skip was left), ``skip/left``,
      ``skip/nonfinite/per_leaf`` (steps at which a leaf held a NaN or Inf),
      ``skip/consecutive``, ``skip/last_step``, ``skip/norm``, ``skip/norm_limit``,
      ``skip/value``, ``skip/value_limit``; and ``skip/<kind>_total``,
      ``skip/<kind>_last_step`` with the kinds nan, inf, norm, value. Steps are counted
      from 0; −1 means never.

    Raises:
      TypeError: ``inner`` is not a transformation, a threshold not a ``Threshold``.
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
      ``SkipStepOptimizer`` of OLMo-core and its ports skip steps 6 standard deviations
      above a window's mean. Deviations: the threshold is an argument; non-finite values
      are kept separate and never learned; the two bounds on skipping.
    """
    _validate.check_transformation("inner", inner)
    guard = _guarded_step.make_guard(
        grad_norm, value, confirm, max_consecutive, budget, axis_name
    )
    bucket = make_bucket(budget, max_share)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        dtype = real_dtype(_tree.pure(params))
        detector = guard.detector.init(dtype)
        return init_state(params, detector, inner.init(params), bucket, dtype)

    def update_fn(updates, state, params=None, **extra_args):
        assessment = _guarded_step.assess(guard, updates, state.detector, extra_args)
        verdict = decide(assessment.reading, state, max_consecutive, bucket)
        take = ~verdict.skip
        updates, step = _guarded_step.prepare_step(
            guard, inner, take, assessment, updates, params, extra_args
        )
        updates, _, inner_state = apply_if(
            take, step, updates, state.inner_state, select_if
        )
        return updates, update_state(state, assessment, verdict, bucket, inner_state)

    return checked("skip_spikes", SkipSpikesState, init_fn, update_fn)


def _no_thresholds_on_the_loss(value: Threshold | None, confirm: Threshold | None):
    """None and None, unless the user wants a threshold that could not work."""
    defaults = {"value": HALF_A_NAT_ABOVE, "confirm": ABOVE_THE_SCATTER}
    for name, given in (("value", value), ("confirm", confirm)):
        if given is not None and given is not defaults[name]:
            raise ValueError(
                f"{name}={given!r} is a threshold on the loss, and loss=False says "
                f"that there is none; leave out {name}, or leave out loss=False."
            )
    return None, None


def spike_guard(
    inner: optax.GradientTransformation,
    *,
    loss: bool = True,
    grad_norm: Threshold | None = FAR_ABOVE_THE_TREND,
    value: Threshold | None = HALF_A_NAT_ABOVE,
    confirm: Threshold | None = ABOVE_THE_SCATTER,
    max_consecutive: int = 5,
    budget: int = 16,
    max_share: float | None = None,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips steps with an abnormal loss, or norm and loss together: recommended.

    :func:`skip_spikes` with all three thresholds::

      grad_norm = detrended_mad(5.0, floor=5.0)             five times the trend
      value     = detrended_mad(7.0, floor=0.5, log=False)  half a nat above it
      confirm   = detrended_mad(4.0, floor=0.3, log=False)

    The norm alone gives false alarms in the early descent and with small batches. Rules
    that compare with a window of raw losses miss every spike there. Figures for both,
    over seeds, sizes and learning rates: ``python benchmarks/spike_detection.py``.

    With ``loss=False`` it watches norms alone, for trainers that call ``update``
    themselves and pass no loss::

      grad_norm = detrended_mad(5.0, floor=5.0)
      max_share = 0.001

    A finite norm above its limit is then scaled to the limit, as a clip would do, and
    every 1,000 normal steps earn one skip: a large norm alone is often no harm. NaN and
    Inf are skipped as ever, at any step.

    Guarantees and edge cases are those of :func:`skip_spikes`.

    **Edge cases**

    * Corruption is detected by its surprising loss. In the first 30 or so steps the
      model knows nothing, and random bytes do not surprise it. A change within the
      spread of the batches is no spike. Batches of very few sequences from mixed
      sources differ by more than the floor; expect a skip now and then.
    * ``loss=False`` does not see a batch whose gradient is of ordinary size. From step
      120 on it misses 28 % of the batches of random bytes, where the default misses 1;
      of those with half of the rows random 82 % (29), with 30 % of the bytes random all
      (37), of one byte repeated 3 % (20). Before step 60: 91, 99, 100 and 75 %. A
      gradient that explodes is always seen (``python benchmarks/spike_detection.py``).
      On logs of real runs it skips less than mean + 6σ of the norm
      (``python benchmarks/real_logs.py``).
    * Where the loss can be had without the trainer's help: :func:`with_loss_probe`.
    * Leaves that are not trained stay outside: ``optax.partition({"train":
      spike_guard(inner), "stop": optax.set_to_zero()}, labels)``.

    Args:
      inner: transformation to protect: the whole chain from clipping to the learning
        rate.
      loss: False if ``update`` is not given the loss. A loss that is given all the same
        is reported, and skipped if it is not finite.
      grad_norm: threshold on the L2 norm of the gradient; None sets no limit on finite
        norms.
      value: threshold on the loss, or None.
      confirm: lower threshold on the loss, above which a norm counts as a spike; with
        None the norm alone decides.
      max_consecutive: finite spikes skipped in a row before one is taken, ≥ 1.
      budget: finite spikes that may be skipped before normal steps have to earn more,
        from 1 to 10,000.
      max_share: largest share of finite steps that are skipped, as in
        :func:`skip_spikes`. None: no such bound with the loss, 0.001 without. Norms
        alone without it are ``skip_spikes(inner)``.
      axis_name: under ``shard_map``, as in :func:`skip_spikes`.

    Returns:
      A transformation with state :class:`SkipSpikesState`, whose ``update`` needs the
      loss as ``value=`` (or ``loss=``), unless ``loss`` is False.

    Raises:
      TypeError: as :func:`skip_spikes`; or ``loss`` is not True or False.
      ValueError: as :func:`skip_spikes`; or ``loss`` is False, and a threshold on the
        loss is given.

    Example:
      >>> import optax
      >>> from optax_stability import clip_by_zscore, safe_adamw
      >>> chain = optax.chain(clip_by_zscore(), safe_adamw(1e-3))
      >>> tx = spike_guard(chain)
      >>> without_loss = spike_guard(chain, loss=False)
    """
    if not isinstance(loss, bool):
        raise TypeError(
            f"loss={loss!r} must be True, if update is given the loss, or False; the "
            "loss itself is an argument of update."
        )
    if not loss:
        value, confirm = _no_thresholds_on_the_loss(value, confirm)
        max_share = _SHARE_WITHOUT_LOSS if max_share is None else max_share
    return skip_spikes(
        inner,
        grad_norm=grad_norm,
        value=value,
        confirm=confirm,
        max_consecutive=max_consecutive,
        budget=budget,
        max_share=max_share,
        axis_name=axis_name,
    )
