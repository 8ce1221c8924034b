"""Which rule sees a corrupted batch, and which one cries wolf?

Trains small byte-level GPTs on clean batches of the sources of Python's standard
library. Every fourth step also measures loss and gradient norm on corrupted batches
that are *not* applied. A skipped step changes nothing, so a burst of bad batches that
starts at step t is noticed if the one at t is: the traces tell what any rule misses at
any step, by a replay through its thresholds.

* **false skips**: clean runs with any abnormal step, and the number of such steps.
* **missed**: percent of the corrupted batches called normal, at steps 24–59 (the loss
  falls fast) / 60–119 / 120–239.
* **norm × 10**: percent of clean batches called abnormal if their gradient were ten
  times as long. Their loss is normal, so clipping is enough: 0 is right.
* **new data**: percent of batches of other data (Base64) called abnormal in the last
  phase. No rule can tell them from corruption; a skip rule needs a bound.

The published rules learn every value, ours nothing from a step that is skipped; five
skips in a row are accepted as the new level.

    python benchmarks/spike_detection.py            # about 5 minutes on two CPU cores
    python benchmarks/spike_detection.py --quick    # two short runs, no JSON
"""

import base64
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from corpus import corpus, windows
from reporting import Report, markdown, run_suite

from optax_stability import thresholds

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gpt"))

STEPS, QUICK_STEPS = 240, 120
# A probe every so many steps from the one on at which our rule is armed; phases begin
# at a multiple of it.
EVERY, ARMED = 4, 24
PHASES = ((ARMED, 60), (60, 120), (120, STEPS))
MAX_CONSECUTIVE = 5

CORRUPTIONS = (
    "random bytes",
    "half of the rows random",
    "30 % of the bytes random",
    "one byte repeated",
)
# In the order of the last axis of the traces.
PROBES = (*CORRUPTIONS, "new data", "norm × 10")


class Setting(NamedTuple):
    """One kind of clean run.

    Attributes:
      seeds: number of runs.
      layers: blocks of the model.
      width: of its residual stream.
      batch: rows of 64 bytes per step.
      learning_rate: at the peak.
    """

    seeds: int
    layers: int = 2
    width: int = 64
    batch: int = 8
    learning_rate: float = 3e-3


SETTINGS = {
    "batch 8": Setting(8),
    "batch 2": Setting(8, batch=2),
    "learning rate 1e-3": Setting(4, learning_rate=1e-3),
    "learning rate 1e-2": Setting(4, learning_rate=1e-2),
    "4 layers of 128": Setting(2, layers=4, width=128),
}


class Trace(NamedTuple):
    """What a rule gets to see of one run.

    Attributes:
      norm: float32[steps] – L2 norm of the clean gradient.
      loss: float32[steps] – clean loss, nats per byte.
      probe_norm: float32[steps, probes] – the same on the batches not applied, NaN at
        steps without a probe.
      probe_loss: float32[steps, probes] – likewise.
    """

    norm: Any
    loss: Any
    probe_norm: Any
    probe_loss: Any


class Rule(NamedTuple):
    """Abnormal: the loss is above ``value``, or the norm and the loss are above theirs.

    Attributes:
      grad_norm: threshold on the gradient norm.
      value: threshold on the loss.
      confirm: threshold on the loss without which a norm does not count.
      learns_all: whether abnormal steps are learned too, as published.
    """

    grad_norm: thresholds.Threshold = thresholds.constant(float("inf"))
    value: thresholds.Threshold = thresholds.constant(float("inf"))
    confirm: thresholds.Threshold = thresholds.constant(1e-30)
    learns_all: bool = False


OLMO = thresholds.window_zscore(6.0, window=128)
NORM = thresholds.detrended_mad(5.0, floor=5.0)
LOSS = thresholds.detrended_mad(7.0, floor=0.5, log=False)
CONFIRM = thresholds.detrended_mad(4.0, floor=0.3, log=False)
RULES = {
    "mean + 6σ of 128, norm": Rule(OLMO, learns_all=True),
    "mean + 6σ of 128, loss": Rule(value=OLMO, learns_all=True),
    "mean + 6σ of 128, either (OLMo-core, MaxText)": Rule(OLMO, OLMO, learns_all=True),
    "5 × median of 128, norm": Rule(thresholds.window_median(5.0), learns_all=True),
    "ours, norm": Rule(NORM),
    "ours, loss": Rule(value=LOSS),
    "ours, either": Rule(NORM, LOSS),
    "ours, loss, or norm confirmed by the loss": Rule(NORM, LOSS, CONFIRM),
}


def other_data(clean: np.ndarray) -> np.ndarray:
    """Text of another kind, made from the bytes at hand."""
    return np.frombuffer(base64.encodebytes(clean[:400_000].tobytes()), np.uint8)


def probe_batches(clean: np.ndarray, other: np.ndarray, rng) -> np.ndarray:
    """The clean batch after each corruption, and new data: int[probes − 1, …]."""
    rows = np.arange(len(clean))[:, None]
    noise = rng.integers(0, 256, clean.shape)
    return np.stack(
        [
            noise,
            np.where(rows < len(clean) // 2, noise, clean),
            np.where(rng.random(clean.shape) < 0.3, noise, clean),
            np.full_like(clean, rng.integers(33, 127)),
            windows(other, rng, len(clean)),
        ]
    ).astype(np.int32)


def trainer(setting: Setting, steps: int) -> Callable[..., Trace]:
    """Compiles ``(key, batches, probes) -> Trace`` for runs of this kind."""
    from flax import nnx
    from model import GPT, Size, next_token_loss

    heads = setting.width // 32
    size = Size(setting.layers, setting.width, heads, 64, 256, setting.learning_rate)
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        0.0, setting.learning_rate, 30, STEPS, setting.learning_rate / 10
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1),
    )

    def train(key, batches, probes):
        model = GPT(size, size.vocabulary, jnp.float32, nnx.Rngs(params=key))
        structure, params = nnx.split(model)

        def measure(params, batch):
            loss, grads = jax.value_and_grad(
                lambda params: next_token_loss(nnx.merge(structure, params), batch)
            )(params)
            return optax.tree.norm(grads), loss, grads

        def look(params, probes):
            return jax.lax.map(lambda batch: measure(params, batch)[:2], probes)

        def step(carry, data):
            params, state = carry
            t, batch, probes = data
            norm, loss, grads = measure(params, batch)
            blank = jnp.full((len(probes),), jnp.nan)
            seen = jax.lax.cond(
                (t >= ARMED) & (t % EVERY == 0),
                lambda: look(params, probes),
                lambda: (blank, blank),
            )
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), Trace(norm, loss, *seen)

        data = jnp.arange(steps), batches, probes
        return jax.lax.scan(step, (params, tx.init(params)), data)[1]

    return jax.jit(train)


def with_long_gradients(trace: Trace) -> Trace:
    """Adds the last probe: the clean batch with a gradient ten times as long."""
    return trace._replace(
        probe_norm=np.column_stack([trace.probe_norm, 10 * trace.norm]),
        probe_loss=np.column_stack([trace.probe_loss, trace.loss]),
    )


def record(setting: Setting, seeds: int, steps: int) -> Trace:
    """Clean runs of one kind, with a leading axis of seeds."""
    clean, _ = corpus()
    other, train, traces = other_data(clean), trainer(setting, steps), []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        batches = [windows(clean, rng, setting.batch) for _ in range(steps)]
        probes = [probe_batches(batch, other, rng) for batch in batches]
        trace = train(jax.random.key(seed), np.stack(batches), np.stack(probes))
        traces.append(with_long_gradients(jax.device_get(trace)))
    return Trace(*map(np.stack, zip(*traces, strict=True)))


def judge(rule: Rule, norm, loss, states) -> tuple[jax.Array, Any]:
    """Whether a step is abnormal, and the thresholds after learning it."""
    streams = zip(rule[:3], (norm, loss, loss), states, strict=True)
    limits, learned = zip(*(each.update(x, s) for each, x, s in streams), strict=True)
    return (loss > limits[1]) | ((norm > limits[0]) & (loss > limits[2])), learned


def rebase(rule: Rule, norm, loss, states) -> Any:
    """The thresholds moved to the present level."""
    streams = zip(rule[:3], (norm, loss, loss), states, strict=True)
    return tuple(each.rebase(x, s) for each, x, s in streams)


def replay(rule: Rule, trace: Trace) -> tuple[jax.Array, jax.Array]:
    """What the rule calls abnormal in one run: bool[steps], bool[steps, probes]."""

    def step(carry, data):
        states, row = carry
        norm, loss, probe_norm, probe_loss = data
        abnormal, learned = judge(rule, norm, loss, states)
        probes = jax.vmap(lambda n, x: judge(rule, n, x, states)[0])
        found = probes(probe_norm, probe_loss)
        if rule.learns_all:
            return (learned, row), (abnormal, found)
        full = row >= MAX_CONSECUTIVE
        moved = rebase(rule, norm, loss, states)
        kept = optax.tree.where(full, moved, states)
        states = optax.tree.where(abnormal, kept, learned)
        return (states, jnp.where(abnormal & ~full, row + 1, 0)), (abnormal, found)

    start = tuple(each.init() for each in rule[:3]), jnp.int32(0)
    return jax.lax.scan(step, start, trace)[1]


def percent(found: np.ndarray, first: int, stop: int) -> float:
    """Share of the probes at these steps that were found."""
    return 100 * float(found[:, first:stop:EVERY].mean())


def score(rule: Rule, traces: dict[str, Trace], steps: int) -> dict[str, Any]:
    """Counts of one rule over all runs."""
    runs = Trace(*map(np.concatenate, zip(*traces.values(), strict=True)))
    replay_all = jax.jit(jax.vmap(lambda trace: replay(rule, trace)))
    clean, found = jax.device_get(replay_all(runs))
    ends = np.cumsum([len(trace.loss) for trace in traces.values()])
    counts = np.split(clean.sum(1), ends[:-1])
    each = {probe: found[:, :, i] for i, probe in enumerate(PROBES)}
    phases = [phase for phase in PHASES if phase[0] < steps]
    return {
        "false_skips": {
            name: count.tolist() for name, count in zip(traces, counts, strict=True)
        },
        "missed": {
            name: [100 - percent(each[name], *phase) for phase in phases]
            for name in CORRUPTIONS
        },
        "long_gradients_found": percent(each["norm × 10"], ARMED, steps),
        "new_data_found": percent(each["new data"], *phases[-1]),
    }


def cells_of(name: str, row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    counts = [count for each in row["false_skips"].values() for count in each]
    runs = sum(count > 0 for count in counts)
    cells = [name, f"{runs} of {len(counts)} runs, {sum(counts)} steps"]
    for phases in row["missed"].values():
        cells.append(" / ".join(f"{each:.0f}" for each in phases))
    return cells + [
        f"{row[key]:.0f}" for key in ("long_gradients_found", "new_data_found")
    ]


def make_report(quick: bool) -> Report:
    """Records the runs and replays the rules."""
    steps = QUICK_STEPS if quick else STEPS
    chosen = {"batch 8": Setting(2)} if quick else SETTINGS
    traces = {}
    for name, setting in chosen.items():
        sys.stderr.write(f"{name}: {setting.seeds} runs\n")
        traces[name] = record(setting, setting.seeds, steps)
    losses = {name: trace.loss[:, -20:].mean(1) for name, trace in traces.items()}
    return {
        "steps": steps,
        "phases": PHASES,
        "settings": {name: each._asdict() for name, each in chosen.items()},
        "final_training_loss": {name: x.tolist() for name, x in losses.items()},
        "rules": {name: score(rule, traces, steps) for name, rule in RULES.items()},
    }


def tables(report: Report) -> dict[str, str]:
    """The table; numbers are percent unless they say otherwise."""
    missed = [f"missed: {name}" for name in CORRUPTIONS]
    head = ["rule", "false skips", *missed, "norm × 10", "new data"]
    rows = [cells_of(name, row) for name, row in report["rules"].items()]
    return {"What every rule sees": markdown(head, rows)}


if __name__ == "__main__":
    run_suite("spike_detection", __doc__, make_report, tables)
