"""How costs grow: with parameters, with leaves, with K, with the length of the history.

The chains are those of ``step_cost.py``; all sides of a row run in one process, taking
turns, and are compared as ratios. Parameters go as far as the memory of the device
allows; leaves share 4M parameters, so that only their number grows.

    python benchmarks/growth.py            # writes results/*.json
    python benchmarks/growth.py --quick    # the first of every kind, no JSON
"""

import os
import sys
from typing import Any

import accumulation
import jax
import jax.numpy as jnp
import optax
import step_cost
from reporting import Report, markdown, quartiles, run_suite
from step_cost import STEP_MOVES, Case

import optax_stability as ost

PLAIN, OURS = "clip_by_global_norm + adamw", "clip_by_zscore + safe_adamw"
GUARDED = "spike_guard of it"
SIDES = {
    PLAIN: step_cost.optax_chain,
    OURS: step_cost.stability_chain,
    GUARDED: step_cost.guarded_chain,
}
PARAMETERS = (10**6, 10**7, 10**8, 10**9)
# What the sides, their state, the gradient and the copy take together.
BYTES_PER_PARAMETER = 80
LEAVES = (10, 100, 1000)
ALL_LEAVES = 4_000_000
MICROBATCHES = (2, 8, 32)
LENGTHS = (64, 256, 4096)


def memory() -> int:
    """Bytes that the device has."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def square_leaves(count: int, entries: int) -> dict[str, tuple[int, int]]:
    """The shapes of so many matrices with about so many entries in all."""
    side = round((entries / count) ** 0.5)
    return {f"leaf_{i}": (side, side) for i in range(count)}


def compare(shapes: dict[str, tuple[int, int]], rounds: int) -> dict[str, Any]:
    """All sides on parameters of these shapes, with the gradient of a small loss."""
    params = step_cost.draw(shapes, jax.random.key(0), 0.1)
    moves = dict.fromkeys(SIDES, STEP_MOVES)
    differentiate = jax.value_and_grad(step_cost.small_loss)
    case = Case(SIDES, params, jnp.float32(0.1), differentiate, moves)
    return step_cost.measure(case, rounds=rounds, compile_rounds=0)


def by_parameters(sizes: tuple[int, ...]) -> dict[str, Any]:
    """The sides at these numbers of parameters, in 16 matrices."""
    found = {}
    for size in sizes:
        if size * BYTES_PER_PARAMETER > memory():
            sys.stderr.write(f"{size:,} parameters do not fit\n")
            continue
        rounds = max(7, min(41, 2 * 10**9 // size))
        found[str(size)] = compare(square_leaves(16, size), rounds)
    return found


def by_leaves(counts: tuple[int, ...]) -> dict[str, Any]:
    """The sides at these numbers of leaves."""
    return {str(n): compare(square_leaves(n, ALL_LEAVES), 15) for n in counts}


def by_microbatches(counts: tuple[int, ...], size: int) -> dict[str, Any]:
    """``MultiSteps`` and ours, whole cycles of K calls."""
    params = step_cost.draw(square_leaves(16, size), jax.random.key(0), 0.1)
    grads, found = step_cost.gradient_like(params), {}
    for k in counts:
        programs = {}
        for make in (accumulation.multi_steps, accumulation.with_squares):
            step = step_cost.make_step(make(k), step_cost.given)
            state = make(k).init(params)
            programs[make.__name__] = accumulation.build(step, params, state, grads)
        seconds = accumulation.run_alternately(programs, 11, k)
        theirs, ours = (each.sum(1) for each in seconds.values())
        found[str(k)] = {
            "multi_steps_ms": step_cost.summary(list(theirs), 1e3),
            "cycle_ms": step_cost.summary(list(ours), 1e3),
            "cycle_ratio": accumulation.compare(ours, theirs),
        }
    return found


def recorded(length: int) -> Any:
    """The guarded chain in a history of that length."""
    recording = step_cost.recording_chain(1000)
    return ost.record_history(recording, length=length, slow_every=1000)


def by_length(lengths: tuple[int, ...], size: int) -> dict[str, Any]:
    """The chain in histories of these lengths, against the chain alone."""
    params = step_cost.draw(square_leaves(16, size), jax.random.key(0), 0.1)
    sides = {"no history": step_cost.norms_recorded_alone}
    sides |= {str(n): lambda n=n: recorded(n) for n in lengths}
    differentiate = jax.value_and_grad(step_cost.small_loss)
    case = Case(sides, params, jnp.float32(0.1), differentiate)
    rows = step_cost.measure(case, rounds=21, compile_rounds=0)
    alone = state_bytes(step_cost.norms_recorded_alone(), params)
    for n in lengths:
        rows[str(n)]["history_bytes"] = state_bytes(recorded(n), params) - alone
    return rows


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """Size of a state."""
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def make_report(quick: bool) -> Report:
    """Everything, or the first of every kind."""
    few = slice(1) if quick else slice(None)
    size = 10**5 if quick else 10**7
    return {
        "parameters": by_parameters(PARAMETERS[few]),
        "leaves": by_leaves(LEAVES[few]),
        "microbatches": by_microbatches(MICROBATCHES[few], size),
        "history": by_length(LENGTHS[few], size),
    }


def sides_table(what: str, found: dict[str, Any]) -> str:
    """Time, distance from the floor and compile time of the sides, by a number."""
    head = [what, f"{PLAIN}, ms"]
    head += [f"{OURS}, time", f"{GUARDED}, time", "× floor, each", "compile s, each"]
    lines = []
    for number, rows in found.items():
        first, *others = rows.values()
        lines.append(
            [
                f"{int(number):,}",
                quartiles(first["ms"], 1),
                *[f"{row['time_ratio']:.2f}" for row in others],
                " / ".join(f"{row['floor_ratio']:.2f}" for row in rows.values()),
                " / ".join(
                    f"{row['compile_s']['median']:.1f}" for row in rows.values()
                ),
            ]
        )
    return markdown(head, lines)


def parameters_table(report: Report) -> str:
    """By parameters."""
    return sides_table("parameters", report["parameters"])


def leaves_table(report: Report) -> str:
    """By leaves."""
    return sides_table("leaves of 4M parameters", report["leaves"])


def microbatch_table(report: Report) -> str:
    """Whole cycles, by K."""
    lines = [
        [
            k,
            f"{row['multi_steps_ms']['median'] / int(k):.1f}",
            f"{row['cycle_ms']['median'] / int(k):.1f}",
            quartiles(row["cycle_ratio"], 2),
        ]
        for k, row in report["microbatches"].items()
    ]
    head = ["K", "MultiSteps, ms a call", "accumulate_moments, ms a call", "cycle"]
    return markdown(head, lines)


def history_table(report: Report) -> str:
    """Time and size, by length."""
    lines = [
        [
            name,
            quartiles(row["ms"], 1),
            f"{row['time_ratio']:.2f}",
            f"{row.get('history_bytes', 0) / 1e3:,.0f}",
        ]
        for name, row in report["history"].items()
    ]
    return markdown(["length", "ms", "time", "kB"], lines)


def tables(report: Report) -> dict[str, str]:
    """One table per question."""
    return {
        "Parameters": parameters_table(report),
        "Leaves": leaves_table(report),
        "Microbatches": microbatch_table(report),
        "Length of the history": history_table(report),
    }


if __name__ == "__main__":
    run_suite("growth", __doc__, make_report, tables)
