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
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contenders import CLIP, OURS, PARTS, PEERS, Optimizer
from faulty_streams import Setting, Stream, at, clean_stream, faulty_calls
from grids import GRIDS, QUICK, Fault, Grid
from reporting import Report, finish, markdown, on_cpu, parser

import optax_stability as ost

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gpt"))

AFTER = 40  # clean steps after a fault over which its excess loss is averaged
FEW, BEHIND = 5, 0.2  # a mean over so many calls so far above the base is behind


class Outcome(NamedTuple):
    """What became of a run.

    Attributes:
      held_out: float32[] – loss at the end, nats per byte.
      in_use: float32[] – the same of the parameters in use, if a branch is open.
      losses: float32[calls] – of every batch, before its step.
      skipped: bool[calls] – whether the update was all zeros.
      probed: bool[calls] – whether the loss is that of parameters kept aside.
      finite: bool[] – whether every parameter was, at the end.
    """

    held_out: Any
    in_use: Any
    losses: Any
    skipped: Any
    probed: Any
    finite: Any


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


def loss_of(structure: Any) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """``(params, batch, labels) -> loss`` of a model, nats per byte."""
    from flax import nnx

    def loss_fn(params, batch, labels):
        logits = nnx.merge(structure, params)(batch[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    return loss_fn


def held_out_loss(loss_fn: Callable, params: Any, stream: Stream) -> jax.Array:
    """The loss on the text that no run is trained on, part by part."""
    parts = stream.held_out.reshape(8, -1, stream.held_out.shape[-1])
    return jnp.mean(jax.lax.map(lambda x: loss_fn(params, x, x[:, 1:]), parts))


def parameters(setting: Setting) -> int:
    """How many numbers the model has."""
    _, params = jax.eval_shape(lambda: make_model(setting, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def branch_of(params: Any, state: Any) -> tuple[Any, Any]:
    """The parameters to evaluate, and whether the last loss was another's."""
    if not isinstance(state, ost.BranchOnSpikeState):
        return params, jnp.zeros((), bool)
    return ost.eval_params(params, state), state.probed


def trainer(setting: Setting, make: Optimizer) -> Callable[..., Outcome]:
    """``(seeds, streams) -> Outcome``, all with a leading axis of runs."""
    rate, tx = learning_rate(setting), optax.with_extra_args_support(make())

    def train(seed, stream):
        structure, params = make_model(setting, jax.random.key(seed))
        loss_fn = loss_of(structure)

        def step(carry, data):
            params, state = carry
            call, batch, labels, factor, entry = data
            loss, grads = jax.value_and_grad(loss_fn)(params, batch, labels)
            grads = spoil(grads, factor, entry)
            updates, state = tx.update(
                grads, state, params, value=loss, rate=rate(call)
            )
            # The very first learning rate is 0.
            skipped = everywhere(lambda u: u == 0, updates) & (rate(call) > 0)
            params = optax.apply_updates(params, updates)
            _, probed = branch_of(params, state)
            return (params, state), (loss, skipped, probed)

        data = jnp.arange(setting.calls), *stream[:4]
        start = params, tx.init(params)
        (params, state), seen = jax.lax.scan(step, start, data)

        def evaluate(params):
            return held_out_loss(loss_fn, params, stream)

        held_out = evaluate(branch_of(params, state)[0])
        finite = everywhere(jnp.isfinite, params)
        return Outcome(held_out, evaluate(params), *seen, finite)

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


def followed(loss: np.ndarray, probed: np.ndarray) -> np.ndarray:
    """A loss without probes, each value the mean of the last FEW."""
    kept = np.where(probed, np.nan, loss)
    padded = np.pad(kept, (FEW - 1, 0), constant_values=np.nan)
    return np.nanmean(np.lib.stride_tricks.sliding_window_view(padded, FEW), axis=1)


def delay(found: Outcome, base: Outcome, since: int | None) -> list[int]:
    """Calls since then in which the loss is more than BEHIND above that of the base."""
    if since is None:
        return []
    runs = zip(found.losses, found.probed, base.losses, strict=True)
    return [
        int(
            (followed(loss, probed) > followed(usual, ~np.isfinite(usual)) + BEHIND)[
                since:
            ].sum()
        )
        for loss, probed, usual in runs
    ]


def summarise(found: Outcome, base: Outcome, faulty: np.ndarray, fault: Fault) -> dict:
    """One cell of the grid, seed by seed; a loss that is no number is None."""
    wrong = np.zeros_like(faulty) if fault.good else faulty
    ends = fault.since is None
    held_out = found.held_out if ends else found.in_use
    return {
        "held_out": [none_if_dead(x) for x in held_out],
        "lost": [none_if_dead(x) for x in held_out - base.held_out],
        "excess": excess(found, base, faulty) if ends else [],
        "delay": delay(found, base, fault.since),
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
    return summarise(found[row], base, faulty, fault)


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
    """What every fault costs, in nats, and for how long a run is behind."""
    faults = GRIDS[grid].faults
    rows = []
    for row in cells[optimizers[0]]:
        each = [cells[name][row] for name in optimizers]
        costs = [cell(x["lost"], faults[row].noise) for x in each]
        behind = [
            f" ({statistics.fmean(x['delay']):.0f})" if x.get("delay") else ""
            for x in each
        ]
        rows.append([row, *map("".join, zip(costs, behind, strict=True))])
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


# What the README shows of it: faults, then what is no fault.
SHORT_ROWS = """NaN at 120; 7 NaN at 120; 5 random batches at 120; loss scale 1e-12;
clean; new domain from 120 on"""
SHORT_SIDES = CLIP, "apply_if_finite of it", "MaxText, OLMo skip", OURS


def short_table(report: Report) -> str:
    """Loss: a few rows, and the sides that most readers know."""
    rows = " ".join(SHORT_ROWS.split()).split("; ")
    cells = {
        name: {row: report["cells"][name][row] for row in rows} for name in SHORT_SIDES
    }
    return loss_table(report["grid"], cells, list(SHORT_SIDES))


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
