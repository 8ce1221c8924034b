"""What a fault costs a run, by optimizer: small GPTs on real text, broken on purpose.

Every optimizer sees the same batches, the same faults and the same learning rate, which
follows the data and not the optimizer's count. A fault is data, so one compilation per
optimizer trains all faults and seeds. The result of a run is its held-out loss at the
end minus that of the *same* optimizer and seed without the fault (``against`` below):
by itself a loss says more about the seed than about the fault. How far a run moves
though nothing is wrong – one batch is another, just as good – has rows of its own, and
so has what is no fault at all, where a rule can only do harm.

Nothing is tuned per row: every optimizer has one setting, published or default.

    python benchmarks/stability.py              # all; writes results/<device>.json
    python benchmarks/stability.py --grid small # the main grid alone
    python benchmarks/stability.py --quick      # four runs, no JSON
"""

import concurrent.futures
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from faulty_streams import (
    Change,
    Setting,
    Stream,
    at,
    both,
    clean_stream,
    faulty_calls,
    multiplied,
    new_domain,
    nothing,
    one_entry,
    other_batches,
    random_bytes,
)
from reporting import Report, finish, markdown, on_cpu, parser

import optax_stability as ost

EARLY, LATE = 45, 120
AFTER = 40  # clean steps after a fault over which its excess loss is averaged


class Outcome(NamedTuple):
    """What became of a run.

    Attributes:
      held_out: float32[] – loss at the end, nats per byte.
      losses: float32[calls] – of every batch, before its step.
      skipped: bool[calls] – whether the update was all zeros.
      finite: bool[] – whether every parameter was, at the end.
    """

    held_out: Any
    losses: Any
    skipped: Any
    finite: Any


Optimizer = Callable[[], optax.GradientTransformation]


class Fault(NamedTuple):
    """One row of the grid.

    Attributes:
      change: what happens to the stream.
      against: the row that the result is compared with, of the same optimizer; where
        there is none, with clip and adamw in the same row.
      good: whether nothing is wrong with the data, so that every skip is a false one.
      noise: whether the result shows by how much a run moves without a reason.
    """

    change: Change
    against: str | None = "clean"
    good: bool = False
    noise: bool = False


# --- faults ---------------------------------------------------------------------------

ALL, FROM_LATE = slice(None), slice(LATE, None)
CORRUPTED = {
    "1 random batch at 45": Fault(random_bytes(at(EARLY))),
    "5 random batches at 45": Fault(random_bytes(at(EARLY, 5))),
    "20 random batches at 45": Fault(random_bytes(at(EARLY, 20))),
    "1 random batch at 120": Fault(random_bytes(at(LATE))),
    "5 random batches at 120": Fault(random_bytes(at(LATE, 5))),
    "20 random batches at 120": Fault(random_bytes(at(LATE, 20))),
}
CLEAN = {"clean": Fault(nothing, against=None, good=True)}
NO_FAULT = {
    "gradients × 10 from 120 on": Fault(multiplied(10, FROM_LATE), good=True),
    "new domain from 120 on": Fault(new_domain(FROM_LATE), against=None, good=True),
}
NOISE = {
    f"another batch at {call}": Fault(other_batches(at(call)), good=True, noise=True)
    for call in (12, EARLY, LATE)
}
FAULTS = {
    "NaN at 12": Fault(multiplied(math.nan, at(12))),
    "NaN at 120": Fault(multiplied(math.nan, at(LATE))),
    "Inf at 120": Fault(multiplied(math.inf, at(LATE))),
    "7 NaN at 120": Fault(multiplied(math.nan, at(LATE, 7))),
    "one entry 1e20 at 120": Fault(one_entry(1e20, at(LATE))),
    "gradient × 1e3 at 120": Fault(multiplied(1e3, at(LATE))),
    "gradient × 1e6 at 120": Fault(multiplied(1e6, at(LATE))),
}
SCALES = {
    "gradients × 0.02": Fault(multiplied(0.02, ALL), good=True),
    "gradients × 0.02, one of them × 30": Fault(
        both(multiplied(0.02, ALL), multiplied(30, at(LATE))), "gradients × 0.02"
    ),
    "loss scale 1e-4": Fault(multiplied(1e-4, ALL), good=True),
    "loss scale 1e-12": Fault(multiplied(1e-12, ALL), good=True),
    "loss scale 1e-20": Fault(multiplied(1e-20, ALL), good=True),
}

# What five lost steps cost by themselves, where they are dearest.
LOST = {"5 NaN at 45": Fault(multiplied(math.nan, at(EARLY, 5)))}


# --- optimizers -----------------------------------------------------------------------


def adamw(eps: float = 1e-8) -> optax.GradientTransformation:
    """At a learning rate of 1: the trainer multiplies."""
    return optax.adamw(1.0, b1=0.9, b2=0.95, eps=eps, weight_decay=0.1)


def clipped() -> optax.GradientTransformation:
    """What most training code uses today."""
    return optax.chain(optax.clip_by_global_norm(1.0), adamw())


def safe_adamw() -> optax.GradientTransformation:
    """The AdamW of this library."""
    return ost.safe_adamw(1.0, b1=0.9, b2=0.95, weight_decay=0.1)


def adaptive() -> optax.GradientTransformation:
    """The recommended chain, without its guard."""
    return optax.chain(ost.clip_by_zscore(), safe_adamw())


def guarded(**options: Any) -> optax.GradientTransformation:
    """The recommended chain."""
    return ost.spike_guard(adaptive(), **options)


def fixed_clip() -> optax.GradientTransformation:
    """The recommended chain, the clip of most training code in front of its own."""
    fixed = ost.clip_by_threshold(ost.thresholds.constant(1.0))
    return ost.spike_guard(optax.chain(fixed, adaptive()))


def in_steps_of_eight(
    inner: optax.GradientTransformation, **options: Any
) -> optax.GradientTransformation:
    """What optax offers for accumulation."""
    return optax.MultiSteps(inner, 8, **options).gradient_transformation()


CLIP = "clip 1.0 + adamw"
OURS = "ours"
PEERS: dict[str, Optimizer] = {
    "adamw": adamw,
    CLIP: clipped,
    "apply_if_finite of it": lambda: optax.apply_if_finite(clipped(), 5),
    "MaxText, OLMo skip": lambda: peers.maxtext_skip(clipped()),
    "Levanter skip": lambda: peers.levanter_skip(clipped()),
    "ZClip": lambda: optax.chain(peers.zclip(), adamw()),
    "AdaGC": lambda: optax.chain(peers.adagc(), adamw()),
}
PARTS: dict[str, Optimizer] = {
    "no clip": lambda: ost.spike_guard(safe_adamw()),
    "no guard": adaptive,
    "adamw of optax": lambda: ost.spike_guard(
        optax.chain(ost.clip_by_zscore(), adamw())
    ),
    "norm alone": lambda: ost.skip_spikes(adaptive()),
    "25 skips": functools.partial(guarded, max_consecutive=25),
    "and clip 1.0": fixed_clip,
}
ACCUMULATORS: dict[str, Optimizer] = {
    CLIP: lambda: in_steps_of_eight(clipped()),
    "apply_if_finite of it, inside": lambda: in_steps_of_eight(
        optax.apply_if_finite(clipped(), 5)
    ),
    "skip_not_finite": lambda: in_steps_of_eight(
        clipped(), should_skip_update_fn=optax.skip_not_finite
    ),
    OURS: lambda: ost.accumulate_moments(guarded(), 8),
}


class Grid(NamedTuple):
    """Faults × optimizers on one kind of run."""

    setting: Setting
    faults: dict[str, Fault]
    optimizers: dict[str, Optimizer]
    seeds: int = 4


MICROBATCH = at(8 * LATE + 3)
GRIDS = {
    "small": Grid(
        Setting(),
        CLEAN | NOISE | FAULTS | CORRUPTED | SCALES | NO_FAULT | LOST,
        PEERS | {OURS: guarded} | PARTS,
    ),
    "large": Grid(
        Setting(layers=7, width=128),
        CLEAN
        | {
            name: (FAULTS | CORRUPTED | NO_FAULT)[name]
            for name in (
                "NaN at 120",
                "5 random batches at 45",
                "5 random batches at 120",
                "20 random batches at 120",
                "new domain from 120 on",
            )
        },
        {name: PEERS[name] for name in (CLIP, "MaxText, OLMo skip")} | {OURS: guarded},
    ),
    "microbatches": Grid(
        Setting(batch=1, calls=8 * 240, calls_per_step=8),
        CLEAN
        | {
            "one microbatch NaN": Fault(multiplied(math.nan, MICROBATCH)),
            "one microbatch × 1e3": Fault(multiplied(1e3, MICROBATCH)),
            "one microbatch random": Fault(random_bytes(MICROBATCH)),
        },
        ACCUMULATORS,
    ),
}
QUICK = Grid(
    Setting(calls=120),
    CLEAN | {"NaN at 12": FAULTS["NaN at 12"]},
    {CLIP: clipped, OURS: guarded},
    1,
)


# --- runs -----------------------------------------------------------------------------


def learning_rate(setting: Setting) -> Callable[[jax.Array], Any]:
    """Warm-up and cosine decay, by the call and not by what the optimizer counts."""
    steps = setting.calls // setting.calls_per_step
    peak = setting.learning_rate
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        0.0, peak, steps // 8, steps, peak / 10
    )
    return lambda call: schedule(call // setting.calls_per_step)


def spoil(grads: Any, factor: jax.Array, entry: jax.Array) -> Any:
    """The gradient as the fault leaves it."""
    leaves, treedef = jax.tree.flatten(optax.tree.scale(factor, grads))
    first = (0,) * leaves[-1].ndim
    replaced = jnp.where(entry == 0, leaves[-1][first], entry)
    leaves[-1] = leaves[-1].at[first].set(replaced)
    return jax.tree.unflatten(treedef, leaves)


def everywhere(is_so: Callable, tree: Any) -> jax.Array:
    """Whether something holds for every entry of a tree."""
    return jnp.all(jnp.stack([jnp.all(is_so(x)) for x in jax.tree.leaves(tree)]))


def make_model(setting: Setting, key: jax.Array) -> tuple[Any, Any]:
    """Structure and parameters of a model."""
    from flax import nnx
    from model import GPT, Size

    heads = setting.width // 32
    size = Size(setting.layers, setting.width, heads, 64, 256, setting.learning_rate)
    return nnx.split(GPT(size, size.vocabulary, jnp.float32, nnx.Rngs(params=key)))


def parameters(setting: Setting) -> int:
    """How many numbers the model has."""
    _, params = jax.eval_shape(lambda: make_model(setting, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def trainer(setting: Setting, make: Optimizer) -> Callable[..., Outcome]:
    """``(seeds, streams) -> Outcome``, all with a leading axis of runs."""
    from flax import nnx
    from model import next_token_loss

    rate, tx = learning_rate(setting), optax.with_extra_args_support(make())

    def train(seed, stream):
        structure, params = make_model(setting, jax.random.key(seed))

        def loss_fn(params, batch):
            return next_token_loss(nnx.merge(structure, params), batch)

        def step(carry, data):
            params, state = carry
            call, batch, factor, entry = data
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            grads = spoil(grads, factor, entry)
            updates, state = tx.update(grads, state, params, value=loss)
            skipped = everywhere(lambda u: u == 0, updates)
            updates = optax.tree.scale(rate(call), updates)
            return (optax.apply_updates(params, updates), state), (loss, skipped)

        data = jnp.arange(setting.calls), stream.batch, stream.factor, stream.entry
        start = params, tx.init(params)
        (params, _), (losses, skipped) = jax.lax.scan(step, start, data)
        parts = stream.held_out.reshape(8, -1, stream.held_out.shape[-1])
        held_out = jnp.mean(jax.lax.map(lambda part: loss_fn(params, part), parts))
        return Outcome(held_out, losses, skipped, everywhere(jnp.isfinite, params))

    return jax.jit(jax.vmap(train))


def stack(trees: list[Any]) -> Any:
    """Tuples of arrays, with a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def make_streams(grid: Grid) -> dict[str, Stream]:
    """The data of every row, with a leading axis of seeds."""
    clean = [clean_stream(grid.setting, seed) for seed in range(grid.seeds)]
    return {
        name: stack(
            [
                fault.change(stream, np.random.default_rng([seed, i]))
                for seed, stream in enumerate(clean)
            ]
        )
        for i, (name, fault) in enumerate(grid.faults.items())
    }


def run_all(
    grid: Grid, make: Optimizer, streams: dict[str, Stream], *, at_once: bool
) -> dict[str, Outcome]:
    """What becomes of every row with one optimizer; seeds are the leading axis.

    An accelerator trains all of it at once, a CPU row by row: for its cores the runs of
    one row are enough.
    """
    train, seeds = trainer(grid.setting, make), np.arange(grid.seeds)
    if not at_once:
        return {name: jax.device_get(train(seeds, x)) for name, x in streams.items()}
    rows = jax.tree.map(lambda *xs: np.concatenate(xs), *streams.values())
    found = jax.device_get(train(np.tile(seeds, len(streams)), rows))
    parts = zip(*(np.split(x, len(streams)) for x in found), strict=True)
    return dict(zip(streams, map(Outcome._make, parts), strict=True))


# --- what became of them --------------------------------------------------------------


def excess(found: Outcome, base: Outcome, faulty: np.ndarray) -> list[float | None]:
    """Mean loss above that of the base over the first clean calls after the fault.

    Empty where there is no fault, or no call after it.
    """
    rows = []
    if faulty[:, -1].any() or not faulty.any():
        return rows
    for loss, usual, where in zip(found.losses, base.losses, faulty, strict=True):
        after = at(int(np.flatnonzero(where)[-1]) + 1, AFTER)
        rows.append(none_if_dead((loss - usual)[after].mean()))
    return rows


def summarise(found: Outcome, base: Outcome, faulty: np.ndarray, good: bool) -> dict:
    """One cell of the grid, seed by seed; a loss that is no number is None."""
    wrong = np.zeros_like(faulty) if good else faulty
    lost = found.held_out - base.held_out
    return {
        "held_out": [none_if_dead(x) for x in found.held_out],
        "lost": [none_if_dead(x) for x in lost],
        "excess": excess(found, base, faulty),
        "true_skips": (found.skipped & wrong).sum(1).tolist(),
        "false_skips": (found.skipped & ~wrong).sum(1).tolist(),
        "finite": found.finite.tolist(),
    }


def none_if_dead(x: float) -> float | None:
    """For JSON, which has no NaN."""
    return round(float(x), 5) if math.isfinite(x) else None


def measure(name: str, grid: Grid) -> dict[str, dict[str, Any]]:
    """All cells of a grid: optimizer, then row."""
    streams = make_streams(grid)

    def train(optimizer: str) -> dict[str, Outcome]:
        start = time.perf_counter()
        make = grid.optimizers[optimizer]
        found = run_all(grid, make, streams, at_once=not on_cpu())
        seconds = time.perf_counter() - start
        sys.stderr.write(f"{name}: {optimizer}, {seconds:.0f} s\n")
        return found

    # An accelerator waits for the compiler, which a CPU has no cores to spare for.
    workers = 1 if on_cpu() else 8
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        each = pool.map(train, grid.optimizers)
    outcomes = dict(zip(grid.optimizers, each, strict=True))
    return {
        optimizer: {
            row: compare(row, grid.faults[row], found, outcomes[CLIP], streams)
            for row in grid.faults
        }
        for optimizer, found in outcomes.items()
    }


def compare(
    row: str,
    fault: Fault,
    found: dict[str, Outcome],
    clipped_runs: dict[str, Outcome],
    streams: dict[str, Stream],
) -> dict[str, Any]:
    """One cell: a row of one optimizer against what the fault says."""
    base = found[fault.against] if fault.against else clipped_runs[row]
    faulty = faulty_calls(streams[row], streams[fault.against or "clean"])
    return summarise(found[row], base, faulty, fault.good)


# --- tables ---------------------------------------------------------------------------


def cell(values: list[float | None], noise: bool = False) -> str:
    """The mean over seeds; how many runs are dead."""
    alive = [x for x in values if x is not None]
    dead = len(values) - len(alive)
    if not alive:
        return "**NaN**"
    if noise:
        return f"±{statistics.fmean(map(abs, alive)):.3f}"
    mean = f"{statistics.fmean(alive):+.3f}"
    return f"{mean}, **{dead} NaN**" if dead else mean


def loss_table(grid: str, cells: dict[str, Any], optimizers: list[str]) -> str:
    """What every fault costs, in nats."""
    faults = GRIDS[grid].faults
    rows = [
        [
            row,
            *[cell(cells[each][row]["lost"], faults[row].noise) for each in optimizers],
        ]
        for row in cells[optimizers[0]]
    ]
    return markdown(["fault", *optimizers], rows)


def skip_table(cells: dict[str, Any], optimizers: list[str]) -> str:
    """Steps skipped per run: faulty ones / good ones."""
    rows = []
    for row in cells[optimizers[0]]:
        each = [cells[name][row] for name in optimizers]
        means = [
            [statistics.fmean(x[key]) for key in ("true_skips", "false_skips")]
            for x in each
        ]
        rows.append([row, *[f"{true:g} / {false:g}" for true, false in means]])
    return markdown(["skipped: faulty / good", *optimizers], rows)


def excess_table(cells: dict[str, Any], optimizers: list[str]) -> str:
    """Mean loss above that of the base over the first good steps after a fault."""
    rows = [
        [row, *[cell(cells[name][row]["excess"]) for name in optimizers]]
        for row in cells[optimizers[0]]
        if cells[optimizers[0]][row]["excess"]
    ]
    return markdown([f"over {AFTER} calls after", *optimizers], rows)


def peers_table(report: Report) -> str:
    """Loss: the peers and ours."""
    return loss_table(report["grid"], report["cells"], [*PEERS, OURS])


def peers_skips(report: Report) -> str:
    """Skips: the rules that skip."""
    names = [name for name in PEERS if "skip" in name or "if_finite" in name]
    return skip_table(report["cells"], [*names, OURS])


def parts_table(report: Report) -> str:
    """Loss: ours, and ours with one part changed."""
    return loss_table(report["grid"], report["cells"], [OURS, *PARTS])


def grid_table(report: Report) -> str:
    """Loss: every optimizer of a grid."""
    return loss_table(report["grid"], report["cells"], list(report["cells"]))


def tables(report: Report) -> dict[str, str]:
    """Loss, excess and skips of one grid."""
    grid, cells = report["grid"], report["cells"]
    runs = f"{report['parameters']:,} parameters, {report['seeds']} seeds"
    names = list(cells)
    found = {
        f"{grid}: held-out loss, in nats, {runs}": grid_table(report),
        f"{grid}: excess loss": excess_table(cells, names),
    }
    if report["setting"]["calls_per_step"] == 1:  # Most mini-steps give no update.
        found[f"{grid}: steps skipped"] = skip_table(cells, names)
    return found


def main() -> None:
    """Trains, prints the tables and writes the JSON."""
    options = parser(__doc__)
    options.add_argument("--grid", choices=tuple(GRIDS), nargs="+", help="only these")
    flags = options.parse_args()
    for name in flags.grid or (["small"] if flags.quick else GRIDS):
        grid = QUICK if flags.quick else GRIDS[name]
        report = {
            "grid": name,
            "setting": grid.setting._asdict(),
            "seeds": grid.seeds,
            "parameters": parameters(grid.setting),
            "cells": measure(name, grid),
        }
        finish(f"stability_{name}", report, tables, quick=flags.quick)


if __name__ == "__main__":
    main()
