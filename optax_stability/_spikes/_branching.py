"""Goes on after a spike and can take it back: a rewind on the device.

*Problem*: what a skip rule leaves out when the data are corrupted it also leaves out
when they have changed for good. While it lasts the two look alike.

*Where in the chain*: outermost, around everything, the learning rate included.

*Cost*: that of ``skip_spikes``, and room for one copy of the parameters, which is
touched only when a branch begins, is probed or is dropped.

*Source*: ours.
"""

from typing import Literal, get_args

import optax

from optax_stability._core import _mesh_axes, _validate
from optax_stability._core._memory_space import Place
from optax_stability._spikes import _exchange, _guarded_step, _skip_state
from optax_stability._spikes._branch_state import (
    init_state,
    next_transition,
    update_state,
)
from optax_stability._spikes._detection import (
    ABOVE_THE_SCATTER,
    FAR_ABOVE_THE_TREND,
    HALF_A_NAT_ABOVE,
)
from optax_stability._spikes._skip_state import Verdict
from optax_stability.thresholds import Threshold
from optax_stability.thresholds._threshold import check_threshold

Keep = Literal["params", "all"]


def branch_on_spike(
    inner: optax.GradientTransformation,
    *,
    keep: Keep = "params",
    keep_in: Place = "device",
    max_length: int = 256,
    rollback_budget: int = 1,
    grad_norm: Threshold | None = FAR_ABOVE_THE_TREND,
    value: Threshold = HALF_A_NAT_ABOVE,
    confirm: Threshold | None = ABOVE_THE_SCATTER,
    max_consecutive: int = 5,
    budget: int = 16,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Goes on after a spike as a branch, and drops it if the old data come back.

    A rule that skips cannot tell corrupted batches from data that have changed for good
    while they last: what it survives of the one is what it loses of the other. Here the
    guess is made reversible. After one skipped step the parameters from before are kept
    aside and training goes on, as a branch. Now and then the kept ones are put back for
    one step. If *they* find the batch normal, the old data are back: the branch is
    dropped. If not, they change places again. No forward or backward pass is added.

    **Rule**, with spikes as in :func:`spike_guard`, a mode, and what is kept, O::

      normal  first spike                    skip
              spike after a skipped one      O ← parameters, detector; step and rebase;
                                             branch            (costs nothing yet)
              … with no rollback saved up    as skip_spikes
              all else                       step
      branch  as skip_spikes, but instead
              if max_length steps old        drop O; normal              (accepted)
              … and if there is reason to,   exchange with O after the step; probe
              or 16, 32, 64 … steps after
              the last time
      probe   normal for O's detector        step; normal                (rolled back)
              abnormal or non-finite         exchange with O; branch

    There is reason to ask O if the loss is within its limit, until that was in vain; or
    if loss or norm are above the branch's own, 2 steps after the last probe (4, 8, 16,
    32 as that was in vain). A probe in vain costs one step, that of its own batch, a
    rollback the steps of the branch. A normal step earns 1/60 of a rollback back, up to
    ``rollback_budget``.

    **Guarantees**

    * Those of :func:`skip_spikes`: nothing that is not finite reaches ``inner``, in
      any mode, and nothing freezes: of finite steps at most ``max_consecutive`` + 1 in
      a row leave the parameters alone.
    * While no step is abnormal, updates are those of :func:`spike_guard`, bit for bit.
    * A branch ends: after ``max_length`` steps it is the run.
    * An exchange restores a parameter to within half a spacing of the difference and
      half a spacing of itself, in the dtype of the updates; exactly if the two are
      within a factor of 2 of each other (Sterbenz) and updates are as wide. What was
      measured: ``python benchmarks/branching.py``.
    * All devices decide alike; what is kept is sharded as the parameters are.

    **Edge cases**

    * With ``keep="params"`` a rollback starts the first moment (``mu`` of Adam and its
      like, ``optax.trace``) at 0, and keeps the rest of the state: second moments from
      the branch, and counters, so that a schedule goes on. With ``keep="all"`` all of
      the state is as before the fault, counters and schedules too.
    * Every transformation around it sees the jump of an exchange as an update, and must
      leave it as it is: put the learning rate inside, and accumulate around.
    * The step after an exchange shows the loss of other parameters: leave rows with
      ``branch/probed`` out of curves and of early stopping.
    * While a branch is open the parameters in use may be learning from garbage:
      evaluate :func:`eval_params`. A checkpoint holds both.
    * A legitimate *excursion* that ends within ``max_length`` steps is unlearned, once
      in 60 steps at most; corruption that lasts longer is learned.
    * What is no spike opens no branch: see :func:`spike_guard`.
    * Reverse-mode differentiation does not pass.

    Args:
      inner: what is protected: the whole chain, the learning rate included.
      keep: ``"params"`` keeps a copy of the parameters; ``"all"`` of the state of
        ``inner`` as well, about three copies with Adam.
      keep_in: ``"host"`` puts the copy into the pinned memory of the host, where the
        backend has such; it is brought in when a branch begins, is probed or dropped.
      max_length: steps after which a branch is taken for the new normal, ≥ 2.
      rollback_budget: rollbacks before normal steps have to earn more, ≥ 1.
      grad_norm: threshold on the L2 norm of the gradient, or None.
      value: threshold on the loss; it also says what the kept parameters find normal.
      confirm: lower threshold on the loss, above which a norm counts as a spike, or
        None to believe the norm alone.
      max_consecutive: finite spikes skipped in a row where no branch can be opened.
      budget: finite spikes that may be skipped before normal steps have to earn more.
      axis_name: under ``shard_map``, as in :func:`skip_spikes`.

    Returns:
      A transformation with state :class:`BranchOnSpikeState`. Its ``update`` needs
      ``params`` and the loss as ``value=`` (or ``loss=``), and passes all extra
      arguments on. Metrics: those of :func:`skip_spikes`, and ``branch/mode`` (0
      normal, 1 branch, 2 the next step is a probe), ``branch/probed`` (this step was
      one), ``branch/length``, ``branch/rollbacks``, ``branch/probes``,
      ``branch/accepted``.

    Raises:
      TypeError: ``inner`` is not a transformation, a threshold not a ``Threshold``.
      ValueError: an argument is outside its range; at ``update``, ``params`` or the
        loss is missing, or the loss is not a scalar.

    Example:
      >>> import optax
      >>> from optax_stability import clip_by_zscore, safe_adamw
      >>> tx = branch_on_spike(optax.chain(clip_by_zscore(), safe_adamw(1e-3)))

    References:
      Ours; we know of no published optimizer that does this. Where it wins and where it
      loses, fault by fault: ``python benchmarks/stability.py --grid branch``.
    """
    _validate.check_transformation("inner", inner)
    _validate.check_choice("keep", keep, get_args(Keep))
    _validate.check_choice("keep_in", keep_in, get_args(Place))
    _validate.check_count("max_length", max_length, 2, "256 is the default")
    _validate.check_count("rollback_budget", rollback_budget, 1, "1 is the default")
    check_threshold("value", value)
    guard = _guarded_step.make_guard(
        grad_norm, value, confirm, max_consecutive, budget, axis_name
    )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        inner_state, detector = inner.init(params), guard.detector.init()
        kept_state = inner_state if keep == "all" else ()
        kept = _exchange.init_kept(params, detector, kept_state, keep_in)
        skip = _skip_state.init_state(guard.detector.init(), inner_state, budget)
        return init_state(kept, skip, rollback_budget)

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "branch_on_spike keeps the parameters; call tx.update(grads, state, "
                "params, value=loss)."
            )
        skip, kept = state.skip, state.kept
        assessment = _guarded_step.assess(guard, updates, skip.detector, extra_args)
        verdict = _skip_state.decide(assessment.reading, skip, max_consecutive, budget)
        transition, reasons = next_transition(
            state, assessment.reading, verdict, guard.detector, max_length
        )
        verdict = Verdict(
            skip=verdict.skip & ~transition.opens,
            accept=verdict.accept | transition.opens,
        )
        take = ~(verdict.skip | transition.fails)
        updates, step = _guarded_step.prepare_step(
            guard, inner, take, assessment, updates, params, extra_args
        )
        updates, inner_state, kept = _exchange.apply_transition(
            transition, take, step, updates, params, skip.inner_state, kept
        )
        counts = skip._replace(inner_state=())
        counts = optax.tree.where(
            transition.fails,
            _skip_state.update_after_failed_probe(counts, assessment.reading),
            _skip_state.update_state(counts, assessment, verdict, budget, ()),
        )
        counts, kept = _exchange.exchange_detectors(
            transition, skip.detector, counts, kept
        )
        return updates, update_state(
            state,
            transition,
            assessment.reading,
            reasons=reasons,
            rollback_budget=rollback_budget,
            kept=kept,
            skip=counts._replace(inner_state=inner_state),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
