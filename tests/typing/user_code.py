"""Typed code of a user, which uses every public name. None of it is run.

``test_typing.py`` has it checked by pyright, with the rules of ``pyrightconfig.json``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.dynamic_scale import DynamicScale

import optax_stability as ost
from optax_stability import faults as ost_faults
from optax_stability import flax as ost_flax
from optax_stability import loop as ost_loop
from optax_stability import orbax as ost_orbax
from optax_stability import tensorboard as ost_tensorboard
from optax_stability import thresholds
from optax_stability.thresholds import Threshold

Params = dict[str, jax.Array]
P = ParamSpec("P")
R = TypeVar("R")


class Batch(NamedTuple):
    """Inputs and targets, [examples, features] each."""

    x: jax.Array
    y: jax.Array


def jit(fn: Callable[P, R]) -> Callable[P, R]:
    """``jax.jit``, whose own annotations lose the types of what it compiles."""
    return jax.jit(fn)


# --- Chains -----------------------------------------------------------------------


def norm_thresholds(limit: float) -> dict[str, Threshold]:
    """Thresholds on the norm of the gradient, by where they come from."""
    return {
        "fixed": thresholds.constant(limit),
        "ZClip": thresholds.relearn(thresholds.zscore(2.5, mode="max"), after=25),
        "AdaGC": thresholds.ema_ratio(1.05, warmup=100),
        "OLMo": thresholds.window_zscore(6.0, window=128),
        "AutoClip": thresholds.window_quantile(0.9),
        "icefall": thresholds.window_median(3.0),
        "even": thresholds.at_most_median(thresholds.zscore(), window=16),
        "trend": thresholds.detrended_mad(5.0, floor=5.0),
    }


def twice_the_last() -> Threshold:
    """A threshold written by the user: its limit is twice the last value."""

    def init() -> jax.Array:
        return jnp.array(jnp.inf)

    def update(x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return 2 * state, jnp.where(jnp.isfinite(x), x, state)

    def rebase(x: jax.Array, state: jax.Array) -> jax.Array:
        del state
        return x

    return Threshold(init, update, rebase)


def matrices(params: optax.Params) -> Any:
    """Which parameters are matrices: they decay, and are clipped together."""

    def is_matrix(leaf: jax.Array) -> bool:
        return leaf.ndim >= 2

    return jax.tree.map(is_matrix, params)


def recommended_chain(steps: int) -> optax.GradientTransformationExtraArgs:
    """The chain of the README."""
    rate = optax.schedules.warmup_cosine_decay_schedule(0.0, 3e-4, 100, steps)
    adamw = ost.safe_adamw(rate, b2=0.95, weight_decay=0.1, mask=matrices)
    clipped = optax.chain(ost.clip_by_zscore(mode="adaptive"), adamw)
    chain = optax.chain(
        ost.record("grad", histogram=True, every=10),
        ost.spike_guard(clipped, max_consecutive=5, budget=16),
        ost.record("params", of="params", spectral=True),
    )
    return ost.record_history(chain, length=1000, slow_every=50)


def misplaced(tx: optax.GradientTransformation, params: Params) -> str:
    """What stands where it cannot work, one line each."""
    faults: list[str] = ost.check(tx, params)
    return "\n".join(faults)


def attention_heads(params: Params) -> dict[str, ost.AttentionHeads]:
    """Queries and keys of one layer."""
    query, key = params["query"].reshape(8, 2, 4), params["key"].reshape(8, 1, 4)
    return {"block": ost.AttentionHeads(query, key, scale=params["scale"])}


def largest_bound(params: Params) -> jax.Array:
    """The largest bound on the logits of a head."""
    query, key, scale, *_ = attention_heads(params)["block"]
    return ost.attention_logit_bound(query, key, scale=scale, rotary=True).max()


def chain_with_attention() -> optax.GradientTransformationExtraArgs:
    """The bound of each head, its logits, and a brake on them."""
    braked = ost.clip_attention_logits(
        optax.adamw(1e-3), 100.0, heads_of=attention_heads, measured="attention_logits"
    )
    return optax.chain(
        ost.record_logit_bound(attention_heads, every=10),
        ost.record_extra("attention_logits", like={"block": np.zeros(2)}),
        ost.spike_guard(braked),
    )


def chain_in_parts(per_layer: bool) -> optax.GradientTransformationExtraArgs:
    """A chain of single parts, with a threshold and groups of the user."""
    adam = ost.scale_by_safe_adam(eps_mode="atan2", rms_dtype=jnp.bfloat16)
    on_spike = twice_the_last()
    inner = optax.named_chain(
        ("embedding", ost.scale_gradients({"embed": 0.1})),
        ("fixed", ost.clip_by_threshold(thresholds.constant(1.0), scope="global")),
        ("groups", ost.clip_by_quantile(0.9, scope=matrices)),
        ("leaves", ost.clip_by_leaf_history() if per_layer else optax.identity()),
        ("adam", ost.restart_moments(adam, on_spike=on_spike, warmup=10)),
        ("rate", optax.scale_by_learning_rate(1e-3)),
    )
    normal = norm_thresholds(1.0)
    return ost.skip_spikes(inner, grad_norm=normal["trend"], value=normal["OLMo"])


def branching_chain() -> optax.GradientTransformationExtraArgs:
    """Goes on after a spike as a branch, and can drop the branch."""
    return ost.branch_on_spike(ost.safe_adamw(1e-3), keep="all", keep_in="host")


def noise_chain(batch_size: int) -> optax.GradientTransformationExtraArgs:
    """Clips while it is noisy; the learning rate falls with the noise."""
    noise = ost.estimate_noise_scale(norm="l2", scope="leaf", difference=True)
    clip = ost.clip_by_threshold(thresholds.constant(1.0))
    return optax.chain(
        ost.when_noisy(
            clip, above=2.0, below=1.0, measure="noise_to_weight", estimator=noise
        ),
        optax.sgd(0.1),
        ost.scale_by_noise_scale(batch_size, max_scale=2.0),
    )


def accumulating_chain() -> optax.GradientTransformationExtraArgs:
    """A batch that grows with the noise scale, for an Adam that does not see it."""
    rate: float = ost.scale_learning_rate(1e-3, 8, "sqrt")
    adam = ost.scale_by_safe_adam(second_moment="microbatch")
    inner = optax.chain(
        ost.estimate_noise_scale(), adam, optax.scale_by_learning_rate(rate)
    )
    every_k: ost.BatchSizeSchedule = ost.batch_size_schedule(max_k=64)
    return ost.accumulate_moments(inner, every_k)


def noise_of_signs(moments: ost.Moments) -> jax.Array:
    """The noise in the L1 norm of one step."""
    signs: ost.SignMoments = moments.l1
    return jnp.sum(signs.deviation) / (moments.num_microbatches - 1)


def sign_chain(params: Params, batch: Batch) -> ost.NoiseScale:
    """The noise scale of sign-like updates."""
    gradients = ost.microbatch_gradients(loss_fn, 8, l1=True)
    tx = ost.accumulate_moments(ost.estimate_noise_scale(norm="l1"), 2, l1=True)
    _, grads, moments = gradients(params, batch)
    return ost.noise_scale(tx.update(grads, tx.init(params), moments=moments)[1])


def rate_for_growing_batches(rate: optax.Schedule) -> optax.Schedule:
    """A schedule for the learning rate, and one for the microbatches."""

    def microbatches(step: jax.typing.ArrayLike) -> jax.Array:
        return jnp.where(jnp.asarray(step) < 1000, 8, 32)

    return ost.scale_learning_rate(rate, microbatches)


# --- Training: JAX alone ----------------------------------------------------------


def loss_fn(params: Params, batch: Batch) -> jax.Array:
    """Mean squared error."""
    return jnp.mean((batch.x @ params["w"] + params["b"] - batch.y) ** 2)


def loss_and_predictions(
    params: Params, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, with the predictions as its aux."""
    predictions = batch.x @ params["w"] + params["b"]
    return jnp.mean((predictions - batch.y) ** 2), {"predictions": predictions}


def num_examples(batch: Batch) -> jax.Array:
    """Examples without padding."""
    return jnp.sum(jnp.any(batch.x != 0, axis=-1))


def train(params: Params, batches: list[Batch]) -> list[dict[str, float]]:
    """Trains, and logs every tenth step."""
    tx = recommended_chain(len(batches))
    gradients = ost.microbatch_gradients(
        ost.penalize_gradient_norm(loss_fn, 0.1), 8, vmap_size=2, weight_fn=num_examples
    )

    @jit
    def step(
        params: Params, state: optax.OptState, batch: Batch
    ) -> tuple[Params, optax.OptState]:
        loss, grads, moments = gradients(params, batch)
        updates, state = tx.update(grads, state, params, value=loss, moments=moments)
        return jax.tree.map(jnp.add, params, updates), state

    state, log = tx.init(params), list[dict[str, float]]()
    for i, batch in enumerate(batches):
        params, state = step(params, state, batch)
        if i % 10 == 0:
            metrics = ost.metrics(state, params=params)
            log.append({key: float(x) for key, x in metrics.items() if x.ndim == 0})
    return log


def evaluate(params: Params, batch: Batch) -> tuple[float, jax.Array, jax.Array]:
    """Loss, predictions, and how far the signal is above the noise."""
    gradients = ost.microbatch_gradients(loss_and_predictions, 8, has_aux=True)
    (loss, aux), grads, moments = gradients(params, batch, loss_scale=2.0**15)
    return float(loss), aux["predictions"], signal_to_noise(grads, moments)


def signal_to_noise(grads: Params, moments: ost.Moments) -> jax.Array:
    """The squared norm of the gradient, relative to its variance."""
    variance = jnp.sum(moments.deviation) / moments.weight
    return sum((jnp.sum(g**2) for g in grads.values()), jnp.zeros(())) / variance


def last_window(
    inner: optax.GradientTransformation, state: ost.AccumulateMomentsState
) -> tuple[optax.Updates, jax.Array]:
    """Takes the step of a window that is not full."""
    if not ost.has_updated(state):
        updates, state = ost.flush(inner, state)
        return updates, state.gradient_step
    return state.acc_grads, state.gradient_step


# --- Training: Flax ---------------------------------------------------------------


class Model(nnx.Module):
    """Embeds, transforms, and predicts with the matrix of the embedding."""

    loss_probe: nnx.Param[jax.Array]  # Set where a trainer passes no loss.

    def __init__(self, vocabulary: int, width: int, rngs: nnx.Rngs):
        self.embed = ost_flax.Embed(vocabulary, width, rngs=rngs)
        self.norm_in = ost_flax.LayerNorm(width, rngs=rngs)
        self.linear = ost_flax.Linear(width, width, rngs=rngs)
        self.norm_out = ost_flax.RMSNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """From int[batch, length] to float32[batch, length, vocabulary]."""
        x = self.embed(tokens)
        x = x + self.linear(self.norm_in(x))
        return self.embed.attend(self.norm_out(x))


def next_token_loss(model: Model, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of the next token."""
    logits = model(tokens[:, :-1])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, tokens[:, 1:]
    )
    return jnp.mean(losses)


def train_nnx(steps: int, tokens: jax.Array) -> float:
    """One step on microbatches, and one on single examples."""
    model = Model(256, 64, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, recommended_chain(steps), wrt=nnx.Param)
    scale = DynamicScale()

    penalized = ost_flax.penalize_gradient_norm(next_token_loss, 0.1)
    gradients = ost_flax.microbatch_gradients(penalized, 8, mean_square=True)
    loss, grads, moments = gradients(model, tokens, loss_scale=scale.scale)
    scale = ost_flax.update_dynamic_scale(scale, moments.num_microbatches == 8)
    optimizer.update(model, grads, value=loss, moments=moments)

    # In a trainer that passes no loss.
    model.loss_probe = nnx.Param(ost.loss_probe())
    unaware = nnx.Optimizer(
        model, ost.with_loss_probe(ost.spike_guard(optax.sgd(0.1))), wrt=nnx.Param
    )
    unaware.update(model, nnx.grad(ost.probed(next_token_loss))(model, tokens))
    guard: optax.GradientTransformation = ost.spike_guard(optax.sgd(0.1), loss=False)
    nnx.Optimizer(model, guard, wrt=nnx.Param)

    norms = (ost_flax.LayerNorm, ost_flax.RMSNorm)
    gradients = ost_flax.per_example_gradients(next_token_loss, only=norms)
    loss, grads, moments = gradients(model, tokens)
    optimizer.update(model, grads, value=loss, moments=moments)
    return float(ost.metrics(optimizer)["grad/norm"])


def names_of_layers(model: Model) -> list[str]:
    """Names of the parameters, without the taps that a loss function may see."""
    wanted = nnx.All(nnx.Param, nnx.Not(ost_flax.NormTap))
    return ost.leaf_names(nnx.state(model, wanted))


def train_linen(model: nn.Module, params: Params, batch: Batch) -> ost_flax.TrainState:
    """Takes a step with Linen."""

    def predict(params: Params, x: jax.Array) -> Any:
        return model.apply({"params": params}, x)

    def loss_fn(params: Params) -> jax.Array:
        return jnp.mean((predict(params, batch.x) - batch.y) ** 2)

    tx = ost.spike_guard(ost.safe_adamw(1e-3))
    state = ost_flax.TrainState.create(apply_fn=predict, params=params, tx=tx)
    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, extra_args={"value": loss})


# --- States -----------------------------------------------------------------------


def summary(state: object) -> dict[str, jax.Array]:
    """The most useful numbers of one state of an optimizer."""
    match state:
        case ost.SkipSpikesState(total=total, consecutive=consecutive):
            return {"skipped": total, "in a row": consecutive}
        case ost.BranchOnSpikeState(rollbacks=rollbacks, skip=skip):
            return {"rollbacks": rollbacks, "skipped": skip.total}
        case ost.AccumulateMomentsState(moments=moments):
            return {"microbatches": moments.num_microbatches}
        case ost.ClipByThresholdState(clipped_total=total):
            return {"clipped": total}
        case ost.RestartMomentsState(total=total):
            return {"restarts": total}
        case ost.WhenNoisyState(active=active):
            return {"active": active}
        case ost.ScaleByNoiseScaleState(scale=scale):
            return {"scale": scale}
        case ost.EstimateNoiseScaleState(batch=batch):
            return {"batch": batch}
        case ost.SafeAdamState() | ost.RecordState() | ost.RecordHistoryState():
            return {"step": state.step} | state.metrics
        case ost.ClipAttentionLogitsState(heads=heads):
            return {"heads": heads}
        case ost.RecordLogitBoundState() | ost.RecordExtraState():
            return state.metrics
        case _:
            return {}


def level(state: object) -> jax.Array | None:
    """The level that a threshold has learned, whatever its kind."""
    match state:
        case thresholds.ZScoreState(mean=mean):
            return mean
        case thresholds.EmaRatioState(level=mean):
            return mean
        case thresholds.WindowState(values=values):
            return jnp.nanmedian(values)
        case thresholds.DetrendedMadState(values=values):
            return jnp.nanmedian(values)
        case thresholds.RelearnState(inner=inner):
            return level(inner)
        case thresholds.AtMostMedianState(inner=inner):
            return level(inner)
        case _:
            return None


def resume(params: Params, old_state: optax.OptState) -> optax.OptState:
    """Continues a run of plain optax with more protection."""
    converted = ost.from_optax_adam_state(old_state, b2=0.95)
    return ost.adopt_state(recommended_chain(1000), params, converted)


def leave(state: optax.OptState) -> optax.OptState:
    """Goes back to plain optax."""
    return ost.to_optax_adam_state(state)


def served(params: Params, state: optax.OptState) -> Params:
    """The parameters to serve."""
    return ost.eval_params(params, state)


def serve(
    model: Model, params: nnx.State[Any, Any], optimizer: nnx.Optimizer[Model]
) -> None:
    """Puts the parameters to serve into a copy of the model."""
    nnx.update(model, ost.eval_params(params, optimizer))


# --- On the host ------------------------------------------------------------------


def loop(losses: list[float], checkpoints: dict[int, float]) -> int:
    """Goes back to a checkpoint when the loss has diverged."""
    policy = ost.RewindPolicy(steps_back=5, skip_batches=10, patience=4, rise=1.0)
    step = 0
    for loss in losses:
        step += 1
        decision: ost.Decision = policy.update(step, {"loss": loss})
        match decision.action:
            case "continue":
                checkpoints[step] = loss
            case "rewind":
                to = decision.restore_step or 0
                step = max(saved for saved in checkpoints if saved <= to)
            case "stop":
                raise SystemExit(decision.reason)
            case _:
                assert_never(decision.action)
    policy.set_state(policy.get_state())
    return step


def loop_on_disk(
    step: Callable[[Params, jax.Array], tuple[Params, jax.Array]],
    params: Params,
    batches: list[jax.Array],
    folder: Path,
) -> Params:
    """Saves, logs, verifies and stops."""
    log = ost.RunLog(folder / "log.jsonl", resume_after=None, report=print)
    with (
        ost_orbax.Checkpoints(folder / "checkpoints", keep=3) as saved,
        ost.StopRequest() as stop,
    ):
        newest = saved.newest()
        if newest is not None:
            params = saved.load(newest, like=params)
        for i, batch in enumerate(batches, start=1):
            (params, loss), differs = ost.verify_step(step, params, batch, attempts=2)
            log.write(i, {"batch": i, "loss": float(loss), "differs": differs})
            saved.save(params, {"step": i, "batch": i})
            if stop.due():
                break
        problem: str | None = saved.wait()
        kept = ost_orbax.select_checkpoints(saved.available(), keep=1)
    assert problem is None or not kept
    return params


class LinearRun:
    """A run, as the loop sees it."""

    tokens_per_step = 8

    def __init__(self, params: Params, batches: list[jax.Array], inject: list[str]):
        """Starts, with the faults of a rehearsal."""
        self.state = params
        self._batches = batches
        read: tuple[ost_faults.Fault, ...] = ost_faults.parse_faults(inject)
        self._faults = ost_faults.FaultInjector(read, vocabulary=256)

    def advance(self, drawn: ost_loop.Drawn) -> dict[str, jax.Array]:
        """A step whose gradient may be at fault."""
        factors = self._faults.factors(drawn.batch)

        def loss_fn(params: Params) -> jax.Array:
            return jnp.mean(self._batches[drawn.position] @ params["w"])

        faulty = ost_faults.with_gradient_factor(loss_fn, factors["gradient"])
        _, grads = jax.value_and_grad(faulty)(self.state)
        tx = optax.chain(optax.sgd(0.1), ost_faults.scale_by_surge())
        updates, _ = tx.update(grads, tx.init(self.state), surge=factors["surge"])
        self.state = jax.tree.map(jnp.add, self.state, updates)
        return {"loss": loss_fn(self.state)}

    def examine(self, drawn: ost_loop.Drawn) -> list[ost_loop.Window]:
        """One example."""
        return [ost_loop.Window(1.0, f"batch {drawn.batch}", "memory")]

    def evaluate(self) -> dict[str, Any]:
        """The loss on other data."""
        return {"eval/loss": 1.0}

    def speed(self, seconds: float) -> dict[str, Any]:
        """Examples per second."""
        return {"perf/examples_per_second": self.tokens_per_step / seconds}


def loop_of_the_library(run: LinearRun, folder: Path) -> float:
    """Trains to the end, with everything that the loop can do."""
    curves = ost_tensorboard.TensorBoardLog(folder / "tensorboard", resume_after=None)
    alert = ost.FindingAlert("mail me@example.org", every=10, report=print)
    writers: list[ost_loop.Writer] = [ost.RunLog(folder / "log.jsonl"), curves, alert]
    schedule = ost_loop.Schedule(steps=8, eval_every=4, checkpoint_every=4)
    with ost_orbax.Checkpoints(folder / "checkpoints") as saved:
        seen: ost_loop.Run = run
        policy = ost.RewindPolicy()
        whole = ost_loop.TrainingLoop(seen, saved, schedule, writers, policy=policy)
        newest = saved.newest()
        if newest is not None:
            whole.resume(newest)
        try:
            with ost.StopRequest() as stop:
                whole.train(stop)
        except (ost_loop.DivergedError, ost_loop.NotSavedError):
            raise
        except ost_loop.FailedError as error:
            raise SystemExit(str(error)) from error
        finally:
            curves.close()
            alert.close()
    return float(whole.row["eval/loss"])


def is_whole(folder: Path) -> bool:
    """Whether a copy of a folder is complete."""
    ost.write_checksums(folder)
    damage: str | None = ost.find_damage(folder)
    losses: np.ndarray = ost.read_log(folder / "log.jsonl")["loss"]
    return damage is None and bool(np.isfinite(losses).all())


def report(state: optax.OptState, folder: Path) -> list[ost.Finding]:
    """Writes a picture and a page about a run, and returns what is wrong with it."""
    kept = ost.history(state)
    ost.plot_history(kept, folder / "training.png")
    ost.write_report(kept, folder / "report.html", title=f"{len(kept['step'])} steps")
    return [each for each in ost.diagnose(kept) if each.kind != "plateau"]


def report_on_a_log(losses: list[float]) -> str:
    """The layer in which a run diverged, from the log of another library."""
    log = {"step": np.arange(len(losses)), "loss": np.array(losses)}
    for finding in ost.diagnose(log):
        if finding.kind == "divergence" and finding.layer is not None:
            return finding.layer
    return ""


def batch_advice(state: optax.OptState, batch_size: int) -> str:
    """What the noise scale says about the size of the batch."""
    noise: ost.NoiseScale = ost.noise_scale(state, unit="tokens")
    low, high = ost.critical_batch_range(noise)
    share = ost.batch_efficiency(noise.b_simple, batch_size)
    worst = max(noise.per_leaf, key=lambda name: noise.per_leaf[name].b_simple)
    return f"{share:.0%} of a batch counts; {low:.0f} to {high:.0f}, most in {worst}"


def median_exponent(counts: np.ndarray) -> float:
    """The median of a histogram, as a power of two."""
    edges = ost.histogram_edges()
    return float(np.log2(edges[np.searchsorted(np.cumsum(counts), counts.sum() / 2)]))
