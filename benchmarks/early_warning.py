"""Does anything say early that the learning rate is too high, or that a spike comes?

Trains small byte-level GPTs and asks two questions.

**Learning rate.** ρ̂ = (R − c)/(β₁(R + c)), with R the mean square of Adam's update and
c = (1 − β₁)/(1 + β₁), is the metric ``adam/correlation``. The rule *median over the ten
steps after the warm-up below 0* was found on other runs of the first setting here. It
meets seventeen others, unchanged.

* **best**: the rate with the lowest held-out loss, in the mean of the seeds.
* **bad**: runs at a higher rate whose held-out loss is above that of the best rate with
  the same seed by more than 0.1 nat. **good**: runs at the best rate or below, or above
  it and worse by less than 0.03. **between**: the rest.
* **flagged**: runs that the rule calls too high.
* **lead**: steps from the alarm (the tenth step after the warm-up) to the first of ten
  steps in a row at which the mean of the last ten losses is above that of the best rate
  on the same batches by 0.1 nat. **In time**: flagged bad runs with a lead above 0.

Other statistics are compared on the same runs. Their limits are chosen on every other
setting (largest recall minus share of false alarms) and tested on the rest. *The rate
itself* is the control: a limit on it knows nothing of the run.

**Spikes.** Models without normalisation, no clip, rates that do not fall: some runs
spike, some diverge. A spike is an abnormal loss, ``detrended_mad(6.0, floor=0.5,
log=False)``, with another one within four steps, and 40 steps without such before it.
*Controls* are the same steps of the other seeds of the same setting, while no spike is
40 steps behind or 30 ahead of them. Eight seeds were looked at while this was written;
they set the levels of the alarms, and the other eight are what is reported.

* **AUC**: how often the highest value in the 30 steps before a spike is above that of a
  control; 0.5 is chance. In brackets: 95 % by bootstrap over runs. **5–30**: without
  the four steps before the spike, in which it may have begun. **clean**: of those, only
  spikes without a single abnormal loss in the 40 steps before. **minus loss**: 5–30
  minus the same of the loss, which is the control: it costs nothing to look at.
* **recall**: spikes with an alarm in the 30 steps before, at a level that 0.5 % of the
  quiet steps of the first eight seeds pass; **controls**: share of the controls with
  one; **false**: alarms per 1,000 quiet steps; **lead**: median of the steps from the
  first alarm to the spike. **health**: alarms per 1,000 steps from step 64 on in the
  good runs of the first question.

    python benchmarks/early_warning.py            # 18 minutes on one CPU core
    python benchmarks/early_warning.py --quick    # one small setting each, no JSON
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from low_precision import corpus, windows
from numpy.lib.stride_tricks import sliding_window_view
from reporting import Report, run_suite

import optax_stability as ost
from optax_stability import thresholds

# The rule as it was found, not to be changed here.
LIMIT, WINDOW = 0.0, 10
VERDICTS = ("bad", "between", "good")
LIMITS = (-0.3, -0.2, -0.1, LIMIT, 0.1, 0.2)

STEPS, SEEDS = 240, 2
RATES = (1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 6e-2)
# Nats above the best rate.
BAD, GOOD = 0.1, 0.03
SMOOTH = LASTS = 10

# Half of the seeds were looked at while this was written; they set the levels.
SPIKE_STEPS, SPIKE_SEEDS, SEEN = 300, 16, 8
# A spike has 40 quiet steps before it, and nobody is asked before the thresholds and
# the windows of 32 are full. A control is quiet for another 30 steps.
QUIET, BEFORE, ONSET, PAST, FIRST = 40, 30, 5, 32, 64
# Share of the quiet steps of the calibration runs at which an alarm may go off.
ALARMS = 0.005
RESAMPLES = 2000
# Update rms over its median of the last 32 steps.
JUMPS = (1.5, 2.0, 3.0)

Tree = Any


class Setting(NamedTuple):
    """One kind of run; the defaults are as where the rule was found.

    Attributes:
      layers: blocks of the model.
      width: of its residual stream.
      batch: rows of 64 bytes per step.
      data: which bytes.
      warmup: steps to the peak of the learning rate.
      b1: Adam's β₁.
      b2: its β₂.
      eps: its ε.
      weight_decay: decoupled.
      final: learning rate at the end of the cosine, as a share of the peak.
      clip: limit of the gradient norm.
      normalised: whether the model has its layer norms.
      zero_head: whether the logits start at 0 and the tokens loud, as in
        ``examples/gpt``; else as in GPT-2.
    """

    layers: int = 2
    width: int = 64
    batch: int = 8
    data: str = "source code"
    warmup: int = 30
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 0.0
    weight_decay: float = 0.1
    final: float = 0.1
    clip: float = 1.0
    normalised: bool = True
    zero_head: bool = False

    @property
    def shape(self) -> "Setting":
        """What a program is compiled for."""
        return Setting(
            self.layers,
            self.width,
            self.batch,
            normalised=self.normalised,
            zero_head=self.zero_head,
        )


SETTINGS = {
    "as it was found": Setting(),
    "1 layer of 32": Setting(layers=1, width=32),
    "4 layers of 96": Setting(layers=4, width=96),
    "warm-up 10": Setting(warmup=10),
    "warm-up 60": Setting(warmup=60),
    "β₂ = 0.99": Setting(b2=0.99),
    "β₂ = 0.999": Setting(b2=0.999),
    "β = 0.8, 0.95": Setting(b1=0.8),
    "β = 0.95, 0.98": Setting(b1=0.95, b2=0.98),
    "batch 4": Setting(batch=4),
    "batch 32": Setting(batch=32),
    "Markov chain": Setting(data="Markov chain"),
    "English": Setting(data="English"),
    "no weight decay": Setting(weight_decay=0.0),
    "ε = 1e-8": Setting(eps=1e-8),
    "constant rate": Setting(final=1.0),
    "head starts at 0": Setting(zero_head=True),
    "head starts at 0, β₂ = 0.999": Setting(zero_head=True, b2=0.999),
}
QUICK = ("1 layer of 32",)
# Every other setting chooses the limits of the alternatives.
CHOOSING = tuple(SETTINGS)[::2]

_SPIKING = Setting(clip=float("inf"), final=1.0, normalised=False, zero_head=True)
_SPIKING_999 = _SPIKING._replace(b2=0.999)
# By β₂: name, setting, rate after the warm-up.
SPIKING = {
    "0.95": {
        "rate 2e-2": (_SPIKING, 2e-2),
        "rate 2.5e-2": (_SPIKING, 2.5e-2),
        "rate from 1e-2 to 3e-2": (_SPIKING._replace(final=3.0), 1e-2),
    },
    "0.999": {
        "rate 1.5e-2": (_SPIKING_999, 1.5e-2),
        "rate 2e-2": (_SPIKING_999, 2e-2),
        "rate from 7e-3 to 2.1e-2": (_SPIKING_999._replace(final=3.0), 7e-3),
    },
}

_SMALL = _SPIKING._replace(layers=1, width=32)
QUICK_SPIKING = {"0.95": {"1 layer of 32, rate 1e-1": (_SMALL, 1e-1)}}


class Trace(NamedTuple):
    """What is seen of one run, float32[steps] each.

    Attributes:
      loss: of the batch, nats per byte.
      norm: L2 norm of the gradient, before the clip.
      shallow: likewise, of the positions and the first block.
      rho: ρ̂ of all parameters.
      rho_leaf: ρ̂ of each leaf, [steps, leaves].
      update_rms: of Adam's update.
      param_ratio: ‖change‖/‖parameters‖.
      cosine: of this gradient and the one before.
      freshness: mean of g²/v̂ over the entries.
      energy: Σg²/Σv̂.
      stalest: the least Σg²/Σv̂ of a leaf.
      bimodality: (Σu²)²/(n₊Σu⁴) of Adam's update u.
    """

    loss: Any
    norm: Any
    shallow: Any
    rho: Any
    rho_leaf: Any
    update_rms: Any
    param_ratio: Any
    cosine: Any
    freshness: Any
    energy: Any
    stalest: Any
    bimodality: Any


# --- data ---------------------------------------------------------------------------


def markov_chain() -> tuple[np.ndarray, np.ndarray]:
    """Bytes, each of which follows one of a few others; train and held out."""
    rng = np.random.default_rng(0)
    # The few, and how often: rows that sum to 1.
    chances = rng.dirichlet(np.full(128, 0.05), 128).cumsum(1)
    state, rows = rng.integers(0, 128, 1000), []
    for draw in rng.random((1000, 1000)):
        state = np.minimum((chances[state] < draw[:, None]).sum(1), 127)
        rows.append(state)
    stream = np.stack(rows, 1).astype(np.uint8)
    return stream[100:].ravel(), stream[:100].ravel()


def english() -> tuple[np.ndarray, np.ndarray]:
    """What ``help()`` knows of the language, most of it prose; train and held out."""
    from pydoc_data.topics import topics

    texts = [topics[name].encode() for name in sorted(topics)]
    train = b"".join(text for i, text in enumerate(texts) if i % 10)
    held_out = b"".join(texts[::10])
    return np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8)


DATA = {"source code": corpus, "Markov chain": markov_chain, "English": english}


@functools.cache
def bytes_of(data: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on and bytes held out."""
    return DATA[data]()


def batches_of(setting: Setting, seed: int, steps: int) -> np.ndarray:
    """int[steps, batch, 65], the same whatever the learning rate is."""
    rng = np.random.default_rng([seed, 1])
    train, _ = bytes_of(setting.data)
    return np.stack([windows(train, rng, setting.batch) for _ in range(steps)])


def held_out_of(setting: Setting) -> np.ndarray:
    """int[32, 8, 65], the same for all runs."""
    _, held_out = bytes_of(setting.data)
    return windows(held_out, np.random.default_rng(0), 256).reshape(32, 8, 65)


# --- training -----------------------------------------------------------------------


def without_norms(model: Any) -> None:
    """Takes the layer norms out of a model."""
    from flax import nnx

    class Nothing(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    model.final_norm = Nothing()
    for block in model.blocks:
        block.attention_norm, block.mlp_norm = Nothing(), Nothing()


def start_as_gpt2(model: Any) -> None:
    """Tokens as loud as the other matrices, and a head that is not silent."""
    from model import INIT_STD, TOKEN_STD

    model.tokens.embedding[...] *= INIT_STD / TOKEN_STD
    model.final_norm.scale[...] += 1


def rate_at(step, peak, setting: Setting, steps: int):
    """Linear warm-up, then a cosine."""
    done = (step - setting.warmup) / (steps - setting.warmup)
    cosine = setting.final + (1 - setting.final) * (1 + jnp.cos(jnp.pi * done)) / 2
    return peak * jnp.where(done < 0, step / setting.warmup, cosine)


def squares(tree: Tree) -> jax.Array:
    """Σx² of each leaf, float32[leaves]."""
    return jnp.stack([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)])


def look(loss, norm, grads, last, u, change, params, state, early) -> Trace:
    """One step of the trace."""
    rms = optax.tree.scale(1 / state.rms_unit, state.rms)
    relative = jax.tree.map(
        lambda g, r: jnp.where(r > 0, g / jnp.where(r > 0, r, 1), 0), grads, rms
    )
    seen = sum(jnp.sum(r > 0) for r in jax.tree.leaves(rms))
    grad_squares, rms_squares, u_squares = map(squares, (grads, rms, u))
    ratios = grad_squares / jnp.where(rms_squares > 0, rms_squares, jnp.inf)
    fourth = jnp.sum(squares(jax.tree.map(jnp.square, u)))
    metrics = ost.metrics(state)
    cosine = optax.tree.vdot(grads, last) / jnp.maximum(
        optax.tree.norm(grads) * optax.tree.norm(last), 1e-30
    )
    return Trace(
        loss=loss,
        norm=norm,
        shallow=jnp.sqrt(jnp.sum(jnp.where(early, grad_squares, 0))),
        rho=metrics["adam/correlation"],
        rho_leaf=metrics["adam/correlation/per_leaf"],
        update_rms=metrics["adam/update_rms"],
        param_ratio=optax.tree.norm(change) / optax.tree.norm(params),
        cosine=cosine,
        freshness=jnp.sum(squares(relative)) / seen,
        energy=jnp.sum(grad_squares) / jnp.sum(rms_squares),
        stalest=jnp.min(jnp.where(rms_squares > 0, ratios, jnp.inf)),
        bimodality=jnp.square(jnp.sum(u_squares)) / (seen * fourth),
    )


@functools.cache
def trainer(shape: Setting) -> Callable[..., tuple[Trace, jax.Array]]:
    """Compiles ``(setting, rate, key, batches, held_out) -> (Trace, loss)`` once.

    All that is not the shape of the model or the batch is an argument of the program,
    so that one serves many settings.
    """
    from flax import nnx
    from model import GPT, Size, next_token_loss

    size = Size(shape.layers, shape.width, shape.width // 32, 64, 256, 0.0)

    def train(setting, rate, key, batches, held_out):
        model = GPT(size, size.vocabulary, jnp.float32, nnx.Rngs(params=key))
        if not shape.zero_head:
            start_as_gpt2(model)
        if not shape.normalised:
            without_norms(model)
        structure, params = nnx.split(model)
        names = ost.leaf_names(params)
        early = jnp.array([x.startswith(("positions", "blocks/0/")) for x in names])
        adam = ost.scale_by_safe_adam(setting.b1, setting.b2, setting.eps)

        def loss_of(params, batch):
            return next_token_loss(nnx.merge(structure, params), batch)

        def step(carry, data):
            params, state, last = carry
            t, batch = data
            loss, grads = jax.value_and_grad(loss_of)(params, batch)
            norm = optax.tree.norm(grads)
            grads = optax.tree.scale(jnp.minimum(1, setting.clip / norm), grads)
            u, state = adam.update(grads, state)
            now = rate_at(t, rate, setting, len(batches))
            change = jax.tree.map(
                lambda u, p: -now * (u + setting.weight_decay * p), u, params
            )
            seen = look(loss, norm, grads, last, u, change, params, state, early)
            params = optax.apply_updates(params, change)
            return (params, state, grads), seen

        start = params, adam.init(params), optax.tree.zeros_like(params)
        data = jnp.arange(len(batches)), batches
        (params, _, _), trace = jax.lax.scan(step, start, data)
        return trace, jax.lax.map(lambda x: loss_of(params, x), held_out).mean()

    return jax.jit(train)


def run(setting: Setting, rate: float, seed: int, steps: int) -> tuple[Trace, float]:
    """Trains once: the trace, as NumPy, and the held-out loss at the end."""
    traced = setting._replace(
        data=0, layers=0, width=0, batch=0, normalised=0, zero_head=0
    )
    trace, loss = trainer(setting.shape)(
        traced,
        rate,
        jax.random.key(seed),
        batches_of(setting, seed, steps),
        held_out_of(setting),
    )
    return jax.device_get(trace), float(loss)


def stack(traces: list[Trace]) -> Trace:
    """A leading axis of runs."""
    return Trace(*map(np.stack, zip(*traces, strict=True)))


# --- the learning rate --------------------------------------------------------------


def median_after(series: np.ndarray, start: int, window: int = WINDOW) -> np.ndarray:
    """Median over ``window`` steps from ``start`` on; steps are the last axis."""
    return np.median(series[..., start : start + window], axis=-1)


def independent(b1: float) -> float:
    """c, the mean square of the update for independent gradients, in the long run."""
    return (1 - b1) / (1 + b1)


def correlation(mean_square: np.ndarray, b1: float) -> np.ndarray:
    """ρ̂ from the mean square of the update, in the long run."""
    c = independent(b1)
    return (mean_square - c) / (b1 * (mean_square + c))


def best_of(finals: np.ndarray) -> int:
    """The row of ``finals[rates, seeds]`` with the lowest mean; NaN is worst."""
    return int(np.argmin(np.nan_to_num(finals, nan=np.inf).mean(axis=1)))


def verdicts(finals: np.ndarray) -> np.ndarray:
    """Whether each of ``finals[rates, seeds]`` is "good", "between" or "bad"."""
    best = best_of(finals)
    worse = np.nan_to_num(finals - finals[best], nan=np.inf)
    found = np.where(worse > BAD, "bad", np.where(worse < GOOD, "good", "between"))
    found[: best + 1] = "good"
    return found


def crossing(loss: np.ndarray, reference: np.ndarray) -> int | None:
    """The first step from which on the loss is persistently above the reference."""
    worse = np.nan_to_num(loss - reference, nan=np.inf)
    above = sliding_window_view(worse, SMOOTH).mean(axis=1) > BAD
    lasting = np.flatnonzero(sliding_window_view(above, LASTS).all(axis=1))
    return int(lasting[0]) + SMOOTH - 1 if len(lasting) else None


def leads(trace: Trace, finals: np.ndarray, warmup: int) -> list[list[int | None]]:
    """Steps from the alarm to the crossing, of each run of ``[rates, seeds]``."""
    alarm, best = warmup + WINDOW - 1, best_of(finals)
    crossings = [
        [crossing(x, y) for x, y in zip(row, trace.loss[best], strict=True)]
        for row in trace.loss
    ]
    return [[None if x is None else x - alarm for x in row] for row in crossings]


class Statistic(NamedTuple):
    """A number that may tell that a rate is too high.

    Attributes:
      of: (trace, setting, rates as a column) to a number for each run.
      low: whether low is suspicious, not high.
    """

    of: Callable[[Trace, Setting, np.ndarray], np.ndarray]
    low: bool = True


def rho_of_layers(trace: Trace, setting: Setting) -> np.ndarray:
    """Median ρ̂ after the warm-up of each leaf, [..., leaves]."""
    return median_after(np.moveaxis(trace.rho_leaf, -1, -2), setting.warmup)


def rho_without_lag(trace: Trace, setting: Setting) -> np.ndarray:
    """ρ̂ as if v̂ were the mean square of the gradients of the same ten steps.

    v remembers the larger gradients of the early descent, which makes R, and with it
    ρ̂, too small.
    """
    mean_square = median_after(np.square(trace.update_rms), setting.warmup)
    gradients = trace.freshness[..., setting.warmup :][..., :WINDOW].mean(axis=-1)
    return correlation(mean_square / gradients, setting.b1)


def growth(trace: Trace, setting: Setting) -> np.ndarray:
    """Gradient norm in the ten steps after the warm-up by that in the ten before."""
    start = setting.warmup
    before = median_after(trace.norm, max(start - WINDOW, 0), min(start, WINDOW))
    return median_after(trace.norm, start) / before


RHO, RHO_LATER = "ρ̂, the rule", "ρ̂, not before step 30"
STATISTICS = {
    RHO: Statistic(lambda x, s, r: median_after(x.rho, s.warmup)),
    RHO_LATER: Statistic(lambda x, s, r: median_after(x.rho, max(s.warmup, 30))),
    "ρ̂, not before step 60": Statistic(
        lambda x, s, r: median_after(x.rho, max(s.warmup, 60))
    ),
    "R/c, of independent gradients 1": Statistic(
        lambda x, s, r: (
            median_after(np.square(x.update_rms), s.warmup) / independent(s.b1)
        )
    ),
    "ρ̂, lowest layer": Statistic(lambda x, s, r: rho_of_layers(x, s).min(-1)),
    "ρ̂, median layer": Statistic(lambda x, s, r: np.median(rho_of_layers(x, s), -1)),
    "ρ̂, highest layer": Statistic(lambda x, s, r: rho_of_layers(x, s).max(-1)),
    "ρ̂, without the lag of v": Statistic(lambda x, s, r: rho_without_lag(x, s)),
    "cosine of successive gradients": Statistic(
        lambda x, s, r: median_after(x.cosine, s.warmup)
    ),
    "update / parameters": Statistic(
        lambda x, s, r: median_after(x.param_ratio, s.warmup), low=False
    ),
    "gradient norm, after / before": Statistic(lambda x, s, r: growth(x, s), low=False),
    "control: the rate itself": Statistic(
        lambda x, s, r: np.broadcast_to(r, x.loss.shape[:-1]), low=False
    ),
}


def auc(high: np.ndarray, low: np.ndarray) -> float:
    """How often one of ``high`` is above one of ``low``; a tie is half."""
    pairs = high[:, None] - low
    return float(np.mean((pairs > 0) + 0.5 * (pairs == 0)))


def choose_limit(bad: np.ndarray, good: np.ndarray) -> float:
    """The limit above which are most bad scores and fewest good ones.

    Of equally good limits the middle one, half way between two scores.
    """
    scores = np.unique(np.concatenate([bad, good]))
    limits = (scores[1:] + scores[:-1]) / 2
    gains = np.array([(bad > x).mean() - (good > x).mean() for x in limits])
    best = limits[gains == gains.max()]
    return float(best[len(best) // 2])


def record_rates(setting: Setting) -> tuple[Trace, np.ndarray]:
    """All runs of one setting, [rates, seeds, …], and their held-out losses."""
    rows = [[run(setting, r, seed, STEPS) for seed in range(SEEDS)] for r in RATES]
    finals = np.array([[loss for _, loss in row] for row in rows])
    return stack([stack([trace for trace, _ in row]) for row in rows]), finals


def rate_report(setting: Setting, trace: Trace, finals: np.ndarray) -> dict[str, Any]:
    """Everything that is said of the rates of one setting."""
    values = {
        name: each.of(trace, setting, np.array(RATES)[:, None]).tolist()
        for name, each in STATISTICS.items()
    }
    best = best_of(finals)
    return {
        "setting": setting._asdict(),
        "best_rate": RATES[best],
        "best_loss": finals[best].tolist(),
        "seed_noise": float(np.std(finals[best], ddof=1)),
        "held_out_loss": np.nan_to_num(finals, nan=99.0, posinf=99.0).tolist(),
        "verdict": verdicts(finals).tolist(),
        "lead": leads(trace, finals, setting.warmup),
        "jumps": jumps_in_health(trace.update_rms, verdicts(finals) == "good"),
        "statistics": values,
    }


def jumps_in_health(update_rms: np.ndarray, good: np.ndarray) -> list[int]:
    """Steps at which the update rms jumps in good runs, by factor; last, all steps."""
    later = jump(update_rms[good])[:, FIRST:]
    return [int((later > factor).sum()) for factor in JUMPS] + [later.size]


def scores_of(report: dict[str, Any], name: str, verdict: str) -> np.ndarray:
    """A statistic of the runs of one setting with one verdict; high is suspicious."""
    values = np.array(report["statistics"][name])[
        np.array(report["verdict"]) == verdict
    ]
    return -values if STATISTICS[name].low else values


def pooled(reports: dict[str, Any], name: str, verdict: str, settings) -> np.ndarray:
    """Likewise of several settings."""
    return np.concatenate([scores_of(reports[x], name, verdict) for x in settings])


def flagged_of(scores: np.ndarray, limit: float) -> list[int]:
    """How many are above the limit, and of how many."""
    return [int((scores > limit).sum()), len(scores)]


def rule_report(*reports: dict[str, Any]) -> dict[str, Any]:
    """What the unchanged rule makes of one setting, or of several together."""
    verdict, rho, lead = (
        np.concatenate([np.ravel(each) for each in parts])
        for parts in zip(
            *((x["verdict"], x["statistics"][RHO], x["lead"]) for x in reports),
            strict=True,
        )
    )
    caught = lead[(verdict == "bad") & (rho < LIMIT)].astype(float)
    seen = caught[np.isfinite(caught)]
    of = {each: rho[verdict == each] for each in VERDICTS}
    return {
        "flagged": {each: flagged_of(-x, -LIMIT) for each, x in of.items()},
        "rho": {
            each: [float(x.min()), float(x.max())] for each, x in of.items() if x.size
        },
        "lead": [float(seen.min()), float(np.median(seen))] if len(seen) else None,
        "in_time": [int((seen > 0).sum()), len(seen)],
        "flagged_but_never_seen": int(len(caught) - len(seen)),
    }


def others(reports: dict[str, Any]) -> tuple[str, ...]:
    """All settings but the first, on which the rule was found."""
    return tuple(reports)[1:] or tuple(reports)


def limit_report(reports: dict[str, Any], name: str) -> dict[str, Any]:
    """The rule with other limits, on settings it was not found on."""
    return {
        f"{limit:g}": {
            each: flagged_of(pooled(reports, name, each, others(reports)), -limit)
            for each in VERDICTS
        }
        for limit in LIMITS
    }


def alternative_report(reports: dict[str, Any], name: str) -> dict[str, Any]:
    """One statistic: limit chosen on some settings, tested on the others."""
    chosen = [x for x in reports if x in CHOOSING] or list(reports)
    tested = [x for x in reports if x not in CHOOSING]
    parts = {
        place: {each: pooled(reports, name, each, x) for each in ("bad", "good")}
        for place, x in (("chosen", chosen), ("tested", tested), ("all", list(reports)))
    }
    limit = choose_limit(**parts["chosen"])
    return {
        "limit": -limit if STATISTICS[name].low else limit,
        "auc": auc(parts["all"]["bad"], parts["all"]["good"]),
    } | {
        place: {each: flagged_of(x, limit) for each, x in parts[place].items()}
        for place in ("chosen", "tested")
    }


# --- spikes -------------------------------------------------------------------------


@jax.jit
@jax.vmap
def abnormal_steps(loss: jax.Array) -> jax.Array:
    """Whether each loss is far above its trend, bool[steps]."""
    threshold = thresholds.detrended_mad(6.0, floor=0.5, log=False)

    def step(state, x):
        limit, state = threshold.update(x, state)
        return state, ~(x <= limit)

    return jax.lax.scan(step, threshold.init(), loss)[1]


def spiking_steps(abnormal: np.ndarray) -> np.ndarray:
    """The abnormal steps with another one within four steps, bool[..., steps].

    One hard batch is not a spike.
    """
    padded = np.pad(abnormal, [(0, 0)] * (abnormal.ndim - 1) + [(4, 4)])
    return abnormal & (sliding_window_view(padded, 9, axis=-1).sum(axis=-1) > 1)


def onsets(spiking: np.ndarray) -> list[int]:
    """The first step of each spike of one run, from bool[steps]."""
    return [
        int(t)
        for t in np.flatnonzero(spiking)
        if t >= FIRST and not spiking[t - QUIET : t].any()
    ]


def quiet_steps(spiking: np.ndarray) -> np.ndarray:
    """Steps far enough behind one spike and ahead of the next, bool[steps]."""
    near = np.zeros(len(spiking), bool)
    for t in np.flatnonzero(spiking):
        near[max(t - BEFORE, 0) : t + QUIET + 1] = True
    near[:FIRST] = True
    return ~near


def past_of(series: np.ndarray) -> np.ndarray:
    """The ``PAST`` steps before each step from ``PAST`` on."""
    return sliding_window_view(series, PAST, axis=-1)[..., :-1, :]


def z_score(series: np.ndarray) -> np.ndarray:
    """Distance from the median of the past, in its deviations; 0 without a past."""
    past, z = past_of(series), np.zeros_like(series)
    centre = np.median(past, axis=-1)
    scale = 1.4826 * np.median(np.abs(past - centre[..., None]), axis=-1) + 1e-12
    z[..., PAST:] = (series[..., PAST:] - centre) / scale
    return z


def jump(series: np.ndarray) -> np.ndarray:
    """How many times the median of the past; 0 without a past."""
    ratio = np.zeros_like(series)
    ratio[..., PAST:] = series[..., PAST:] / np.median(past_of(series), axis=-1)
    return ratio


def trailing_mean(series: np.ndarray, window: int = 8) -> np.ndarray:
    """Mean of each step and those before it; 0 until there are enough."""
    means = np.zeros_like(series)
    means[..., window - 1 :] = sliding_window_view(series, window, -1).mean(-1)
    return means


JUMP, LOSS = "update rms / its median of 32", "control: the loss, z-score"
# High is suspicious.
PRECURSORS: dict[str, Callable[[Trace], np.ndarray]] = {
    "gradient norm, z-score": lambda x: z_score(np.log(x.norm)),
    "update rms": lambda x: x.update_rms,
    JUMP: lambda x: jump(x.update_rms),
    "ρ̂ high": lambda x: x.rho,
    "ρ̂ low": lambda x: -x.rho,
    "cosine of successive gradients low": lambda x: -trailing_mean(x.cosine),
    "update / parameters": lambda x: x.param_ratio,
    "shallow gradient falls, z-score": lambda x: -z_score(np.log(x.shallow)),
    "Σg²/Σv̂ low": lambda x: -trailing_mean(np.log(x.energy)),
    "Σg²/Σv̂ low, stalest leaf": lambda x: (
        -trailing_mean(np.log(np.maximum(x.stalest, 1e-30)))
    ),
    "bimodality": lambda x: x.bimodality,
    LOSS: lambda x: z_score(x.loss),
}


class Case(NamedTuple):
    """A spike and its controls.

    Attributes:
      group: which setting.
      run: which of its runs.
      step: at which step.
      controls: other runs of the setting, quiet at this step.
    """

    group: str
    run: int
    step: int
    controls: list[int]


def cases_of(group: str, spiking: np.ndarray) -> list[Case]:
    """The spikes of one setting that have controls, from ``spiking[runs, steps]``."""
    quiet = np.array([quiet_steps(row) for row in spiking])
    return [
        Case(
            group, run, t, [i for i in np.flatnonzero(quiet[:, t]).tolist() if i != run]
        )
        for run, row in enumerate(spiking)
        for t in onsets(row)
        if quiet[:, t].any()
    ]


def is_clean(case: Case, abnormal: np.ndarray) -> bool:
    """Whether not a single loss was abnormal before the spike, in [runs, steps]."""
    return not abnormal[case.run, case.step - QUIET : case.step].any()


def peaks(series: np.ndarray, step: int, last: int = 1) -> np.ndarray:
    """The highest value of each run ``BEFORE`` to ``last`` steps before the step."""
    return series[:, step - BEFORE : step - last + 1].max(axis=1)


def wins_of(case: Case, series: np.ndarray, last: int) -> np.ndarray:
    """1 for each control that the spiking run is above, a half for a tie; else NaN."""
    highest, wins = peaks(series, case.step, last), np.full(len(series), np.nan)
    above = highest[case.run] - highest[case.controls]
    wins[case.controls] = (above > 0) + 0.5 * (above == 0)
    return wins


def matched_auc(wins: np.ndarray, weights: np.ndarray, runs: np.ndarray) -> float:
    """Mean over spikes of the mean over their controls, runs weighted.

    Args:
      wins: [spikes, all runs], NaN where a run is no control.
      weights: [all runs].
      runs: the run that each spike is in.
    """
    paired = np.isfinite(wins) * weights
    total = paired.sum(axis=1)
    weight = weights[runs] * (total > 0)
    means = np.nansum(wins * weights, axis=1) / np.where(total > 0, total, 1)
    return float((weight * means).sum() / weight.sum()) if weight.any() else np.nan


def all_wins(cases: list[Case], series: dict[str, np.ndarray], last: int) -> np.ndarray:
    """The wins of each case over the runs of all settings, [cases, all runs]."""
    rows = []
    for case in cases:
        parts = {group: np.full(len(x), np.nan) for group, x in series.items()}
        parts[case.group] = wins_of(case, series[case.group], last)
        rows.append(np.concatenate(list(parts.values())))
    return np.array(rows)


def matched(
    cases: list[Case], series: dict[str, np.ndarray], wins: np.ndarray
) -> dict[str, float] | None:
    """AUC against matched controls, with a bootstrap over runs within each setting.

    A run that is drawn twice counts twice, be it as a case or as a control. The
    difference of two AUCs is that of their wins.
    """
    if not cases:
        return None
    sizes = [len(rows) for rows in series.values()]
    starts = dict(zip(series, np.cumsum([0, *sizes]), strict=False))
    runs = np.array([starts[case.group] + case.run for case in cases])
    rng = np.random.default_rng(0)
    again = [
        matched_auc(wins, np.concatenate([draw(rng, size) for size in sizes]), runs)
        for _ in range(RESAMPLES)
    ]
    low, high = np.nanpercentile(again, [2.5, 97.5])
    whole = matched_auc(wins, np.ones(sum(sizes)), runs)
    return {"auc": whole, "low": float(low), "high": float(high)}


def draw(rng: np.random.Generator, runs: int) -> np.ndarray:
    """How often each run is drawn, with replacement."""
    return rng.multinomial(runs, np.full(runs, 1 / runs))


def first_alarm(alarms: np.ndarray, step: int) -> int | None:
    """How many steps before the step the first of its ``BEFORE`` alarms went off."""
    found = np.flatnonzero(alarms[step - BEFORE : step])
    return BEFORE - int(found[0]) if len(found) else None


def alarm_report(
    cases: list[Case],
    series: dict[str, np.ndarray],
    quiet: dict[str, np.ndarray],
    levels: dict[str, float],
) -> dict[str, Any]:
    """Alarms above a level: how many in front of spikes, controls, and for nothing."""
    alarms = {group: rows > levels[group] for group, rows in series.items()}
    found = [first_alarm(alarms[x.group][x.run], x.step) for x in cases]
    controls = [
        np.mean(
            [first_alarm(alarms[x.group][i], x.step) is not None for i in x.controls]
        )
        for x in cases
    ]
    false = sum(int(rows[quiet[group]].sum()) for group, rows in alarms.items())
    steps = sum(int(rows.sum()) for rows in quiet.values())
    given = [lead for lead in found if lead is not None]
    return {
        "recall": [len(given), len(cases)],
        "controls": float(np.mean(controls)) if cases else None,
        "false_per_1000": 1000 * false / max(steps, 1),
        "lead": float(np.median(given)) if given else None,
    }


def record_spikes(setting: Setting, rate: float) -> Trace:
    """All runs of one setting, [seeds, …]."""
    seeds = range(SPIKE_SEEDS)
    return stack([run(setting, rate, seed, SPIKE_STEPS)[0] for seed in seeds])


def spike_report(traces: dict[str, Trace]) -> dict[str, Any]:
    """Everything that is said of one β₂."""
    abnormal = {
        name: np.asarray(abnormal_steps(trace.loss)) for name, trace in traces.items()
    }
    spiking = {name: spiking_steps(rows) for name, rows in abnormal.items()}
    quiet = {
        name: np.array([quiet_steps(row) for row in rows])
        for name, rows in spiking.items()
    }
    new_quiet = {name: rows[SEEN:] for name, rows in quiet.items()}
    cases = [
        case for name, rows in spiking.items() for case in cases_of(name, rows[SEEN:])
    ]
    every: dict[str, dict[str, np.ndarray]] = {}
    for name, of in PRECURSORS.items():
        # After a divergence there is nothing to divide by.
        with np.errstate(all="ignore"):
            every[name] = {group: of(trace) for group, trace in traces.items()}

    def new(name):
        return {group: x[SEEN:] for group, x in every[name].items()}

    new_abnormal = {name: rows[SEEN:] for name, rows in abnormal.items()}
    clean = [x for x in cases if is_clean(x, new_abnormal[x.group])]
    rows, loss = {}, all_wins(cases, new(LOSS), ONSET)
    for name, series in every.items():
        levels = {
            group: float(np.quantile(x[:SEEN][quiet[group][:SEEN]], 1 - ALARMS))
            for group, x in series.items()
        }
        early = all_wins(cases, new(name), ONSET)
        rows[name] = {
            "whole": matched(cases, new(name), all_wins(cases, new(name), 1)),
            "before_onset": matched(cases, new(name), early),
            "clean": matched(clean, new(name), all_wins(clean, new(name), ONSET)),
            "minus_loss": matched(cases, new(name), early - loss),
            "alarm": alarm_report(cases, new(name), new_quiet, levels),
        }
    jumps = {
        f"{factor:g}": alarm_report(
            cases, new(JUMP), new_quiet, dict.fromkeys(traces, factor)
        )
        for factor in JUMPS
    }
    return {
        "runs": sum(len(rows) - SEEN for rows in spiking.values()),
        "cases": [case._asdict() for case in cases],
        "clean": len(clean),
        "quiet_steps": int(sum(rows.sum() for rows in new_quiet.values())),
        "precursors": rows,
        "jumps": jumps,
    }


# --- tables -------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are to the right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(counts: list[int]) -> str:
    """So many of so many."""
    return f"{counts[0]} of {counts[1]}" if counts[1] else "–"


def span(ends: list[float] | None) -> str:
    """From the least to the most."""
    return "–" if ends is None else f"{ends[0]:+.2f} … {ends[1]:+.2f}"


def rule_cells(rule: dict[str, Any]) -> list[str]:
    """What the rule makes of one setting, or of several."""
    lead = rule["lead"]
    return (
        [share(rule["flagged"][each]) for each in ("bad", "good", "between")]
        + [span(rule["rho"].get(each)) for each in ("bad", "good")]
        + ["–" if lead is None else f"{lead[0]:g}, {lead[1]:g}"]
        + [share(rule["in_time"])]
    )


def settings_table(rates: dict[str, Any]) -> str:
    """The unchanged rule, by setting."""
    head = ["setting", "best rate", "seed noise", "bad flagged", "good flagged"]
    head += ["between flagged", "ρ̂ bad", "ρ̂ good", "lead: least, median", "in time"]
    rows = [
        [
            name,
            f"{each['best_rate']:g}",
            f"{each['seed_noise']:.3f}",
            *rule_cells(each["rule"]),
        ]
        for name, each in rates["settings"].items()
    ]
    return table(
        head, [*rows, ["all but the first", "", "", *rule_cells(rates["others"])]]
    )


def limits_table(rates: dict[str, Any]) -> str:
    """The rule with other limits."""
    rows = [
        [name, limit, *map(share, counts.values())]
        for name, limits in rates["limits"].items()
        for limit, counts in limits.items()
    ]
    head = ["statistic", "limit", "bad flagged", "between flagged", "good flagged"]
    return table(head, rows)


def alternatives_table(rates: dict[str, Any]) -> str:
    """Other statistics, with limits chosen on half of the settings."""
    rows = []
    for name, row in rates["alternatives"].items():
        cells = [name, f"{row['auc']:.2f}", f"{row['limit']:.3g}"]
        for place in ("chosen", "tested"):
            cells += [share(row[place][each]) for each in ("bad", "good")]
        rows.append(cells)
    head = [
        "statistic",
        "AUC",
        "limit",
        "chosen on: bad",
        "good",
        "tested: bad",
        "good",
    ]
    return table(head, rows)


def interval(row: dict[str, float] | None) -> str:
    """An AUC and its interval."""
    if row is None:
        return "–"
    return f"{row['auc']:.2f} ({row['low']:.2f} … {row['high']:.2f})"


COMPARISONS = {
    "whole": "AUC",
    "before_onset": "5–30",
    "clean": "clean",
    "minus_loss": "minus loss",
}


def alarm_cells(alarm: dict[str, Any]) -> list[str]:
    """Recall, controls, false alarms and lead."""
    controls, lead = alarm["controls"], alarm["lead"]
    return [
        share(alarm["recall"]),
        "–" if controls is None else f"{100 * controls:.0f} %",
        f"{alarm['false_per_1000']:.1f}",
        "–" if lead is None else f"{lead:g}",
    ]


def spikes_table(report: dict[str, Any]) -> str:
    """All precursors at one β₂."""
    rows = [
        [
            name,
            *(interval(row[each]) for each in COMPARISONS),
            *alarm_cells(row["alarm"]),
        ]
        for name, row in report["precursors"].items()
    ]
    head = ["precursor", *COMPARISONS.values(), "recall", "controls", "false", "lead"]
    return table(head, rows)


def jumps_table(report: dict[str, Any]) -> str:
    """Fixed limits on the jump of the update rms."""
    health = np.sum([x["jumps"] for x in report["rates"]["settings"].values()], axis=0)
    rows = [
        [
            f"{b2}, more than × {factor}",
            *alarm_cells(alarm),
            f"{1000 * count / health[-1]:.1f}",
        ]
        for b2, each in report["spikes"].items()
        for (factor, alarm), count in zip(each["jumps"].items(), health, strict=False)
    ]
    return table(
        ["β₂, update rms", "recall", "controls", "false", "lead", "health"], rows
    )


def rates_report(names) -> dict[str, Any]:
    """The first question, for these settings."""
    settings = {}
    for name in names:
        sys.stderr.write(f"{name}\n")
        report = rate_report(SETTINGS[name], *record_rates(SETTINGS[name]))
        settings[name] = report | {"rule": rule_report(report)}
    return compare(settings)


def compare(settings: dict[str, Any]) -> dict[str, Any]:
    """Adds what is said of all settings together."""
    return {
        "settings": settings,
        "others": rule_report(*(settings[name] for name in others(settings))),
        "limits": {name: limit_report(settings, name) for name in (RHO, RHO_LATER)},
        "alternatives": {
            name: alternative_report(settings, name) for name in STATISTICS
        },
    }


def spikes_report(groups) -> dict[str, Any]:
    """The second question, for these groups of settings."""
    reports = {}
    for b2, group in groups.items():
        sys.stderr.write(f"spikes, β₂ = {b2}\n")
        reports[b2] = spike_report(
            {name: record_spikes(*each) for name, each in group.items()}
        )
    return reports


def tables(report: Report) -> dict[str, str]:
    """All tables."""
    rates, spikes = report["rates"], report["spikes"]
    found = {
        "Too high a learning rate, by setting": settings_table(rates),
        "By limit": limits_table(rates),
        "By statistic": alternatives_table(rates),
    }
    for b2, each in spikes.items():
        spiking = len({(case["group"], case["run"]) for case in each["cases"]})
        title = (
            f"β₂ = {b2}: {len(each['cases'])} spikes in {spiking} of {each['runs']} "
        )
        found[title + f"runs, {each['clean']} clean"] = spikes_table(each)
    return found | {"Jumps in healthy runs": jumps_table(report)}


def rounded(x: Any) -> Any:
    """All numbers to five digits."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def header() -> dict[str, Any]:
    """With which numbers."""
    return {
        "rule": {"limit": LIMIT, "window": WINDOW},
        "steps": [STEPS, SPIKE_STEPS],
        "seeds": [SEEDS, SPIKE_SEEDS],
        "rates_tried": RATES,
    }


def make_report(quick: bool) -> Report:
    """Both questions."""
    found = {
        "rates": rates_report(QUICK if quick else SETTINGS),
        "spikes": spikes_report(QUICK_SPIKING if quick else SPIKING),
    }
    return rounded(header() | found)


if __name__ == "__main__":
    run_suite("early_warning", __doc__, make_report, tables)
