"""Estimates how noisy the gradient is, from its microbatches.

*Problem*: "is my batch too small, is this run getting noisier?" Every known estimate is
a ratio with a denominator close to 0, is reported without an interval, and is wrong
where microbatches have different numbers of tokens.

*Where in the chain*: first, before clipping, inside ``accumulate_moments`` and
``skip_spikes``: gradients that they leave out do not enter the estimate.

*Cost*: about thirty scalars per leaf. No pass over the gradient: the inputs are the
:class:`Moments`. One reduction over the parameters, for ``noise_to_weight``.

*Source*: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018,
arXiv:1812.06162, App. A.1.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import (
    _leaves,
    _mesh_axes,
    _norms,
    _numerics,
    _scopes,
    _tree,
    _validate,
)
from optax_stability._core._checked import checked
from optax_stability._core._leafwise import leafwise_sums
from optax_stability._core._look import is_due
from optax_stability._moments import _moments
from optax_stability._moments._moments import Moments
from optax_stability._noise import _pairs
from optax_stability._noise._drift import init_drift
from optax_stability._noise._state import (
    EstimateNoiseScaleState,
    init_state,
    stored_leaves,
    sum_by_stream,
    update_streams,
)
from optax_stability._noise._statistics import Observed, init_averages


def _require_moments(moments: Moments | None) -> Moments:
    """The moments; raises an error that names the remedy if there are none."""
    if moments is None:
        raise ValueError(
            "estimate_noise_scale needs moments=; wrap the chain in "
            "accumulate_moments, or pass the moments from microbatch_gradients: "
            "tx.update(grads, state, params, moments=moments)."
        )
    return moments


def _param_rms(params: Any, known, state: EstimateNoiseScaleState, axis_name):
    """Root mean square of the parameters of each stream, over the known leaves.

    It is −1 for a stream without known leaves.
    """
    # Not with the overflow-safe norms: their loop would copy the parameters.
    leaves = jax.tree.leaves(params)
    (squares,) = leafwise_sums(
        lambda p: (_numerics.abs_sq(_numerics.cast(p, jnp.float32)),),
        leaves,
        outputs=1,
    )
    squares = _mesh_axes.sum_shards(squares, leaves, axis_name)
    sums = sum_by_stream(jnp.where(known, squares, 0.0), state)
    measured = state.size > 0
    mean_squares = sums / jnp.where(measured, state.size, 1.0)
    return jnp.where(measured, jnp.sqrt(mean_squares), -1.0)


def _squared_norms(moments: Moments, grads: Any, axis_name: _mesh_axes.AxisName):
    """‖ḡ‖² of each leaf, before any clip if the moments contain the norm."""
    norms = _norms.leaf_norms(grads) if moments.norm is None else moments.norm
    norms = norms.astype(jnp.float32)
    leaves = jax.tree.leaves(grads)
    return _mesh_axes.sum_shards(jnp.square(norms), leaves, axis_name)


def _observe_signs(moments: Moments) -> Observed:
    """Σσᵢ and ΣGᵢ²/σᵢ of each leaf, of one step; ∞ with fewer than two microbatches."""
    if moments.l1 is None:
        raise ValueError(
            "estimate_noise_scale(norm='l1') needs moments.l1, which is None; compute "
            "the moments with microbatch_gradients(..., l1=True) or "
            "accumulate_moments(..., l1=True), or take norm='l2'."
        )
    k = moments.num_microbatches.astype(jnp.float32)
    several, earlier = k > 1, jnp.maximum(k - 1, 1)
    deviation, agreement = (x.astype(jnp.float32) for x in moments.l1)
    return Observed(
        trace=jnp.where(several, deviation / earlier, jnp.inf),
        grad_sq=jnp.where(several, 2 * agreement / (k * earlier), jnp.inf),
        weight=moments.weight,
        parts=k,
    )


def _observe(moments: Moments, squared_norms) -> Observed:
    """S and G² of each leaf, from one step; ±∞ with fewer than two microbatches."""
    k = moments.num_microbatches.astype(jnp.float32)
    deviation = moments.deviation.astype(jnp.float32)
    trace = deviation / jnp.maximum(k - 1, 1)
    trace = jnp.where(k > 1, trace, jnp.inf)
    weight = jnp.where(k > 1, moments.weight, 1.0)
    return Observed(
        trace=trace,
        grad_sq=squared_norms - trace / weight,
        weight=moments.weight,
        parts=k,
    )


def _observe_pair(state: EstimateNoiseScaleState, grads, moments: Moments, axis_name):
    """Updates the pairs; returns the state, the pair's S and G², and whether to use it.

    Pairs are used only with one microbatch per step and without unbiased averages. The
    first step with several microbatches resets averages that come from pairs.
    """
    several = moments.num_microbatches > 1
    streams = state.size.shape[0]
    averages, drift = jax.tree.map(
        lambda new, old: jnp.where(several & state.biased, new, old),
        (init_averages(streams), init_drift(streams)),
        (state.averages, state.drift),
    )
    only_pairs = state.biased | ~jnp.any(averages.total > 0)
    use_pair = (moments.num_microbatches == 1) & only_pairs
    pairs, observed = _pairs.update_pairs(
        state.pairs, grads, jnp.where(use_pair, moments.weight, 0), axis_name
    )
    biased = jnp.where(several, False, state.biased | (observed.weight > 0))
    return (
        state._replace(averages=averages, drift=drift, pairs=pairs, biased=biased),
        observed,
        use_pair,
    )


def estimate_noise_scale(
    *,
    norm: Literal["l2", "l1"] = "l2",
    decay: float | jax.Array = 0.99,
    half_life: float | jax.Array | None = None,
    confidence: float | jax.Array = 0.95,
    scope: _scopes.Scope = "leaf",
    difference: bool = False,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Estimates the gradient noise scale, with an interval; updates pass unchanged.

    The simple noise scale is the batch size at which noise and signal are equal in the
    squared gradient. Far below it a larger batch saves steps; far above it a larger
    batch wastes examples. See :func:`batch_efficiency` for the rule and its limits.

    **Rule**, for one step of K ≥ 2 microbatches with N examples (or tokens) in total,
    for each leaf, summed over each stream (the whole gradient, a leaf or a label)::

      S  = deviation/(K − 1)     E S  = tr Σ, Σ the covariance of one example's gradient
      G² = ‖ḡ‖² − S/N            E G² = ‖G‖², G the true gradient

    B_simple = tr Σ/‖G‖² is that of the model as it is now, from all steps so far. It is
    followed under four hypotheses: it is constant, or it changes slowly, fast or very
    fast. Each predicts the next G², and is believed as far as its predictions hold::

      constant   mean S/mean G², with weights that decay and are inverse to the trace,
                 and Fieller's interval from the spread of S and G² over the steps
      changing   a Kalman filter for ‖G‖²/tr Σ, with a variance that is learned from
                 the errors, and a log-normal interval
      b_simple, low, high   their mean, each weighted by what is believed of it
      trace      mean S over the averages' steps or the last ones (13 by default),
                 weighted likewise
      grad_sq    trace/b_simple

    The weights of a step depend on earlier steps only. ``noise_to_weight`` is
    √(var_g/var_p), where var_g = trace·K/(N·d) is the mean variance of the d entries of
    a microbatch gradient and var_p is the current mean square of a parameter, or with
    ``look=False`` (see :func:`record`) the last one that was measured.

    **Rule with** ``norm="l1"``, for updates that are nearly signs, such as Adam's: all
    batches make steps of one length, and a larger one makes them agree better with G.
    From the :class:`SignMoments` of a step, with σᵢ² the variance of one example's
    gradient in its entry i::

      S  = deviation/(K − 1)              E S  = Σσᵢ, for Gaussian noise
      G² = agreement/(K(K − 1)/2)         E G² = ΣGᵢ²/σᵢ, for small microbatches

    All else is as above: ``b_simple`` is B_l1 = Σσᵢ/Σ(Gᵢ²/σᵢ), corrected for
    microbatches that are not small beside it, ``trace`` is Σσᵢ and ``grad_sq``
    ΣGᵢ²/σᵢ; var_g is the square of the mean σᵢ of a microbatch gradient.

    **Guarantees**

    * Updates pass bit for bit.
    * S and G² are unbiased for any weights of the microbatches. Neither is clamped: G²
      may be negative.
    * The interval contains the true ratio with the stated confidence, for independent
      steps of one distribution: 93 to 98 % of the 95 % intervals do. Where G² cannot be
      distinguished from 0, the interval has no upper end and its coverage is higher. It
      is at most 10 % wider than that of the average alone.
    * After a tenfold change within 30 steps, it contains the new value within 30 steps.
    * One step decides nothing: a G² far from what is known moves the estimate little.
    * Multiplying the loss by a constant does not change the noise scale.
    * B_l1 is (‖σ‖₁/‖G‖₁)², for microbatches of every size, if |Gᵢ|/σᵢ is the same in
      all entries; else it is below that, and between both where it is smaller than a
      microbatch. ‖G‖₁ itself cannot be had from a few microbatches, in which |ḡᵢ| is
      nearly all noise; in G² the noises of different microbatches are multiplied, and
      their mean is 0.
    * Non-finite values do not enter the averages; neither do steps with fewer than two
      microbatches.

    **Edge cases**

    * ``valid`` is False and ``b_simple`` is 0 until three steps have been seen, and
      while the interval has no upper end. ``low`` is then a lower bound of the noise
      scale. ``trace`` and ``grad_sq`` are still reported.
    * With one microbatch per step there is no estimate, unless ``difference=True``.
    * While the noise scale changes, the interval is an approximation; on recorded runs
      of a small GPT, from the first steps on, nine tenths of the 95 % intervals
      contained the noise scale of that step (``benchmarks/noise_truth.py``).
      A change that is slow and steady is seen late: for some dozen steps at its start
      the interval may be too low. Of single leaves fewer intervals hold.
    * S that varies by a large factor from step to step while ‖G‖² stays is taken for a
      change; the interval is then wider than that of the average.
    * While it changes, it is that of a typical step: where a few steps have a far
      larger ‖G‖² than their neighbours, it is above the ratio of the means.
    * ``steps`` tells how much is known, not how old it is: so many steps of equal
      weight would say as much.
    * Examples of one batch must be independent. Tokens of one sequence are not: weight
      by sequences, or treat an estimate in tokens as a lower bound.
    * Squared norms have the range and the digits of float32, for parameters of every
      dtype: a norm above 1e18, or a global norm below 1e-19, is not measured. Complex
      entries count by |.|². The rounding of bfloat16 gradients is part of the noise:
      S/n up to 2⁻¹⁸ of ‖g‖² for a microbatch of n.
    * A clip earlier in the chain does not change the estimate: the moments contain ‖ḡ‖
      from before the clip. Clipping single microbatches changes the noise itself.
    * A leaf with unknown deviation (negative, or NaN with a finite norm) is left out of
      the sums.
    * No metric is NaN, so that ``jax.debug_nans`` stops at faults only: ``trace``,
      ``grad_sq`` and ``noise_to_weight`` are 0 while ``steps`` is 0, and
      ``noise_to_weight`` also without parameters. :func:`noise_scale` reads all of
      these as NaN.
    * 0/0 is 0 in ``noise_to_weight``, and x/0 is ∞ (zero-initialised parameters).

    Args:
      norm: ``"l2"``, or ``"l1"`` for sign-like updates; its moments are those of
        :func:`microbatch_gradients` or :func:`accumulate_moments` with ``l1=True``. In
        branches of Adam it predicted no better than ``"l2"`` which batch is worth its
        examples (``benchmarks/noise_norms.py``).
      decay: weight of a step relative to the next while nothing changes, in [0, 1);
        the averages are then worth at most (1 + decay)/(1 − decay) steps of equal
        weight, 199 by default. The smaller it is, the faster the changes that are
        expected. At 0.42 and below the steps are too few for a valid estimate.
      half_life: replaces ``decay``: a step that many examples or tokens (the unit of
        the moments) ago has half the weight. Stays correct when the batch grows.
      confidence: of the interval, in (0, 1).
      scope: ``"leaf"`` – the whole gradient and every leaf; ``"global"`` – the whole
        gradient only; or a callable from the tree to a tree (or tree prefix) of labels
        – the whole gradient and every label, such as "norm" and "other".
        ``optax.inject_hyperparams`` treats callables as schedules: add "scope" to its
        ``static_args``.
      difference: while there is one microbatch per step, estimate from pairs of
        successive gradients. They belong to different parameters: ``biased`` is then
        True. The first step with several microbatches resets the averages. Costs one
        buffer.
      axis_name: under ``shard_map``, the mesh axes that shard the gradient, see
        :func:`clip_by_threshold`; :func:`accumulate_moments` must have the same axes.
        Leave it None under ``jit``.

    Returns:
      A transformation with state :class:`EstimateNoiseScaleState`; its ``update`` needs
      ``moments=``. Metrics ``noise_scale/…``: ``b_simple``, ``low``, ``high`` and
      ``trace`` in the unit of the weights, ``valid``, ``grad_sq``, ``noise_to_weight``,
      ``steps`` (that the estimate is worth), ``biased`` and ``batch_size``. Unless the
      scope is global, all but the last two exist as ``…/per_leaf`` too; with labels,
      each leaf has the value of its label. To read them, see :func:`noise_scale`.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is outside its range; ``difference=True`` with
        ``norm="l1"``; or, at ``update``, ``moments=`` is missing, or its ``l1`` is.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_stability import microbatch_gradients, noise_scale
      >>> gradients = microbatch_gradients(lambda w, x: jnp.mean(w * x), 8)
      >>> tx = estimate_noise_scale()
      >>> @jax.jit
      ... def step(state, w, key):
      ...     x = 1 + 10 * jax.random.normal(key, (64,))
      ...     _, grads, moments = gradients(w, x)
      ...     return tx.update(grads, state, w, moments=moments)[1]
      >>> w = jnp.ones(())
      >>> state = tx.init(w)
      >>> for i in range(100):
      ...     state = step(state, w, jax.random.key(i))
      >>> noise_scale(state)
      B_simple now = 74.5 examples (95 %: 47.3–162), worth 92 steps

    References:
      McCandlish et al., 2018, arXiv:1812.06162, App. A.1, with microbatches in place of
      devices. Deviations: any number of microbatches of unequal weight; S from
      distances to the mean, which avoids cancellation; averages of S and G², debiased
      by their weights, only as long as nothing changes; no clamp. Fieller, 1954, for
      the interval. Magill, 1965, IEEE Trans. Autom. Control 10(4), for the hypotheses.
      AdaptDL (Qiao et al., "Pollux", 2021, arXiv:2008.12260) for pairs; deviation:
      pairs do not overlap, so that they are independent. Naganuma et al., "Adaptive
      Batch Sizes Using Non-Euclidean Gradient Noise Scales", 2026, arXiv:2602.03001,
      for the L1 norm; deviation: Σ(Gᵢ²/σᵢ) in place of ‖G‖₁², which they take from the
      noisy ḡ, see above.
    """
    _validate.check_interval("decay", decay, "[0, 1)", "0.99 is the default")
    if half_life is not None:
        remedy = "give a number of examples, such as 100 batches"
        _validate.check_interval("half_life", half_life, "(0, inf)", remedy)
    _validate.check_interval("confidence", confidence, "(0, 1)", "0.95 is usual")
    _validate.check_flags(difference=difference)
    _validate.check_choice("norm", norm, ("l2", "l1"))
    if difference and norm == "l1":
        raise ValueError(
            "difference=True compares two gradients, which norm='l1' cannot do; give "
            "two microbatches or more per step, or take norm='l2'."
        )
    _validate.check_axis_name("axis_name", axis_name)
    if not callable(scope):
        _validate.check_choice("scope", scope, ("global", "leaf"))

    def init_fn(params):
        return init_state(
            _tree.pure(params),
            scope,
            confidence,
            difference=difference,
            signs=norm == "l1",
        )

    def decay_for(weight):
        if half_life is None:
            return _validate.as_float32(decay)
        return 0.5 ** (weight / _validate.as_float32(half_life))

    def update_fn(updates, state, params=None, *, moments=None, **extra_args):
        moments = _moments.visible(_require_moments(moments), updates)
        norms = _squared_norms(moments, updates, axis_name)
        l2 = norm == "l2"
        observed = _observe(moments, norms) if l2 else _observe_signs(moments)
        if difference:
            state, pair, use_pair = _observe_pair(state, updates, moments, axis_name)
            observed = jax.tree.map(
                lambda of_pair, of_step: jnp.where(use_pair, of_pair, of_step),
                pair,
                observed,
            )
        # A leaf with a non-finite norm stays in, so that the step is rejected.
        known = (moments.deviation >= 0) | ~jnp.isfinite(norms)
        sizes = _norms.leaf_sizes(updates, axis_name)
        step_decay = decay_for(observed.weight)
        state = update_streams(state, observed, known, sizes, step_decay)
        if params is not None and is_due(extra_args, lambda: True) is not False:
            _leaves.check_params("estimate_noise_scale", params, updates)
            rms = _param_rms(_tree.pure(params), known, state, axis_name)
            state = state._replace(param_rms=rms)
        count = jnp.maximum(moments.num_microbatches, 1)
        size = moments.weight / count.astype(jnp.float32)
        return updates, state._replace(
            batch=jnp.where(size > 0, moments.weight, state.batch),
            microbatch=jnp.where(size > 0, size, state.microbatch),
            confidence=jnp.asarray(confidence, jnp.float32),
        )

    return checked(
        "estimate_noise_scale",
        EstimateNoiseScaleState,
        init_fn,
        update_fn,
        stored=stored_leaves,
    )
