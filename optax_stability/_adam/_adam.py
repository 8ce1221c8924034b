"""Adam that needs no ε: keeps √v instead of v and defines 0/0.

*Problem*: Adam's ε is compared with √v̂, whose size depends on loss scale, batch and
depth. Where ε dominates, layers stop learning and later move all at once (Molybog et
al. 2023); without it, g² underflows below |g| ≈ 1e-19 and m/√v is 0/0 or m/0. The state
here is r = √v, updated by a hypot that never forms g², so ε can be 0.

*Where in the chain*: in place of ``optax.scale_by_adam``, after clipping.

*Cost*: state 2× the parameters (m and r; both in float32 for parameters of 16 bits,
unless a dtype is given) and the same passes over memory as optax. One
reduction per leaf with ``update_rms_max``, else none; no collectives.

*Source*: Kingma & Ba, "Adam", 2015, arXiv:1412.6980, Algorithm 1.
"""

import functools
import math
import warnings
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_stability._adam._state import (
    SafeAdamState,
    bias_correction,
    mu_dtype_for,
    rms_dtype_for,
    update_bound,
)
from optax_stability._core import _numerics, _tree, _validate
from optax_stability._core._checked import checked
from optax_stability._moments import _moments
from optax_stability._moments._moments import Moments

EpsMode = Literal["add", "max", "atan2"]
SecondMoment = Literal["mean", "microbatch"]

# 1.27·atan2(m, m) ≈ 1 (4/π = 1.273): the same step as m/r where m = r.
_ATAN2_SLOPE = 1.27


def _root(x):
    """√x, in double precision where x is a plain number."""
    return math.sqrt(x) if _validate.is_concrete(x) else jnp.sqrt(x)


def _below_one(decay):
    """A decay in float32, below 1 even where a narrow dtype rounded it to 1."""
    decay = _validate.as_float32(decay)
    return decay if _validate.is_concrete(decay) else jnp.minimum(decay, 1 - 2.0**-24)


@jax.jit
def _limit_spikes(g, rms, limit):
    """Limits |g| to limit·r, except where r = 0: there is no past gradient yet."""
    rms = rms.astype(_real(g))
    known = (rms > 0) & jnp.isfinite(g)
    if _numerics.is_complex(g):
        return jnp.where(known, _numerics.clip_modulus(g, limit * rms), g)
    return jnp.where(known, jnp.clip(g, -limit * rms, limit * rms), g)


class _Decay(NamedTuple):
    """βᴷ, the weight of the past, and 1 − βᴷ, the weight of the new gradient."""

    kept: float | jax.Array
    learned: float | jax.Array


def _decay(beta, count, dtype) -> _Decay:
    if isinstance(count, int):
        return _Decay(beta, 1 - beta)
    learned = bias_correction(count, beta, dtype)
    return _Decay(1 - learned, learned)


@jax.jit
def _next_mu(g, mu, decay: _Decay):
    """Next mean: m ← β₁ᴷ·m + (1 − β₁ᴷ)·g, where g is finite."""
    old = mu.astype(g.dtype)
    kept, learned = (jnp.asarray(weight, _real(g)) for weight in decay)
    mean = _numerics.times(old, kept) + _numerics.times(g, learned)
    new = jnp.where(_numerics.is_finite(g), mean, old)
    return _numerics.saturating_cast(new, mu.dtype)


@jax.jit
def _next_rms(g, size, rms, roots: _Decay, step):
    """Next root: r ← hypot(√β₂ᴷ·r, √(1 − β₂ᴷ)·size), where g is finite."""
    old = rms.astype(_real(g))
    new = _numerics.hypot(roots.kept * old, roots.learned * jnp.abs(size))
    new = jnp.where(_numerics.is_finite(g), new, old)
    return _numerics.round_stochastically(new, step, rms.dtype)


def _next_mu_unit(unit, total, b1, decay: _Decay):
    """1 − Πβ₁; a constant β₁ needs no running product, whose rounding would add up."""
    if _validate.is_concrete(b1):
        return bias_correction(total, b1, unit.dtype)
    return decay.kept * unit + decay.learned


def _next_rms_unit(unit, total, b2, decay: _Decay):
    """√(1 − Πβ₂), likewise."""
    if _validate.is_concrete(b2):
        return jnp.sqrt(bias_correction(total, b2, unit.dtype))
    return _numerics.hypot(_root(decay.kept) * unit, _root(decay.learned))


def _divide(mu, rms, eps, bound, eps_mode: EpsMode):
    """The update from m and r on a common scale; 0/0 is 0."""
    if _numerics.is_complex(mu):
        # The rule for the moduli, with the phase of m.
        size = jnp.abs(mu)
        length = _divide(size, rms, eps, bound, eps_mode)
        phase = _numerics.by_component(lambda part: part / _nonzero(size), mu)
        return _numerics.times(phase, length)
    if eps_mode == "atan2":
        return _ATAN2_SLOPE * _numerics.angle(mu, rms)
    divisor = rms + eps if eps_mode == "add" else jnp.maximum(rms, eps)
    # Where r underflows, so does m·r_unit/m_unit ≤ B·r: the floor only replaces 0/0.
    return lax.clamp(-bound, _numerics.quotient(mu, divisor), bound)


def _rms_excess(size, rms, eps):
    """RMS of g/max(r, ε) over a leaf: how far this gradient exceeds the past ones."""
    divisor = jnp.maximum(rms, eps)
    usable = jnp.isfinite(size) & (divisor > 0)
    ratio = jnp.where(usable, size, 0.0) / jnp.where(usable, divisor, 1.0)
    return _numerics.root(jnp.mean(jnp.square(ratio)))


class _Scales(NamedTuple):
    """Numbers that all leaves share; m̂ and r̂ are used times rms_unit.

    Attributes:
      mu: rms_unit/mu_unit.
      rms: rms_unit.
      eps: ε·rms_unit.
      bound: greatest possible update.
      largest_rms: ``update_rms_max``.
    """

    mu: jax.Array
    rms: jax.Array
    eps: jax.Array
    bound: jax.Array
    largest_rms: float | jax.Array | None


@functools.partial(jax.jit, static_argnames="eps_mode")
def _direction(size, mu, rms, scales: _Scales, eps_mode: EpsMode):
    """The update of a leaf, limited to ``update_rms_max``."""
    rms = rms.astype(scales.rms.dtype)
    mu = _numerics.times(mu, scales.mu)
    u = _divide(mu, rms, scales.eps, scales.bound, eps_mode)
    if scales.largest_rms is None:
        return u
    excess = _rms_excess(size * scales.rms, rms, scales.eps) / scales.largest_rms
    return _numerics.by_component(lambda part: part / jnp.maximum(excess, 1.0), u)


def _real(x) -> Any:
    """The dtype of |x|."""
    return jnp.finfo(x.dtype).dtype


def _nonzero(x):
    return jnp.where(x > 0, x, 1.0)


def _check_decays(b1, b2):
    _validate.check_interval("b1", b1, "[0, 1)", "0.9 is usual")
    _validate.check_interval("b2", b2, "(0, 1)", "0.95 to 0.999 is usual")
    if _validate.is_concrete(b1) and _validate.is_concrete(b2) and b1 * b1 >= b2:
        warnings.warn(
            f"b1={b1!r} and b2={b2!r}: with b1² ≥ b2 Adam's update has no bound; raise "
            "b2 or lower b1.",
            stacklevel=3,
        )


def _check_eps(eps, eps_mode):
    _validate.check_choice("eps_mode", eps_mode, get_args(EpsMode))
    if callable(eps):
        return
    _validate.check_interval("eps", eps, "[0, inf)", "0 is safe here")
    if eps_mode == "atan2" and _validate.is_concrete(eps) and eps != 0:
        raise ValueError(f"eps={eps!r} has no effect in eps_mode='atan2'; leave it 0.")


def _check_limits(update_rms_max, spike_ratio):
    if update_rms_max is not None:
        _validate.check_interval(
            "update_rms_max", update_rms_max, "(0, inf)", "StableAdamW uses 1"
        )
    if spike_ratio is not None:
        _validate.check_interval(
            "spike_ratio", spike_ratio, "(0, inf)", "SPAM uses 5000"
        )


def _require_moments(moments: Moments | None) -> Moments:
    """Returns the moments, or raises an error that says how to get them."""
    if moments is None:
        raise ValueError(
            "second_moment='microbatch' needs moments=: put accumulate_moments around "
            "the optimizer, or pass the moments that microbatch_gradients(..., "
            "mean_square=True) returns: tx.update(grads, state, params, "
            "moments=moments)."
        )
    _moments.check_moments(moments)
    if moments.mean_square is None:
        raise ValueError(
            "second_moment='microbatch' needs moments.mean_square, which is None; make "
            "the moments with mean_square=True."
        )
    return moments


def scale_by_safe_adam(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array | optax.Schedule = 0.0,
    *,
    eps_mode: EpsMode = "add",
    second_moment: SecondMoment = "mean",
    update_rms_max: float | jax.Array | None = None,
    spike_ratio: float | jax.Array | None = None,
    mu_dtype: Any = None,
    rms_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with ε = 0 by default, safe for any scale of the gradient.

    **Rule**, per coordinate, g the gradient in float32 at least, r = √v::

      m ← β₁·m + (1 − β₁)·g            m̂ = m/(1 − β₁ᵗ)
      r ← hypot(√β₂·r, √(1 − β₂)·g)    r̂ = r/√(1 − β₂ᵗ)
      u = m̂/(r̂ + ε)                    eps_mode "add": Adam as published
      u = m̂/max(r̂, ε)                  eps_mode "max"
      u = 1.27·atan2(m̂, r̂)             eps_mode "atan2": no ε at all
      0/0 is 0, and |u| is limited to B = (1−β₁)/√((1−β₂)(1−β₁²/β₂)), or with atan2 to 2
      g complex: r from |g|, as in optax; |u| from |m̂| as above, with the phase of m̂

    With ``second_moment="microbatch"``, for the mean ḡ of K microbatch gradients mₖ of
    weight nₖ, N = Σnₖ, with both moments decaying per microbatch::

      m ← β₁ᴷ·m + (1 − β₁ᴷ)·ḡ                           m̂ = m/(1 − Πβ₁ᴷ)
      r ← hypot(√β₂ᴷ·r, √(1 − β₂ᴷ)·s),  s² = Σnₖ·mₖ²/N  r̂ = r/√(1 − Πβ₂ᴷ)

    While K and the weights are constant, that is v ← β₂ᴷ·v + (1 − β₂)·Σmₖ² after bias
    correction. It makes training, to first order in the learning rate, independent of
    how the same data are split into steps, if the learning rate grows with K
    (:func:`scale_learning_rate`). It has no other benefit: for quality the evidence is
    mixed (References).

    **Guarantees**

    * ε = 0: multiplying every gradient by 2ᵏ changes no bit of the update, as long as
      neither g nor √(1−β₂)·g leaves the normal numbers: 1e-36 < |g| < 1e36, or
      1e-306 < |g| < 1e306 for float64 parameters, whose moments have the digits of
      float64.
    * float16 and bfloat16 parameters are updated as float32 ones: m and r are float32.
    * A coordinate that has never had a gradient gets the update 0.
    * |u| ≤ B (7.27 at 0.9/0.999, 1.165 at 0.9/0.95) while the βs are constant and
      β₁² < β₂, up to rounding. Exact arithmetic never exceeds B; only rounding and
      underflow of narrow storage would, so the bound changes nothing else.
    * A non-finite gradient leaves m and r of its coordinate unchanged; the update is
      finite.
    * Bias correction accounts for β₁, β₂ and K that change from step to step.
    * With ``"microbatch"``: K = 1 is plain Adam, up to rounding; |u| ≤ B for every K;
      and a scaling of a whole leaf of ḡ, such as a clip by its norm or by the global
      norm, scales s as well. (A change of single entries of a leaf changes s only by
      the norm: clip single layers or entries in the microbatches, not in ḡ.)

    **Edge cases**: rms_dtype float16 stores nothing below 6e-8, which then acts like a
    floor under r. Below |g| = 1e-36 the moments underflow, and only |u| ≤ B still
    holds. ``optax.inject_hyperparams`` keeps β in the dtype of the parameters: if that
    is bfloat16, pass ``hyperparam_dtype=jnp.float32``, because 0.999 is 1 in bfloat16
    (taken here as the largest float32 below 1). Squares of microbatch gradients below
    1e-19 underflow, and those above 1e19 overflow: s is then |ḡ|, as in plain Adam, and
    scale invariance ends there. If all microbatches were rejected, the moments stay
    unchanged. ``optax.masked`` and ``optax.partition`` hide gradients but pass on all
    of ``moments=``; the moments of the remaining leaves are selected here.

    Args:
      b1: β₁, decay of the mean, in [0, 1).
      b2: β₂, decay of the mean square, in (0, 1).
      eps: ε ≥ 0, in the unit of the gradient, or a schedule of it, with steps counted
        from 0.
      eps_mode: ``"add"``, ``"max"`` or ``"atan2"``, see above.
      second_moment: ``"mean"`` – v from the square of the gradient, as in standard
        Adam; ``"microbatch"`` – v from the squares of the microbatch gradients, given
        as the extra argument ``moments=``.
      update_rms_max: per leaf, divide u by max(1, RMS(g/max(r̂, ε))/update_rms_max), as
        in StableAdamW, where it is 1; with "microbatch" s replaces g. None disables it.
        Under ``shard_map`` the RMS is that of the local shard.
      spike_ratio: per coordinate, limit g² to spike_ratio·v̂ of earlier steps, as in
        SPAM, where it is 5000. None disables it.
      mu_dtype: storage of m. None for the dtype of the parameter, but at least float32,
        that is 4 bytes for a parameter of 16 bits, where optax takes 2: in float16,
        m = (1 − β₁)·g underflows below g = 6e-7. ``jnp.bfloat16`` takes 2 bytes. A
        complex parameter has a complex m, complex64 at least.
      rms_dtype: storage of r, which is real. None for the dtype of |parameter|, but at
        least float32. bfloat16 and float16 are rounded stochastically, without a key,
        so that r decays correctly. ``optax.inject_hyperparams`` takes dtypes for
        schedules: name them in its ``static_args``.

    Returns:
      A transformation with state :class:`SafeAdamState` and metrics ``adam/update_rms``
      (of m̂/r̂; for independent gradients 0.229 at β₁ = 0.9 and K = 1),
      ``adam/correlation`` (ρ̂, lag-1 correlation of successive gradients, of equal
      weights and AR(1): with R = mean(u²), and c the R of independent ones,
      ρ̂ = (R−c)(1+c)/((R+c)(1−c)); at K = 1, c = (1−β₁)/(1+β₁) in the long run),
      ``adam/eps_share`` (mean of ε/(r̂+ε); 0.5 means ε = r̂) and ``adam/zero_fraction``
      (coordinates that never had a gradient), each also with ``/per_leaf``.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is outside its range; or, at ``update``, there are no
        ``moments=`` with a ``mean_square`` and ``second_moment`` is "microbatch".

    Warns:
      UserWarning: β₁² ≥ β₂, where the update has no bound.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_safe_adam()
      >>> grads = {"w": jnp.array([1e-30, -3.0, 0.0])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["w"].round(3))
      [ 1. -1.  0.]

    References:
      Kingma & Ba, "Adam", 2015, arXiv:1412.6980, Algorithm 1. Molybog et al., "A Theory
      on Adam Instability in Large-Scale Machine Learning", 2023, arXiv:2304.09871, §7
      (ε = 0 with 0/0 defined). Everett et al., 2024, arXiv:2407.05872 (atan2).
      Wortsman et al., 2023, arXiv:2304.13013 (StableAdamW; deviation: the RMS does not
      replace the clip before it). Huang et al., "SPAM", 2025, arXiv:2501.06842
      (deviations: v is bias-corrected, so the rule needs no warm-up; m and v are not
      reset). Wang & Aitchison, "Batch-size invariant Adam", 2024, arXiv:2402.18824
      (the mean of squares; deviation: βᴷ in place of 1 − K(1 − β), its first order).
      Against it: Roulet & Agarwala, 2025, arXiv:2510.00236, who find Adam best where
      the square of the mean dominates v.
    """
    _check_decays(b1, b2)
    _check_eps(eps, eps_mode)
    _check_limits(update_rms_max, spike_ratio)
    _validate.check_choice("second_moment", second_moment, get_args(SecondMoment))
    for name, dtype in (("mu_dtype", mu_dtype), ("rms_dtype", rms_dtype)):
        _validate.check_float_dtype(name, dtype, optional=True)
    b1, b2 = _below_one(b1), _below_one(b2)
    if spike_ratio is not None:
        spike_ratio = _validate.as_float32(spike_ratio)

    def init_fn(params):
        dtype = _numerics.real_dtype(_tree.pure(params))
        return SafeAdamState(
            step=jnp.zeros((), jnp.int32),
            microbatches=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(
                lambda p: jnp.zeros_like(p, dtype=mu_dtype_for(p, mu_dtype)), params
            ),
            rms=jax.tree.map(
                lambda p: jnp.zeros_like(p, dtype=rms_dtype_for(p, rms_dtype)), params
            ),
            mu_unit=jnp.zeros((), dtype),
            rms_unit=jnp.zeros((), dtype),
            noise=jnp.zeros((), dtype),
            b1=jnp.zeros((), dtype),
            b2=jnp.zeros((), dtype),
            eps=jnp.zeros((), dtype),
        )

    def update_fn(updates, state, params=None, *, moments=None, **extra_args):
        del params, extra_args
        dtype = state.mu_unit.dtype
        # All leaves with the scalars in one dtype, or in a wider one.
        grads = jax.tree.map(
            lambda g: g.astype(_numerics.promote(_numerics.wide_dtype(g), dtype)),
            updates,
        )
        count, sizes = 1, jax.tree.map(_numerics.size, grads)
        if second_moment == "microbatch":
            moments = _moments.visible(_require_moments(moments), updates)
            count, sizes = moments.num_microbatches, _moments.rms(moments, grads)
        if spike_ratio is not None:
            limit = _root(spike_ratio) / _nonzero(state.rms_unit)
            clip = functools.partial(_limit_spikes, limit=limit)
            grads = jax.tree.map(clip, grads, state.rms)
            sizes = jax.tree.map(clip, sizes, state.rms)
        decay1, decay2 = _decay(b1, count, dtype), _decay(b2, count, dtype)
        mu = jax.tree.map(lambda g, mu: _next_mu(g, mu, decay1), grads, state.mu)
        roots = _Decay(*map(_root, decay2))
        rms = jax.tree.map(
            lambda g, size, rms: _next_rms(g, size, rms, roots, state.step),
            grads,
            sizes,
            state.rms,
        )

        # m̂ = m/mu_unit and r̂ = r/rms_unit. Both are used times rms_unit, so that r is
        # used as stored.
        total = _numerics.increment(state.microbatches, count)
        mu_unit = _next_mu_unit(state.mu_unit, total, b1, decay1)
        rms_unit = _next_rms_unit(state.rms_unit, total, b2, decay2)
        share = jnp.maximum(count, 1).astype(dtype)
        noise = decay1.kept**2 * state.noise + decay1.learned**2 / share
        eps_now = jnp.asarray(eps(state.step) if callable(eps) else eps, dtype)
        b1_now, b2_now = jnp.asarray(b1, dtype), jnp.asarray(b2, dtype)
        bound = update_bound(b1_now, b2_now)

        scales = _Scales(
            mu=rms_unit / _nonzero(mu_unit),
            rms=rms_unit,
            eps=eps_now * rms_unit,
            bound=bound,
            largest_rms=update_rms_max,
        )
        direction = functools.partial(_direction, scales=scales, eps_mode=eps_mode)
        directions = jax.tree.map(direction, sizes, mu, rms)
        return _numerics.cast_like(directions, updates), SafeAdamState(
            step=_numerics.increment(state.step),
            microbatches=total,
            mu=mu,
            rms=rms,
            mu_unit=mu_unit,
            rms_unit=rms_unit,
            noise=noise,
            b1=b1_now,
            b2=b2_now,
            eps=eps_now,
        )

    return checked(
        "scale_by_safe_adam",
        SafeAdamState,
        init_fn,
        update_fn,
        stored=lambda state: state.mu,
        inexact=True,
    )
