"""The optimizer, which uses optax_stability, and one training step with it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import recipes
from config import Config
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from heads import fused_heads
from model import GPT, SIZES, next_token_loss
from shown import no_skips, shown_metrics

import optax_stability as ost
import optax_stability.flax as ost_flax
from optax_stability.faults import scale_by_surge, with_gradient_factor

Metrics = dict[str, jax.Array]

# Steps that the flight recorder keeps, and steps between the costly measurements.
HISTORY_LENGTH, MEASURE_EVERY = 1000, 10
# The usual limit of the global-norm clip, for plain optax.
MAX_NORM = 1.0


class TrainState(NamedTuple):
    """The state before and after a step, and in a checkpoint.

    Attributes:
      arrays: all arrays of the model and its optimizer.
      loss_scale: dynamic loss scale for float16; None otherwise.
    """

    arrays: nnx.State
    loss_scale: DynamicScale | None


def make_schedule(config: Config) -> optax.Schedule:
    """A linear warm-up to the peak, then a cosine decay to the floor."""
    peak, warmup = config.value("learning_rate"), int(config.value("warmup_steps"))
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=peak / max(1, warmup),  # 0 would waste the first step
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=config.steps,
        end_value=config.value("min_learning_rate"),
    )


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """The stability chain: measures the gradient, then skips it, or clips it and steps.

    The noise scale is inside the guard, so it learns only from steps that are taken.
    The parts have names, so that ``adopt_state`` finds them when another is added.
    """
    adamw = optax.adamw if config.baseline else ost.safe_adamw
    step = (recipes.muon if config.optimizer == "muon" else adamw)(
        make_schedule(config),
        b1=0.9,
        b2=0.95,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
    )
    if config.inject:
        step = optax.chain(step, scale_by_surge())
    if config.baseline:
        return optax.chain(optax.clip_by_global_norm(MAX_NORM), step)
    clip = ost.clip_by_zscore()
    if config.clip_after_warmup:
        clip = recipes.clip_after_warmup(clip, int(config.value("warmup_steps")))
    noise, level = ost.estimate_noise_scale(scope="global"), config.clip_when_noisy
    parts = [("noise", noise), ("clip", clip)]
    if level is not None:
        parts = [("clip", ost.when_noisy(clip, above=level, estimator=noise))]
    update = ost.record("update", ratio_to_params=True, every=MEASURE_EVERY)
    step = optax.named_chain(*parts, ("adamw", step), ("update", update))
    if config.on_spike != "rewind":
        on_spike = {"skip": ost.spike_guard, "branch": ost.branch_on_spike}
        step = on_spike[config.on_spike](step)
    histograms = config.histogram_every
    recorders = {
        "record": ost.record(
            "grad", every=histograms or MEASURE_EVERY, histogram=histograms > 0
        ),
        "params": ost.record("params", of="params", spectral=True, every=MEASURE_EVERY),
    }
    if not config.qk_norm:  # With it, the size of these weights does not matter.
        heads = functools.partial(fused_heads, heads=SIZES[config.size].heads)
        recorders["attention"] = ost.record_logit_bound(heads, every=MEASURE_EVERY)
    chain = optax.named_chain(*recorders.items(), ("step", step))
    return ost.record_history(chain, length=HISTORY_LENGTH, slow_every=MEASURE_EVERY)


def create(config: Config, vocabulary: int) -> tuple[GPT, nnx.Optimizer]:
    """A new model and its optimizer."""
    size = dataclasses.replace(SIZES[config.size], qk_norm=config.qk_norm)
    model = GPT(size, vocabulary, jnp.dtype(config.dtype), nnx.Rngs(config.seed))
    optimizer = nnx.Optimizer(model, make_optimizer(config), wrt=nnx.Param)
    return model, optimizer


def to_evaluate(config: Config, model: GPT, optimizer: nnx.Optimizer) -> GPT:
    """The model, with the parameters from before a spike while a branch is open."""
    if config.on_spike == "branch" and not config.baseline:
        params = nnx.state(model, optimizer.wrt)
        nnx.update(model, ost.eval_params(params, optimizer))
    return model


def start_loss_scale(config: Config) -> DynamicScale | None:
    """The initial loss scale for float16.

    The smallest number of float16 is 6e-8, and gradients are smaller.
    """
    if config.dtype != "float16":
        return None
    return DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(2**16))


def _loss_fn(config: Config, wrt: Any, gradient_factor: jax.Array | None):
    """The loss of a microbatch; an injected factor multiplies its gradient."""
    loss_fn = next_token_loss
    if config.gradient_penalty:
        loss_fn = ost_flax.penalize_gradient_norm(
            loss_fn, config.gradient_penalty, wrt=wrt
        )
    scaled = gradient_factor is not None
    return with_gradient_factor(loss_fn, gradient_factor) if scaled else loss_fn


def _measure(config: Config, model: GPT, optimizer: nnx.Optimizer, grads) -> Metrics:
    """The metrics of the optimizer; plain optax has only the norm and the limit."""
    if config.baseline:
        norm, limit = optax.tree.norm(grads), jnp.float32(MAX_NORM)
        return no_skips() | {"grad/norm": norm, "clip/limit": limit}
    return shown_metrics(optimizer.opt_state, nnx.state(model, optimizer.wrt))


def train_step(
    graphdef: Any,
    config: Config,
    state: TrainState,
    windows: jax.Array,
    factors: dict[str, jax.Array],
    look: bool | None = None,
) -> tuple[TrainState, Metrics]:
    """One training step, as a pure function of the state.

    Args:
      graphdef: the structure of the model and its optimizer.
      config: determines the loss and the optimizer.
      state: the state before the step.
      windows: int32[batch, context + 1].
      factors: factors of the injected faults, ``"gradient"`` and ``"surge"``; empty
        without faults.
      look: whether to take the costly measurements; None: every ``MEASURE_EVERY``.
    """
    model, optimizer = nnx.merge(graphdef, state.arrays)
    learning_rate = make_schedule(config)(optimizer.step[...])
    parts, scale = config.microbatches, state.loss_scale
    gradients = ost_flax.microbatch_gradients(
        _loss_fn(config, optimizer.wrt, factors.get("gradient")),
        parts,
        wrt=optimizer.wrt,
        vmap_size=1,
        reject_nonfinite=not config.baseline,
    )
    loss, grads, moments = gradients(
        model, windows, loss_scale=None if scale is None else scale.scale
    )
    surge = {"surge": factors["surge"]} if factors else {}
    optimizer.update(model, grads, value=loss, moments=moments, look=look, **surge)
    metrics = {
        "loss": loss,
        "learning_rate": learning_rate,
        "microbatches/rejected": parts - moments.num_microbatches,
    }
    if scale is not None:
        metrics["loss_scale"] = scale.scale
        scale = ost_flax.update_dynamic_scale(scale, moments.num_microbatches == parts)
    # The new state comes first, and in the order of the donated one: XLA reuses donated
    # buffers in order, and would have to copy in any other order.
    state = TrainState(nnx.state((model, optimizer)), scale)
    return state, metrics | _measure(config, model, optimizer, grads)
