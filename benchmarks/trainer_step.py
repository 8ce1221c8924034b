"""What the stability chain costs in a step of the GPT trainer.

The whole step of ``examples/gpt``, loss, gradient and update, with its chain as it is
by default (record, noise scale, guard, adaptive clip, safe Adam, flight recorder),
against a step as short as it can be: a scan that adds the gradients of the microbatches
up, then optax's global-norm clip and AdamW (``plain_step.py``). Both run in one process
and take turns, ten steps at a time: some numbers are measured at every tenth step, and
a block holds one such. Compared are the medians of the ratios of neighbouring blocks;
memory is XLA's analysis.

    python benchmarks/trainer_step.py            # small; on accelerators gpt2 as well
    python benchmarks/trainer_step.py --quick    # tiny, few rounds, no JSON
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from reporting import (
    Report,
    devices_with,
    hardware,
    markdown,
    on_cpu,
    quartiles,
    run_suite,
)
from step_cost import summary

sys.path.append(str(Path(__file__).parents[1] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "examples" / "gpt"))
import devices
import training
from config import Config
from model import SIZES
from pace import peak_flops
from plain_step import make_plain_step

BLOCK = training.MEASURE_EVERY
BASELINE, OURS = "a plain step", "the stability chain"
ROUNDS = 7
TINY = Config(size="tiny", batch_size=8)
SMALL = Config(size="small", batch_size=8)
GPT2 = Config(size="gpt2", dtype="bfloat16", batch_size=16)
SIDES = {
    BASELINE: {"baseline": True},
    OURS: {},
    "the same without a guard": {"on_spike": "rewind"},
    "plain optax in the trainer": {"baseline": True},
}


class Program(NamedTuple):
    """A compiled step of the trainer.

    Attributes:
      steps: by ``look``, each takes the state and a batch of windows.
      state: what it starts with.
      windows: int32[batch, context + 1].
      parameters: of the model.
      compile_s: seconds that tracing and compiling took.
    """

    steps: dict[bool | None, Any]
    state: Any
    windows: jax.Array
    parameters: int
    compile_s: float


def build(name: str, config: Config) -> Program:
    """Compiles the step of a side."""
    size = SIZES[config.size]
    model, optimizer = nnx.jit(lambda: training.create(config, size.vocabulary))()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    graphdef, arrays = nnx.split((model, optimizer))
    state = training.TrainState(arrays, training.start_loss_scale(config))
    plain_step = make_plain_step(graphdef, config.microbatches)
    shape = config.batch_size, size.context + 1
    windows = jax.random.randint(jax.random.key(0), shape, 0, size.vocabulary)
    # As the trainer does: lists are handed over much faster than states of NNX.
    leaves, structure = jax.tree.flatten(state)

    def step(leaves, windows, look):
        state = jax.tree.unflatten(structure, leaves)
        if name == BASELINE:
            arrays, metrics = plain_step(state.arrays, windows)
            state = state._replace(arrays=arrays)
        else:
            state, metrics = training.train_step(
                graphdef, config, state, windows, {}, look
            )
        return jax.tree.leaves(state), metrics

    jitted = jax.jit(step, donate_argnums=0, static_argnums=2)
    start = time.perf_counter()
    looks = {devices.look(i, BLOCK) for i in range(BLOCK)}
    programs = {look: jitted.lower(leaves, windows, look).compile() for look in looks}
    seconds = time.perf_counter() - start
    return Program(programs, leaves, windows, parameters, seconds)


def run_block(program: Program) -> tuple[Program, float]:
    """Ten steps: the program as it is after them, and seconds per step."""
    state, start = program.state, time.perf_counter()
    for i in range(BLOCK):
        state, _ = program.steps[devices.look(i, BLOCK)](state, program.windows)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - start) / BLOCK
    return program._replace(state=state), seconds


def run_alternately(programs: dict[str, Program], rounds: int) -> dict[str, np.ndarray]:
    """Seconds per step of every side in every round; a first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name in programs:
            programs[name], taken = run_block(programs[name])
            seconds[name].append(taken)
    return {name: np.array(taken[1:]) for name, taken in seconds.items()}


def measure(
    base: Config, rounds: int, sides: dict[str, dict[str, bool]]
) -> dict[str, dict[str, Any]]:
    """Time, memory and compile time of every side."""
    programs = {
        name: build(name, dataclasses.replace(base, **flags))
        for name, flags in sides.items()
    }
    seconds, peak = run_alternately(programs, rounds), peak_flops()
    rows = {}
    for name, program in programs.items():
        temp = max(
            step.memory_analysis().temp_size_in_bytes for step in program.steps.values()
        )
        size = SIZES[base.size]
        tokens = base.batch_size * size.context
        flops = tokens * size.flops_per_token(program.parameters)
        rows[name] = {
            "parameters": program.parameters,
            "ms": summary(list(seconds[name]), 1e3),
            "time_ratio": summary(list(seconds[name] / seconds[BASELINE]), 1.0),
            "temp_mb": round(temp / 1e6, 1),
            "compile_s": round(program.compile_s, 1),
            "tokens_per_second": round(tokens / np.median(seconds[name])),
            "mfu": peak and round(flops / np.median(seconds[name]) / peak, 3),
        }
    return rows


def make_report(quick: bool) -> Report:
    """Every case that suits the device."""
    chosen = (TINY,) if quick else (SMALL,) if on_cpu() else (SMALL, GPT2)
    names = (BASELINE, OURS) if quick else SIDES
    sides, found = {name: SIDES[name] for name in names}, {}
    for case in chosen:
        rows = measure(case, 2 if quick else ROUNDS, sides)
        size = SIZES[case.size]
        tokens = case.batch_size * size.context
        parameters = rows[BASELINE]["parameters"] / 1e6
        title = f"GPT {case.size}, {parameters:.1f}M parameters, {tokens} tokens"
        found[f"{title}, {case.dtype}"] = rows
    return {"cases": found}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        [
            name,
            f"{row['ms']['median']:.1f}",
            quartiles(row["time_ratio"], 2),
            f"{row['temp_mb']:.1f}",
            f"{row['compile_s']:.1f}",
            f"{row['tokens_per_second']:,}",
        ]
        for name, row in rows.items()
    ]
    head = ["step with", "ms", "time", "temp MB", "compile s", "tokens/s"]
    return markdown(head, lines)


def tables(report: Report) -> dict[str, str]:
    """One table per case."""
    return {title: table(rows) for title, rows in report["cases"].items()}


def readme_table(report: Report) -> str:
    """This result and those of the other devices, as the docs show them."""
    others = devices_with("trainer_step").values()
    lines = [
        [title, f"{hardware(each)}, JAX {each['jax']}, {each['date']}", *sides_of(rows)]
        for each in (report, *[x for x in others if x["device"] != report["device"]])
        for title, rows in each["cases"].items()
    ]
    head = ["whole step of the trainer", "on", "against", "", "the chain", "time"]
    return markdown(head, lines)


def sides_of(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The baseline, milliseconds of both sides, and the ratio.

    Reports from before 2026-11-30 have plain optax in the trainer as their baseline.
    """
    baseline = next(iter(rows))
    plain, ours = (rows[name]["ms"]["median"] for name in (baseline, OURS))
    ratio = quartiles(rows[OURS]["time_ratio"], 2)
    return [baseline, f"{plain:.1f} ms", f"{ours:.1f} ms", ratio]


if __name__ == "__main__":
    run_suite("trainer_step", __doc__, make_report, tables)
