"""How noisy the gradient is, from the microbatches behind it.

*Problem*: "is my batch too small, is this run getting noisier?" Every known estimate is
a ratio with a denominator close to 0, reported without an interval, and wrong where
microbatches count different numbers of tokens.

*Where in the chain*: first, before clipping, inside ``accumulate_moments`` and
``skip_spikes``: what they leave out never enters.

*Cost*: a few dozen scalars per leaf. No pass over the gradient: all comes from
:class:`Moments`. One reduction over the parameters, for the ratio to them.

*Source*: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018,
arXiv:1812.06162, App. A.1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _mesh_axes, _norms, _scopes, _tree, _validate
from optax_stability._moments import _moments
from optax_stability._moments._moments import Moments
from optax_stability._noise import _pairs
from optax_stability._noise._state import (
    EstimateNoiseScaleState,
    by_stream,
    init_state,
    update_streams,
)
from optax_stability._noise._statistics import Observed


def _needed(moments: Moments | None) -> Moments:
    """The moments, or an error that says where they come from."""
    if moments is None:
        raise ValueError(
            "estimate_noise_scale needs moments=: put accumulate_moments around it, or "
            "pass what microbatch_gradients returns, "
            "tx.update(grads, state, params, moments=moments)."
        )
    return moments


def _param_rms(params: Any, known, state: EstimateNoiseScaleState, axis_name):
    """Root mean square of the parameters in each stream, where they are known."""
    # Not by norms that are safe at any scale: their loop would copy the parameters.
    leaves = jax.tree.leaves(params)
    squares = [jnp.sum(jnp.square(p.astype(jnp.float32))) for p in leaves]
    squares = _mesh_axes.add_up(jnp.array(squares), leaves, axis_name)
    return jnp.sqrt(by_stream(jnp.where(known, squares, 0.0), state) / state.size)


def _squared_norms(moments: Moments, grads: Any, axis_name: _mesh_axes.AxisName):
    """‖ḡ‖² of each leaf, as it was when it was made."""
    norms = _norms.leaf_norms(grads) if moments.norm is None else moments.norm
    leaves = jax.tree.leaves(grads)
    return _mesh_axes.add_up(jnp.square(norms), leaves, axis_name)


def _observe(moments: Moments, squared_norms) -> Observed:
    """What the microbatches of one step say of each leaf."""
    k = moments.num_microbatches
    trace = moments.deviation / jnp.where(k > 1, k - 1, jnp.nan)
    return Observed(
        trace=trace,
        grad_sq=squared_norms - trace / moments.weight,
        weight=moments.weight,
    )


def _pair_up(state: EstimateNoiseScaleState, grads, moments: Moments, axis_name):
    """What a pair says, if there is only one microbatch, and the state after it.

    Averages of pairs give way to better ones.
    """
    better = moments.num_microbatches > 1
    averages = jax.tree.map(
        lambda x: jnp.where(better & state.biased, 0, x), state.averages
    )
    wanted = state.biased | ~jnp.any(averages.total > 0)
    alone = (moments.num_microbatches == 1) & wanted
    pairs, observed = _pairs.update_pairs(
        state.pairs, grads, jnp.where(alone, moments.weight, 0), axis_name
    )
    biased = jnp.where(better, False, state.biased | (observed.weight > 0))
    return (
        state._replace(averages=averages, pairs=pairs, biased=biased),
        observed,
        alone,
    )


def estimate_noise_scale(
    *,
    decay: float | jax.Array = 0.99,
    half_life: float | jax.Array | None = None,
    confidence: float | jax.Array = 0.95,
    scope: _scopes.Scope = "leaf",
    difference: bool = False,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Estimates the gradient noise scale, with an interval, and leaves updates alone.

    The simple noise scale is the batch at which noise and signal are equal in the
    squared gradient. Far below it a larger batch saves steps, far above it wastes
    examples: see :func:`batch_efficiency`, and its doubts.

    **Rule**, for the moments of K ≥ 2 microbatches of N examples (or tokens) in all, of
    one step, for each leaf, summed over the leaves of a stream::

      S  = deviation/(K − 1)     E S  = tr Σ, Σ the covariance of one example's gradient
      G² = ‖ḡ‖² − S/N            E G² = ‖G‖², G the true gradient

    Over steps both are averaged, with weights that decay, in memories of three lengths:
    of ``decay``, its third and its tenth power. Of these the longest is read that no
    shorter one contradicts (their intervals of 75 % meet), and::

      trace = mean S    grad_sq = mean G²    b_simple = trace/grad_sq

    ``low`` and ``high`` are the ends of Fieller's interval for that ratio, from the
    spread of S and G² over the steps. ``noise_to_weight`` is √(var_g/var_p), where
    var_g = trace·K/(N·d) is the mean variance of an entry of a microbatch gradient and
    var_p the mean square of a parameter, now.

    **Guarantees**

    * Updates pass bit for bit.
    * S and G² have no bias, whatever the weights of the microbatches are, and none of
      them is clamped: G² may be below 0.
    * The interval holds the true ratio with the stated confidence, for independent
      steps of one distribution: 93 to 98 % of those for 95 %. Where G² is not told from
      0 it has no upper end, and holds it more often.
    * A loss that is multiplied by a constant has the same noise scale.
    * What is not finite is not learned, nor a step of one microbatch or none.

    **Edge cases**

    * ``valid`` is False, and ``b_simple`` NaN, until three steps were seen and while
      the interval has no upper end. ``low`` is a lower bound then: the noise scale is
      at least that. ``trace`` and ``grad_sq`` are given all the same.
    * With one microbatch per step nothing is learned, unless ``difference``.
    * It says what was so over the last ``steps`` steps, not what is so in the last one,
      and the interval is that of the mean. A change is seen once a memory is sure of
      it; the shortest is of 20 steps by default. Where ‖G‖²
      falls faster than that, as in the first steps of a run, it is too low.
    * Examples of one batch must be independent. Tokens of one sequence are not: weigh
      by sequences, or take a figure in tokens for a lower bound.
    * Squares of norms have the range of float32: a norm above 1e18, or a whole gradient
      below 1e-19, is not seen. Of bfloat16 gradients the rounding is part of the noise:
      S/n up to 2⁻¹⁸ of ‖g‖² for a microbatch of n.
    * A clip in the chain before it changes nothing: the moments tell what ‖ḡ‖ was. What
      clips single microbatches changes what the noise is.
    * A leaf whose deviation is not known, NaN beside a finite norm, is left out of the
      sums.
    * Before anything was learned all but ``low``, ``high`` and ``valid`` is NaN.
    * 0/0 is NaN in ``noise_to_weight``, and x/0 is ∞ (zero-initialised parameters).

    Args:
      decay: weight of a step relative to the next, in [0, 1); the averages are as good
        as (1 + decay)/(1 − decay) steps at most, 199 by default. At 0.42 and
        below that is too few to be valid.
      half_life: in the unit of the moments, examples or tokens, takes the place of
        ``decay``: what is that far back weighs half. Stays right when the batch grows.
      confidence: of the interval, in (0, 1).
      scope: ``"leaf"`` – the whole gradient and every leaf; ``"global"`` – the whole
        only; or a callable from the tree to a tree (or tree prefix) of labels – the
        whole and every label, such as "norm" and "other". ``optax.inject_hyperparams``
        takes callables for schedules: name it in its ``static_args``.
      difference: while there is one microbatch per step, estimate from pairs of
        successive gradients. They are of different parameters: ``biased`` says so, and
        the first step with more microbatches begins anew. Costs one buffer.
      axis_name: under ``shard_map``, the mesh axes that shard the gradient, see
        :func:`clip_by_threshold`; moments of :func:`accumulate_moments` must be of the
        same. Leave it None under ``jit``.

    Returns:
      A transformation with state :class:`EstimateNoiseScaleState`; its ``update`` needs
      ``moments=``. Metrics ``noise_scale/…``: ``b_simple``, ``low``, ``high`` and
      ``trace`` in the unit of the weights, ``valid``, ``grad_sq``, ``noise_to_weight``,
      ``steps`` (of equal weight) and ``biased``; all but the last also ``…/per_leaf``
      unless the scope is global, with labels that of the label. To read them, see
      :func:`noise_scale`.

    Raises:
      TypeError: an argument is no number.
      ValueError: an argument is outside its range; or ``moments=`` are missing at
        ``update``.

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
      B_simple = 77.8 examples (95 %: 49–175), over 92 steps

    References:
      McCandlish et al., 2018, arXiv:1812.06162, App. A.1, with microbatches in the
      place of devices. Deviations: any number of microbatches of unequal weight; S from
      distances to the mean, which cancels no digits; averages of S and G² as published,
      but debiased by their weights; no clamp. Fieller, 1954, for the interval. Lepski,
      1990, for the memories.
      AdaptDL (Qiao et al., "Pollux", 2021, arXiv:2008.12260) for pairs; deviation: they
      do not overlap, so that steps are independent.
    """
    _validate.check_interval("decay", decay, "[0, 1)", "0.99 is the default")
    if half_life is not None:
        remedy = "give a number of examples, such as 100 batches"
        _validate.check_interval("half_life", half_life, "(0, inf)", remedy)
    _validate.check_interval("confidence", confidence, "(0, 1)", "0.95 is usual")
    if not callable(scope):
        _validate.check_choice("scope", scope, ("global", "leaf"))

    def init_fn(params):
        return init_state(_tree.pure(params), scope, confidence, difference=difference)

    def decay_of(weight):
        if half_life is None:
            return _validate.as_float32(decay)
        return 0.5 ** (weight / _validate.as_float32(half_life))

    def update_fn(updates, state, params=None, *, moments=None, **extra_args):
        del extra_args
        moments = _moments.visible(_needed(moments), updates)
        norms = _squared_norms(moments, updates, axis_name)
        observed = _observe(moments, norms)
        if difference:
            state, pair, alone = _pair_up(state, updates, moments, axis_name)
            observed = jax.tree.map(
                lambda of_pair, of_step: jnp.where(alone, of_pair, of_step),
                pair,
                observed,
            )
        # What is not finite as a whole is no leaf that one may leave out.
        known = ~jnp.isnan(moments.deviation) | ~jnp.isfinite(norms)
        sizes = _norms.leaf_sizes(updates, axis_name)
        state = update_streams(state, observed, known, sizes, decay_of(observed.weight))
        if params is not None:
            rms = _param_rms(_tree.pure(params), known, state, axis_name)
            state = state._replace(param_rms=rms)
        size = moments.weight / jnp.maximum(moments.num_microbatches, 1)
        return updates, state._replace(
            batch=jnp.where(size > 0, moments.weight, state.batch),
            microbatch=jnp.where(size > 0, size, state.microbatch),
            confidence=jnp.asarray(confidence, jnp.float32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
