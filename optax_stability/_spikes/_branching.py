"""Continues after a spike and can undo it: a rewind on the device.

*Problem*: a rule that skips corrupted data also skips data that have changed for good.
While the abnormal batches last, the two look alike.

*Where in the chain*: outermost, around everything, the learning rate included.

*Cost*: that of ``skip_spikes``, and memory for one copy of the parameters, which is
read or written only when a branch is opened, probed or dropped.

*Source*: ours.
"""

from typing import Literal, get_args

import jax
import optax

from optax_stability._core import _leaves, _mesh_axes, _states, _tree, _validate
from optax_stability._core._checked import checked
from optax_stability._core._memory_space import Place
from optax_stability._core._numerics import real_dtype
from optax_stability._spikes import _exchange, _guarded_step, _skip_state
from optax_stability._spikes._branch_state import (
    BranchOnSpikeState,
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
    max_share: float | None = None,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Continues on a branch after a spike, and drops it if the old data return.

    While abnormal batches arrive, a skip rule cannot tell corruption from data that
    have changed for good: what it gains on the first it loses on the second. Here the
    decision can be undone. After one skipped step, the parameters from before are saved
    as a snapshot and training continues on a branch. Now and then a probe puts the
    snapshot in use for one step. If the batch is normal *for the snapshot*, the old
    data are back: the branch is dropped. If not, the two are exchanged again. No
    forward or backward pass is added.

    **Rule**, with spikes as in :func:`spike_guard`, a mode, and the snapshot O::

      normal  first spike                    skip
              spike after a skipped one      O ← parameters, detector; step and rebase;
                                             branch            (costs nothing yet)
              … with no rollback saved up    as skip_spikes
              otherwise                      step
      branch  every step                     as skip_spikes, and then
              max_length steps old           drop O; normal              (accepted)
              else, with a reason to probe   exchange with O; probe
              or 16, 32, 64 … steps after
              the last probe
      probe   normal for O's detector        step; normal                (rolled back)
              abnormal or non-finite         exchange with O; branch

    There are two reasons to probe. A *familiar* loss, within the limit of O's detector,
    is a reason until such a probe has failed. A *surprise*, a loss or norm above the
    limit of the branch, is a reason from 2 steps after the last probe on (4, 8, 16, 32
    after failed ones). A failed probe costs one step, that of its own batch; a rollback
    costs the steps of the branch. A normal step earns 1/60 of a rollback, up to
    ``rollback_budget``.

    **Guarantees**

    * Those of :func:`skip_spikes`: nothing non-finite reaches ``inner``, in any mode,
      and training never freezes: of finite steps at most ``max_consecutive`` + 1 in a
      row leave the parameters unchanged.
    * While no step is abnormal, updates are those of :func:`spike_guard`, bit for bit.
    * A branch ends: after ``max_length`` steps it becomes the run.
    * An exchange restores a parameter to within half a unit in the last place (ulp) of
      the difference plus half an ulp of itself, in the dtype of the updates. It is
      exact if the two values are within a factor of 2 of each other (Sterbenz) and the
      dtype of the updates is as wide as theirs. Figures:
      ``python benchmarks/branching.py``.
    * All devices make the same decision; the snapshot is sharded as the parameters are.

    **Edge cases**

    * With ``keep="params"`` a rollback sets the first moment (``mu`` of Adam and
      similar states, ``optax.trace``) to 0 and leaves the rest of the state: second
      moments from the branch, and counters, so that a schedule continues. With
      ``keep="all"`` the whole state is as before the fault, counters and schedules too.
    * Every outer transformation sees an exchange as an update, and must not change it:
      put the learning rate inside, and accumulation outside.
    * Ignore rows where ``branch/probed`` is true, in curves and in early stopping: they
      were measured on the snapshot.
    * While a branch is open, the parameters in use may be learning from corrupted data:
      evaluate :func:`eval_params`. A checkpoint holds both copies.
    * A legitimate *excursion* that ends within ``max_length`` steps is undone; after
      ``rollback_budget`` of them at most once in 60 steps. Corruption that lasts longer
      is learned.
    * A change without a spike opens no branch: see :func:`spike_guard`.
    * Reverse mode passes: the derivative is that of the steps that are taken.

    Args:
      inner: transformation to protect: the whole chain, the learning rate included.
      keep: ``"params"`` saves a copy of the parameters; ``"all"`` also one of the state
        of ``inner``, about three copies with Adam.
      keep_in: ``"host"`` puts the copy into the pinned memory of the host, where the
        backend has it; it is transferred when a branch is opened, probed or dropped.
      max_length: steps after which a branch is accepted as the new normal, ≥ 2.
      rollback_budget: rollbacks before normal steps have to earn more, ≥ 1.
      grad_norm: threshold on the L2 norm of the gradient, or None.
      value: threshold on the loss; it also decides what is normal for the snapshot.
      confirm: lower threshold on the loss, above which a norm counts as a spike; with
        None the norm alone decides.
      max_consecutive: finite spikes skipped in a row where no branch can be opened.
      budget: finite spikes that may be skipped before normal steps have to earn more.
      max_share: largest share of finite steps that are skipped, as in
        :func:`skip_spikes`; failed probes are not skips.
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
    bucket = _skip_state.make_bucket(budget, max_share)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        dtype = real_dtype(_tree.pure(params))
        inner_state, detector = inner.init(params), guard.detector.init(dtype)
        saved_state = inner_state if keep == "all" else ()
        snapshot = _exchange.init_snapshot(params, detector, saved_state, keep_in)
        skip = _skip_state.init_state(
            params, guard.detector.init(dtype), inner_state, bucket, dtype
        )
        return init_state(snapshot, skip, rollback_budget)

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "params=None: branch_on_spike copies the parameters; call "
                "tx.update(grads, state, params, value=loss)."
            )
        skip, snapshot = state.skip, state.kept
        saves_all = len(jax.tree.leaves(snapshot.inner_state)) > 0
        has_any = len(jax.tree.leaves(skip.inner_state)) > 0
        if has_any and saves_all != (keep == "all"):
            raise _states.WrongStateError(
                f"branch_on_spike(keep={keep!r}) got a state of another keep=; give "
                "that one, or the state of tx.init(params)."
            )
        _leaves.check_leaves("branch_on_spike: params", snapshot.params, params)
        _leaves.check_params("branch_on_spike", params, updates)
        assessment = _guarded_step.assess(guard, updates, skip.detector, extra_args)
        verdict = _skip_state.decide(assessment.reading, skip, max_consecutive, bucket)
        transition, reasons = next_transition(
            state, assessment.reading, verdict, guard.detector, max_length
        )
        verdict = Verdict(
            skip=verdict.skip & ~transition.opens,
            accept=verdict.accept | transition.opens,
        )
        take = ~(verdict.skip | transition.probe_fails)
        updates, step = _guarded_step.prepare_step(
            guard, inner, take, assessment, updates, params, extra_args
        )
        updates, inner_state, snapshot = _exchange.apply_transition(
            transition, take, step, updates, params, skip.inner_state, snapshot
        )
        counts = skip._replace(inner_state=())
        counts = optax.tree.where(
            transition.probe_fails,
            _skip_state.update_after_failed_probe(counts, assessment),
            _skip_state.update_state(counts, assessment, verdict, bucket, ()),
        )
        counts, snapshot = _exchange.exchange_detectors(
            transition, skip.detector, counts, snapshot
        )
        return updates, update_state(
            state,
            transition,
            assessment.reading,
            reasons=reasons,
            rollback_budget=rollback_budget,
            snapshot=snapshot,
            skip=counts._replace(inner_state=inner_state),
        )

    return checked("branch_on_spike", BranchOnSpikeState, init_fn, update_fn)
