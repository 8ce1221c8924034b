"""The published rules against spikes, written from their equations, as baselines.

*Problem*: a comparison is worth as much as its baselines. Each rule is as strong and
as weak here as published, NaN handling and order of operations included. Where a
trainer weakens its rule, the docstring says so and the stronger form is used.

*Where in the chain*: ``*_skip`` and ``lollcat_clip`` wrap an optimizer, ``zclip``,
``adagc`` and ``autoclip`` come before one, ``olmo_skip`` is an optimizer. The loss
comes as the extra argument ``value=``.

*Source*: named by each function. Statistics are float32; those of PyTorch rules that
live on the host as Python floats were float64.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# OLMo-core, MaxText and Levanter share these two.
WINDOW = 128
NUM_SIGMAS = 6.0


class WindowState(NamedTuple):
    """State of the rules that keep a window of losses and norms.

    Attributes:
      step: int32[] – calls of ``update``.
      losses: float32[128] – ring of the last losses.
      norms: float32[128] – ring of the last gradient norms.
      inner: state of the wrapped optimizer.
    """

    step: jax.Array
    losses: jax.Array
    norms: jax.Array
    inner: Any


def _start(inner_state: Any) -> WindowState:
    ring = jnp.zeros((WINDOW,), jnp.float32)
    return WindowState(jnp.zeros((), jnp.int32), ring, ring, inner_state)


def _enter(state: WindowState, loss, norm, inner_state) -> WindowState:
    """The window with the present values, whatever they are, over the oldest ones."""
    slot = state.step % WINDOW
    return WindowState(
        step=state.step + 1,
        losses=state.losses.at[slot].set(loss),
        norms=state.norms.at[slot].set(norm),
        inner=inner_state,
    )


def _mean_and_std(ring, seen, ddof: int):
    """Mean and deviation of the filled part of a ring."""
    count = jnp.clip(seen, 1, ring.size)
    filled = jnp.arange(ring.size) < count
    mean = jnp.sum(jnp.where(filled, ring, 0.0)) / count
    squares = jnp.sum(jnp.where(filled, (ring - mean) ** 2, 0.0))
    return mean, jnp.sqrt(squares / jnp.maximum(count - ddof, 1))


def _usual(x, ring, seen):
    """Whether x − mean ≤ 6·std, with the unbiased std; not so if any is NaN."""
    mean, std = _mean_and_std(ring, seen, 1)
    return x - mean <= NUM_SIGMAS * std


def maxtext_skip(inner: optax.GradientTransformation) -> Any:
    """MaxText: no update where loss or norm is above mean + 6·std of the last 128.

    Armed from the 64th step. Spikes and NaN enter the window. MaxText's trainer passes
    the norm *after* its fixed clip, which hides spikes; here it is the norm before.

    Source: ``skip_step_on_spikes`` (MaxText, 2026), after OLMo-core.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return _start(inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        loss, norm = extra_args["value"], optax.tree.norm(updates)
        usual = _usual(loss, state.losses, state.step)
        usual &= _usual(norm, state.norms, state.step)
        usual |= state.step + 1 < WINDOW // 2
        updates, new = inner.update(updates, state.inner, params, **extra_args)
        zeros = optax.tree.zeros_like(updates)
        updates, new = optax.tree.where(usual, (updates, new), (zeros, state.inner))
        return updates, _enter(state, loss, norm, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def levanter_skip(inner: optax.GradientTransformation) -> Any:
    """Levanter: MaxText's rule with a floor of 1e-6, but the update is multiplied by 0.

    The std is that of the population, armed once 64 steps are in the window. 0·NaN is
    NaN: a NaN update is emitted on the very step that is skipped.

    Source: ``SkipStepConfig`` (Levanter, 2025), after OLMo-core.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return _start(inner.init(params))

    def is_usual(x, ring, seen):
        mean, std = _mean_and_std(ring, seen, 0)
        return x <= mean + NUM_SIGMAS * jnp.maximum(std, 1e-6)

    def update_fn(updates, state, params=None, **extra_args):
        loss, norm = extra_args["value"], optax.tree.norm(updates)
        usual = is_usual(loss, state.losses, state.step)
        usual &= is_usual(norm, state.norms, state.step)
        usual |= state.step < WINDOW // 2
        updates, new = inner.update(updates, state.inner, params, **extra_args)
        updates = optax.tree.scale(jnp.where(usual, 1.0, 0.0), updates)
        new = optax.tree.where(usual, new, state.inner)
        return updates, _enter(state, loss, norm, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class OlmoState(NamedTuple):
    """State of :func:`olmo_skip`.

    Attributes:
      taken: float32[] – steps taken.
      mu: mean of the gradient.
      nu: mean of its square.
    """

    taken: jax.Array
    mu: Any
    nu: Any


def olmo_skip(learning_rate: float, *, max_norm: float, weight_decay: float) -> Any:
    """OLMo-core: AdamW in which a factor 1 or 0 multiplies everything that a step does.

    The factor follows MaxText's rule. It multiplies learning rate, weight decay, count
    and both moments: with a NaN gradient 0·NaN poisons the moments all the same. The
    trainer's fixed clip comes after the norm is taken.

    Source: ``SkipStepAdamW`` (OLMo-core, 2026).
    """
    b1, b2, eps = 0.9, 0.999, 1e-8

    def init_fn(params):
        zeros = optax.tree.zeros_like(params)
        return _start(OlmoState(jnp.zeros(()), zeros, zeros))

    def update_fn(updates, state, params=None, **extra_args):
        loss, norm = extra_args["value"], optax.tree.norm(updates)
        usual = _usual(loss, state.losses, state.step)
        usual &= _usual(norm, state.norms, state.step)
        usual |= state.step + 1 < WINDOW // 2
        factor = jnp.where(usual, 1.0, 0.0)
        grads = optax.tree.scale(_clip_factor(norm, max_norm), updates)
        adam = _factor_adam(grads, state.inner, factor, b1, b2)

        def leaf(m, v, p):
            m, v = m / (1 - b1**adam.taken), v / (1 - b2**adam.taken)
            return (
                -factor * learning_rate * (m / (jnp.sqrt(v) + eps) + weight_decay * p)
            )

        updates = jax.tree.map(leaf, adam.mu, adam.nu, params)
        return updates, _enter(state, loss, norm, adam)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _factor_adam(grads, state: OlmoState, factor, b1, b2) -> OlmoState:
    """The moments, moved by (1 − β)·factor of the way."""

    def mean(m, g):
        return m + factor * (1 - b1) * (g - m)

    def mean_square(v, g):
        return v * (1 - factor * (1 - b2)) + (1 - b2) * (factor * g * g)

    return OlmoState(
        taken=state.taken + factor,
        mu=jax.tree.map(mean, state.mu, grads),
        nu=jax.tree.map(mean_square, state.nu, grads),
    )


def _clip_factor(norm, limit, eps: float = 1e-6):
    """min(1, limit/(norm + ε)) as in PyTorch: NaN if the norm is."""
    return jnp.minimum(limit / (norm + eps), 1.0)


class AxlearnState(NamedTuple):
    """State of :func:`axlearn_skip`.

    Attributes:
      learned: int32[] – norms learned.
      mean: float32[] – mean of the norm.
      mean_square: float32[] – mean of its square.
      inner: state of the wrapped optimizer.
    """

    learned: jax.Array
    mean: jax.Array
    mean_square: jax.Array
    inner: Any


def axlearn_skip(inner: optax.GradientTransformation, limit: str = "mean") -> Any:
    """Axlearn: no update where the norm is at or above a limit from exponential means.

    The limit is 20·mean (``"mean"``), or mean + 20·std after 500 steps (``"std"``) with
    the variance as E[x²] − E[x]². Both means start at 1, with a decay that forgets this
    start at the first norm learned. What is skipped is never learned.

    Source: ``skip_and_clip_by_global_norm`` (axlearn, 2026), with the smallest of its
    default multipliers (20, 40, 100; all must hold) and its example decay of 0.99.
    """
    inner = optax.with_extra_args_support(inner)
    decay, factor, min_count = 0.99, 20.0, 500

    def init_fn(params):
        one = jnp.ones((), jnp.float32)
        return AxlearnState(jnp.zeros((), jnp.int32), one, one, inner.init(params))

    def limit_of(state):
        if limit == "mean":
            return factor * state.mean
        std = jnp.sqrt(state.mean_square - state.mean**2)
        return jnp.where(state.learned < min_count, 1e10, state.mean + factor * std)

    def update_fn(updates, state, params=None, **extra_args):
        norm = optax.tree.norm(updates)
        usual = (norm < limit_of(state)) & jnp.isfinite(norm)
        kept = decay * (1 - decay**state.learned) / (1 - decay ** (state.learned + 1))
        updates, new = inner.update(updates, state.inner, params, **extra_args)
        learned = AxlearnState(
            learned=state.learned + 1,
            mean=kept * state.mean + (1 - kept) * norm,
            mean_square=kept * state.mean_square + (1 - kept) * norm**2,
            inner=new,
        )
        zeros = optax.tree.zeros_like(updates)
        return optax.tree.where(usual, (updates, learned), (zeros, state))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class NormsState(NamedTuple):
    """State of the rules that keep norms only.

    Attributes:
      step: int32[] – calls of ``update``.
      norms: float32[n] – ring of the last norms, or all of them in order.
      inner: state of the wrapped optimizer, or None.
    """

    step: jax.Array
    norms: jax.Array
    inner: Any


def lollcat_clip(inner: optax.GradientTransformation) -> Any:
    """Lollcat: no update above 20 medians of the last 100 norms, clip at 5 of them.

    The window starts with 66 norms of 1e30 and 34 of NaN, which the median ignores, so
    that nothing is clipped for the first third. A norm that is not finite is skipped.

    Source: ``dynamic_update_ignore_and_grad_norm_clip`` (lollcat, 2023).
    """
    inner = optax.with_extra_args_support(inner)
    length, skip_above, clip_at = 100, 20.0, 5.0

    def init_fn(params):
        norms = jnp.where(jnp.arange(length) < length * 2 // 3, 1e30, jnp.nan)
        return NormsState(jnp.zeros((), jnp.int32), norms, inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        norm, median = optax.tree.norm(updates), jnp.nanmedian(state.norms)
        usual = (norm <= skip_above * median) & jnp.isfinite(norm)
        clip = optax.clip_by_global_norm(clip_at * median)
        updates, _ = clip.update(updates, optax.EmptyState())
        updates, new = inner.update(updates, state.inner, params, **extra_args)
        zeros = optax.tree.zeros_like(updates)
        updates, new = optax.tree.where(usual, (updates, new), (zeros, state.inner))
        norms = state.norms.at[state.step % length].set(norm)
        return updates, NormsState(state.step + 1, norms, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ZClipState(NamedTuple):
    """State of :func:`zclip`.

    Attributes:
      step: int32[] – calls of ``update``.
      first: float32[25] – norms of the warm-up.
      mean: float32[] – exponential mean μ of the norm.
      var: float32[] – exponential variance v.
    """

    step: jax.Array
    first: jax.Array
    mean: jax.Array
    var: jax.Array


def zclip(max_norm: float | None = 1.0) -> Any:
    """ZClip: clips a norm that is more than 2.5 deviations above its mean.

    With z = (g − μ)/(√v + 1e-6): z > 2.5 ⇒ T = μ + 2.5·√v/(z/2.5), and the gradient is
    clipped to min(T or g, ``max_norm``). Then μ learns x = T or g, and v learns
    (x − new μ)². For 25 steps only ``max_norm`` clips; then μ and v are the mean and
    the population variance of the norms so far.

    Source: Kumar et al., 2025, arXiv:2504.02507, in the order of the official code.
    """
    decay, z_max, eps, warmup = 0.97, 2.5, 1e-6, 25

    def init_fn(params):
        del params
        zero = jnp.zeros((), jnp.float32)
        return ZClipState(jnp.zeros((), jnp.int32), jnp.zeros((warmup,)), zero, zero)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        norm, std = optax.tree.norm(updates), jnp.sqrt(state.var)
        z = (norm - state.mean) / (std + eps)
        armed = state.step >= warmup
        limit = state.mean + z_max * std / (z / z_max)
        x = jnp.where(armed & (z > z_max), limit, norm)
        clip_at = x if max_norm is None else jnp.minimum(x, max_norm)
        factor = jnp.where(norm > clip_at, clip_at / (norm + eps), 1.0)
        mean = decay * state.mean + (1 - decay) * x
        var = decay * state.var + (1 - decay) * (x - mean) ** 2
        first = state.first.at[state.step].set(norm, mode="drop")
        state = ZClipState(
            step=state.step + 1,
            first=first,
            mean=jnp.where(armed, mean, jnp.mean(first)),
            var=jnp.where(armed, var, jnp.var(first)),
        )
        return optax.tree.scale(factor, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AdaGCState(NamedTuple):
    """State of :func:`adagc`.

    Attributes:
      step: int32[] – calls of ``update``.
      usual: float32[n_leaves] – usual norm of each leaf.
    """

    step: jax.Array
    usual: jax.Array


def adagc(warmup: int = 100) -> Any:
    """AdaGC: clips each leaf at 1.05 times the mean of its own clipped norms.

    Let s be the usual norm of a leaf. Before step ``warmup``, counted from 1, all
    leaves are clipped together, c = min(1/‖g‖, 1), and s is the smallest ‖c·gᵢ‖ so far.
    From then on cᵢ = min(1.05·s/‖gᵢ‖, 1) and s ← 0.98·s + 0.02·‖cᵢ·gᵢ‖. A leaf that
    sleeps through the warm-up has s = 0, and 0/0 at the first step after.

    Source: Wang et al., 2025, arXiv:2502.11034, Algorithm 1; constants, ε and what
    ``min`` does with NaN as in pytorch_optimizer.
    """
    decay, absolute, relative, eps = 0.98, 1.0, 1.05, 1e-8

    def init_fn(params):
        leaves = len(jax.tree.leaves(params))
        return AdaGCState(jnp.zeros((), jnp.int32), jnp.full((leaves,), jnp.inf))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        norms = jnp.stack([optax.tree.norm(leaf) for leaf in leaves])
        early = state.step + 1 < warmup
        together = _clip_factor(optax.tree.norm(updates), absolute, eps)
        factor = jnp.where(
            early, together, jnp.minimum(relative * state.usual / norms, 1.0)
        )
        clipped = factor * norms
        least = jnp.where(clipped < state.usual, clipped, state.usual)
        mean = decay * state.usual + (1 - decay) * clipped
        scaled = [leaf * c for leaf, c in zip(leaves, factor, strict=True)]
        usual = jnp.where(early, least, mean)
        return jax.tree.unflatten(treedef, scaled), AdaGCState(state.step + 1, usual)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def autoclip(percentile: float = 10.0, capacity: int = 1024) -> Any:
    """AutoClip: clips at a percentile of all norms so far, the present one included.

    The official code keeps an endless list. Here it is a sorted array, exact for
    ``capacity`` steps; from then on the largest norms are forgotten.

    Source: Seetharaman et al., 2020, arXiv:2007.14469.
    """

    def init_fn(params):
        del params
        norms = jnp.full((capacity,), jnp.inf, jnp.float32)
        return NormsState(jnp.zeros((), jnp.int32), norms, None)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        norm = optax.tree.norm(updates)
        norms = _insert(state.norms, norm)
        last = jnp.minimum(state.step, capacity - 1)
        limit = _percentile_of_first(norms, last, percentile)
        # One NaN in the list makes every percentile NaN.
        limit = jnp.where(jnp.isnan(norms).any(), jnp.nan, limit)
        factor = _clip_factor(norm, limit)
        return optax.tree.scale(factor, updates), NormsState(
            state.step + 1, norms, None
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _insert(ordered, x):
    """The ascending array with x put in its place, without its last entry."""
    index, place = jnp.arange(ordered.size), jnp.sum(ordered <= x)
    later = jnp.where(index == place, x, jnp.roll(ordered, 1))
    return jnp.where(index < place, ordered, later)


def _percentile_of_first(ordered, last, percentile: float):
    """Percentile of the entries 0 … last, between neighbours in proportion."""
    place = percentile / 100 * last
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, last)
    share = place - low
    between = (1 - share) * ordered[low] + share * ordered[high]
    return jnp.where(share > 0, between, ordered[low])
