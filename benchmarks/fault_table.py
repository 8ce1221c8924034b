"""What one fault costs under each rule: steps lost, NaN applied, frozen, passed.

Every rule sees the same streams of gradients and losses, given as data, so that a fault
meets every rule alike, whatever the rule did before. The 64 entries of a gradient, in
four leaves, keep their signs three times in four; its norm is lognormal around 0.5 (σ =
0.2), half of what a fixed clip at 1 lets pass. The loss falls from 4 to 2 (noise 0.05).
1000 steps; faults in mid-run come at step 600, when every rule is armed (axlearn's
second rule needs 500).

What is counted, in comparison with the *twin*, the same rule on the clean stream:

* **lost**: steps at which the update of some leaf is below 1 % of the twin's. A step
  counts only if its gradient and loss are finite, it is not the fault itself, and the
  gradient of that leaf is not zero: to skip the fault costs nothing. In the second
  table nothing is wrong with the data, and all steps count.
* **slow**: steps at which the whole update is below a quarter of the twin's, beyond
  those lost. This is the cost of a fault that went into Adam's second moment.
* **NaN**: some update was not finite, and with it the parameters are gone.
* **frozen**: entries whose updates in the last 100 steps were below 1 % of the twin's,
  in root mean square. The run is frozen if all of them are.
* **passed**: on a step with a spike the update was more than twice the twin's.
* **clean** shows the steps without any update, with no fault at all.

The table shows the worst of four seeds.

The skip rules wrap a fixed clip at 1 and AdamW, as in their trainers; the others come
before AdamW. Not measured: what a wrong direction does to a model, and a clip that
stays too low after a change of level, which Adam does not see.

    python benchmarks/fault_table.py            # 1.5 minutes on two CPU cores
    python benchmarks/fault_table.py --quick    # one seed, every third rule, no JSON
"""

import collections
import concurrent.futures
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from reporting import Report, markdown, run_suite

import optax_stability as ost

STEPS, FAULT, PROBE = 1000, 600, 750
STEP = np.arange(STEPS)
LEVEL, LEARNING_RATE, WEIGHT_DECAY = 0.5, 1e-3, 1e-4
LOST, SLOW, PASSED, LAST = 0.01, 0.25, 2.0, 100

# Shape, and share of the whole norm.
LEAVES = {
    "bias": ((5,), 0.3),
    "embedding": ((6, 4), 0.5),
    "gain": ((3,), 0.1),
    "weight": ((8, 4), 0.8),
}

SIZES = [int(np.prod(shape)) for shape, _ in LEAVES.values()]
ENTRIES = sum(SIZES)


def adamw() -> optax.GradientTransformation:
    """The optimizer under every rule but OLMo's and ours."""
    return optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def clipped_adamw() -> optax.GradientTransformationExtraArgs:
    """AdamW after the fixed clip that trainers with a skip rule use."""
    return optax.chain(optax.clip_by_global_norm(1.0), adamw())


def ours(clip: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """One of our clips before our AdamW."""
    return optax.chain(clip, ost.safe_adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY))


def olmo() -> optax.GradientTransformationExtraArgs:
    """The optimizer of OLMo-core, which clips at 1 as well."""
    return peers.olmo_skip(LEARNING_RATE, max_norm=1.0, weight_decay=WEIGHT_DECAY)


RULES: dict[str, Callable[[], Any]] = {
    "adamw": adamw,
    "clip 1.0": clipped_adamw,
    "apply_if_finite(clip 1.0, 5)": lambda: optax.apply_if_finite(clipped_adamw(), 5),
    "MaxText skip": lambda: peers.maxtext_skip(clipped_adamw()),
    "OLMo-core skip": olmo,
    "Levanter skip": lambda: peers.levanter_skip(clipped_adamw()),
    "axlearn, 20·mean": lambda: peers.axlearn_skip(clipped_adamw()),
    "axlearn, mean + 20·std": lambda: peers.axlearn_skip(clipped_adamw(), "std"),
    "lollcat": lambda: peers.lollcat_clip(adamw()),
    "ZClip, max 1.0": lambda: optax.chain(peers.zclip(), adamw()),
    "ZClip": lambda: optax.chain(peers.zclip(None), adamw()),
    "apply_if_finite(ZClip, 5)": lambda: optax.apply_if_finite(
        optax.chain(peers.zclip(None), adamw()), 5
    ),
    "ZClip, apply_if_finite(5)": lambda: optax.chain(
        peers.zclip(None), optax.apply_if_finite(adamw(), 5)
    ),
    "AdaGC": lambda: optax.chain(peers.adagc(), adamw()),
    "AutoClip, p = 10": lambda: optax.chain(peers.autoclip(capacity=STEPS), adamw()),
    "ours: clip_by_zscore": lambda: ours(ost.clip_by_zscore()),
    "ours: clip_by_quantile": lambda: ours(ost.clip_by_quantile(0.9)),
    "ours: clip_by_leaf_history": lambda: ours(ost.clip_by_leaf_history()),
    "ours: skip_spikes": lambda: ost.skip_spikes(ours(ost.clip_by_zscore())),
    "ours: spike_guard": lambda: ost.spike_guard(ours(ost.clip_by_zscore())),
    "ours: spike_guard, max 1.0": lambda: ost.spike_guard(
        optax.chain(
            ost.clip_by_threshold(ost.thresholds.constant(1.0)),
            ours(ost.clip_by_zscore()),
        )
    ),
}


@dataclasses.dataclass
class Stream:
    """A run as data; faults are written into it.

    Attributes:
      unit: gradients of equal norms, ``[STEPS, …]`` by leaf.
      grads: the gradients that the rule sees, likewise.
      loss: the losses it sees, ``[STEPS]``.
      faulty: steps that a rule may skip for nothing.
      spikes: steps at which a spike must not pass.
    """

    unit: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    loss: np.ndarray
    faulty: np.ndarray
    spikes: list[int]


Fault = Callable[[Stream], None]


def equal_norms(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Gradients that change only signs, so that all norms are equal to the last bit."""
    grads = {}
    whole = LEVEL / np.sqrt(sum(share**2 for _, share in LEAVES.values()))
    for name, (shape, share) in LEAVES.items():
        size = np.exp(rng.standard_normal(shape))
        signs = np.where(rng.random((STEPS, *shape)) < 0.75, 1.0, -1.0)
        grads[name] = signs * size * (whole * share / np.linalg.norm(size))
    return grads


def times(grads: dict[str, np.ndarray], factor: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients times one factor per step, in float32."""
    return {
        name: (g * factor.reshape(-1, *[1] * (g.ndim - 1))).astype(np.float32)
        for name, g in grads.items()
    }


def clean_stream(seed: int) -> Stream:
    """A stream without a fault."""
    rng = np.random.default_rng(seed)
    unit = equal_norms(rng)
    return Stream(
        unit=unit,
        grads=times(unit, np.exp(0.2 * rng.standard_normal(STEPS))),
        loss=2 + 2 * np.exp(-STEP / 150) + 0.05 * rng.standard_normal(STEPS),
        faulty=np.zeros(STEPS, bool),
        spikes=[],
    )


def entry(value: float, *steps: int) -> Fault:
    """One entry of one leaf is ``value`` at these steps."""

    def fault(stream):
        stream.grads["weight"][list(steps), 0, 0] = value
        stream.faulty[list(steps)] = True

    return fault


def spike(size: float, *steps: int) -> Fault:
    """The gradients of these steps are multiplied by ``size``."""

    def fault(stream):
        factor = np.where(np.isin(STEP, steps), size, 1.0)
        stream.grads = times(stream.grads, factor)
        stream.faulty[list(steps)] = True
        stream.spikes.extend(steps)

    return fault


def nan_loss(stream: Stream) -> None:
    """The loss is NaN once; the gradient is fine."""
    stream.loss[FAULT] = np.nan
    stream.faulty[FAULT] = True


def level(size: float, where: np.ndarray, *, loss: float = 0.0) -> Fault:
    """Where ``where`` is True the norm is a multiple and the loss higher."""

    def fault(stream):
        stream.grads = times(stream.grads, np.where(where, size, 1.0))
        stream.loss += loss * where

    return fault


def noisier(stream: Stream) -> None:
    """The norms are lognormal with σ = 1."""
    noise = np.random.default_rng(0).standard_normal(STEPS)
    stream.grads = times(stream.grads, np.exp(np.sqrt(1 - 0.2**2) * noise))


def equal(start: int = 0, jitter: float = 0.0) -> Fault:
    """From a step on all norms are equal, but for the jitter."""

    def fault(stream):
        noise = 1 + jitter * np.random.default_rng(0).standard_normal(STEPS)
        for name, grads in times(stream.unit, noise).items():
            stream.grads[name][start:] = grads[start:]

    return fault


def asleep(steps: int, *leaves: str) -> Fault:
    """The gradients of these leaves are zero for the first steps."""

    def fault(stream):
        for leaf in leaves:
            stream.grads[leaf][:steps] = 0.0

    return fault


def both(*faults: Fault) -> Fault:
    """One after the other."""

    def fault(stream):
        for each in faults:
            each(stream)

    return fault


ALWAYS, SINCE = STEP >= 0, STEP >= FAULT
FOR_100 = SINCE & (STEP < FAULT + 100)
EVERY_2ND, EVERY_20TH = SINCE & (STEP % 2 == 0), SINCE & (STEP % 20 == 0)
BLOCKS = SINCE & (STEP % 20 < 10)

FAULTS: dict[str, Fault] = {
    "clean": both(),
    "NaN at 12": entry(np.nan, 12),
    "NaN": entry(np.nan, FAULT),
    "7 NaN": entry(np.nan, *range(FAULT, FAULT + 7)),
    "NaN every 50": entry(np.nan, *range(FAULT, STEPS, 50)),
    "Inf": entry(np.inf, FAULT),
    "NaN loss": nan_loss,
    "one entry 1e30": entry(1e30, FAULT),
    "×1e3": spike(1e3, FAULT),
    "norms ÷50, one ×100": both(level(0.02, ALWAYS), spike(100.0, FAULT)),
    "NaN, later ×1e3": both(entry(np.nan, FAULT), spike(1e3, PROBE)),
    "40 in a row ×1e3": spike(1e3, *range(FAULT, FAULT + 40)),
    "first ×50": spike(50.0, 0),
    "×1e3 at 12 and 60": spike(1e3, 12, 60),
}

CHANGES: dict[str, Fault] = {
    "norms equal": equal(),
    "equal from 600": equal(FAULT),
    "equal to 1e-5": equal(jitter=1e-5),
    "norms with σ = 1": noisier,
    "norms ×10": level(10.0, SINCE),
    "×50": level(50.0, SINCE),
    "×50 for 100 steps": level(50.0, FOR_100),
    "×100 from 0": level(100.0, ALWAYS),
    "loss +2": level(1.0, SINCE, loss=2.0),
    "loss +2, norms ×10": level(10.0, SINCE, loss=2.0),
    "every 2nd ×30": level(30.0, EVERY_2ND),
    "every 2nd +2, ×30": level(30.0, EVERY_2ND, loss=2.0),
    "blocks of 10 +2, ×30": level(30.0, BLOCKS, loss=2.0),
    "every 20th +2, ×30": level(30.0, EVERY_20TH, loss=2.0),
    "one leaf 0 till 150": asleep(150, "embedding"),
    "all leaves 0 till 40": asleep(40, *LEAVES),
}

ALL = FAULTS | CHANGES

README_RULES = [
    "clip 1.0",
    "apply_if_finite(clip 1.0, 5)",
    "MaxText skip",
    "OLMo-core skip",
    "axlearn, 20·mean",
    "axlearn, mean + 20·std",
    "ZClip, max 1.0",
    "AdaGC",
    "AutoClip, p = 10",
    "ours: clip_by_zscore",
    "ours: spike_guard",
    "ours: spike_guard, max 1.0",
]
README_FAULTS = [
    "NaN at 12",
    "7 NaN",
    "NaN every 50",
    "one entry 1e30",
    "norms ÷50, one ×100",
    "40 in a row ×1e3",
    "first ×50",
    "norms equal",
    "×50",
    "all leaves 0 till 40",
    "loss +2",
    "blocks of 10 +2, ×30",
    "every 20th +2, ×30",
]


def make_stream(name: str, seed: int) -> Stream:
    """The stream with the named fault."""
    stream = clean_stream(seed)
    ALL[name](stream)
    return stream


def run_all(
    tx: optax.GradientTransformationExtraArgs, streams: list[Stream]
) -> np.ndarray:
    """The updates of all runs, ``[runs, STEPS, entries]``: one program, one scan."""
    params = {name: jnp.ones(shape) for name, (shape, _) in LEAVES.items()}

    def step(carry, data):
        params, state = carry
        grads, loss = data
        updates, state = tx.update(grads, state, params, value=loss)
        flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(updates)])
        return (optax.apply_updates(params, updates), state), flat

    def run(grads, loss):
        return jax.lax.scan(step, (params, tx.init(params)), (grads, loss))[1]

    grads = {name: np.stack([s.grads[name] for s in streams]) for name in LEAVES}
    losses = np.stack([s.loss for s in streams]).astype(np.float32)
    return np.asarray(jax.jit(jax.vmap(run))(grads, losses))


def leaf_norms(updates: np.ndarray) -> np.ndarray:
    """Norms of the leaves, ``[…, leaves]``, of flat updates."""
    parts = np.split(updates, np.cumsum(SIZES)[:-1], axis=-1)
    return np.stack([np.linalg.norm(part, axis=-1) for part in parts], axis=-1)


def due(stream: Stream) -> np.ndarray:
    """Where an update is due, ``[STEPS, leaves]``."""
    sizes = [
        np.abs(stream.grads[name]).reshape(STEPS, -1).max(axis=1) for name in LEAVES
    ]
    size = np.stack(sizes, axis=-1)
    good = np.isfinite(size).all(axis=-1) & np.isfinite(stream.loss) & ~stream.faulty
    return good[:, None] & (size > 0)


def judge(updates: np.ndarray, twin: np.ndarray, stream: Stream) -> dict[str, Any]:
    """The measures of one run: see the top of this file."""
    size, usual = leaf_norms(updates), leaf_norms(twin)
    compared = due(stream) & (usual > 0)
    lost = (compared & ~(size >= LOST * usual)).any(axis=-1)
    whole, usual_whole = (np.linalg.norm(u, axis=-1) for u in (updates, twin))
    slow = compared.any(axis=-1) & ~(whole >= SLOW * usual_whole) & ~lost
    power, usual_power = (np.mean(u[-LAST:] ** 2, axis=0) for u in (updates, twin))
    spikes = stream.spikes
    return {
        "lost": int(lost.sum()),
        "slow": int(slow.sum()),
        "nan": not np.isfinite(updates).all(),
        "frozen_entries": int((~(power >= LOST**2 * usual_power)).sum()),
        "passed": bool((whole[spikes] > PASSED * usual_whole[spikes]).any()),
        "no_update": int((size == 0).all(axis=-1).sum()),
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of the seeds, and in how many of them a flag was set."""
    worst = max(runs, key=lambda run: (run["lost"], run["slow"]))
    return {
        "lost": worst["lost"],
        "slow": worst["slow"],
        "median_lost": statistics.median(run["lost"] for run in runs),
        "frozen_entries": max(run["frozen_entries"] for run in runs),
        "no_update": max(run["no_update"] for run in runs),
        "seeds_nan": sum(run["nan"] for run in runs),
        "seeds_passed": sum(run["passed"] for run in runs),
    }


def measure(name: str, seeds: range) -> dict[str, dict[str, Any]]:
    """All faults under one rule."""
    faults = [(fault, seed) for fault in ALL for seed in seeds]
    streams = [make_stream(fault, seed) for fault, seed in faults]
    updates = run_all(RULES[name](), streams)
    twins = dict(zip(seeds, updates[: len(seeds)], strict=True))
    runs = {fault: [] for fault in ALL}
    for (fault, seed), mine, stream in zip(faults, updates, streams, strict=True):
        runs[fault].append(judge(mine, twins[seed], stream))
    return {fault: summarise(each) for fault, each in runs.items()}


def cell(fault: str, summary: dict[str, Any]) -> str:
    """One entry of the table."""
    if summary["seeds_nan"]:
        return "**NaN**"
    frozen, lost = summary["frozen_entries"], summary["lost"]
    if frozen == ENTRIES:
        return f"{lost}, **frozen**"
    words = [str(summary["no_update"] if fault == "clean" else lost)]
    if summary["slow"]:
        words[0] += f" + {summary['slow']} slow"
    if frozen:
        words.append(f"**{frozen}/{ENTRIES} frozen**")
    if summary["seeds_passed"]:
        words.append("**passed**")
    return ", ".join(words)


def table(rows: dict[str, dict[str, dict[str, Any]]], columns: list[str]) -> str:
    """Some columns of the rows as a Markdown table."""
    lines = [
        [name, *[cell(fault, row[fault]) for fault in columns]]
        for name, row in rows.items()
    ]
    return markdown(["rule", *columns], lines)


def readme_table(report: Report) -> str:
    """The part of both tables that the docs quote: where rules differ."""
    rows = rows_of(report)
    return table({name: rows[name] for name in README_RULES}, README_FAULTS)


def rows_of(report: Report) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows, zeros filled in again."""
    return {
        name: {fault: collections.Counter(row.get(fault, {})) for fault in ALL}
        for name, row in report["rules"].items()
    }


def without_zeros(row: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The row with only what is not zero, for a file that a person can read."""
    found = {
        fault: {key: count for key, count in summary.items() if count}
        for fault, summary in row.items()
    }
    return {fault: counts for fault, counts in found.items() if counts}


def make_report(quick: bool) -> Report:
    """Runs the grid."""
    seeds, names = (range(1), [*RULES][::3]) if quick else (range(4), [*RULES])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        each = pool.map(lambda name: measure(name, seeds), names)
    rows = dict(zip(names, each, strict=True))
    return {
        "steps": STEPS,
        "seeds": len(seeds),
        "entries": ENTRIES,
        "zeros": "left out",
        "rules": {name: without_zeros(row) for name, row in rows.items()},
    }


def tables(report: Report) -> dict[str, str]:
    """Both tables."""
    rows = rows_of(report)
    return {
        "Faults": table(rows, list(FAULTS)),
        "Changes that are no faults": table(rows, list(CHANGES)),
    }


if __name__ == "__main__":
    run_suite("fault_table", __doc__, make_report, tables)
