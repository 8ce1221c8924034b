"""What the stability chain costs in a step of the GPT trainer.

The whole step of ``examples/gpt``, loss, gradient and update, with its chain as it is
by default (record, noise scale, guard, adaptive clip, safe Adam, flight recorder),
against the same step with plain optax (``--baseline``: global-norm clip and AdamW).
Both run in one process and take turns, ten steps at a time: some numbers are measured
at every tenth step, and a block holds one such. Compared are the medians of the ratios
of neighbouring blocks; memory is XLA's analysis.

    python benchmarks/trainer_step.py                # small; writes results/*.json
    python benchmarks/trainer_step.py --size gpt2    # for a GPU
    python benchmarks/trainer_step.py --quick        # tiny, few rounds, no JSON
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from accumulation import machine
from flax import nnx
from step_cost import RESULTS, summary

sys.path.append(str(Path(__file__).parents[1] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "examples" / "gpt"))
import training
from config import Config
from model import SIZES
from pace import peak_flops

BLOCK = training.SELDOM
BASELINE, OURS = "plain optax", "the stability chain"
SIDES = {
    BASELINE: {"baseline": True},
    OURS: {},
    "the same without a guard": {"guard": False},
}


class Program(NamedTuple):
    """A compiled step of the trainer.

    Attributes:
      step: takes the state and a batch of windows.
      state: what it starts with.
      windows: int32[batch, context + 1].
      parameters: of the model.
      compile_s: seconds that tracing and compiling took.
    """

    step: Any
    state: Any
    windows: jax.Array
    parameters: int
    compile_s: float


def build(config: Config) -> Program:
    """Compiles the step of a configuration."""
    size = SIZES[config.size]
    model, optimizer = nnx.jit(lambda: training.create(config, size.vocabulary))()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    graphdef, arrays = nnx.split((model, optimizer))
    state = training.TrainState(arrays, training.start_loss_scale(config))
    shape = config.batch_size, size.context + 1
    windows = jax.random.randint(jax.random.key(0), shape, 0, size.vocabulary)
    # As the trainer does: lists are handed over much faster than states of NNX.
    leaves, structure = jax.tree.flatten(state)

    def step(leaves, windows):
        state = jax.tree.unflatten(structure, leaves)
        state, metrics = training.train_step(graphdef, config, state, windows, {})
        return jax.tree.leaves(state), metrics

    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(leaves, windows).compile()
    seconds = time.perf_counter() - start
    return Program(compiled, leaves, windows, parameters, seconds)


def run_block(program: Program) -> tuple[Program, float]:
    """Ten steps: the program as it is after them, and seconds per step."""
    state, start = program.state, time.perf_counter()
    for _ in range(BLOCK):
        state, _ = program.step(state, program.windows)
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


def measure(base: Config, rounds: int) -> dict[str, dict[str, Any]]:
    """Time, memory and compile time of every side."""
    programs = {
        name: build(dataclasses.replace(base, **flags)) for name, flags in SIDES.items()
    }
    seconds, peak = run_alternately(programs, rounds), peak_flops()
    rows = {}
    for name, program in programs.items():
        memory = program.step.memory_analysis()
        size = SIZES[base.size]
        tokens = base.batch_size * size.context
        flops = tokens * size.flops_per_token(program.parameters)
        rows[name] = {
            "parameters": program.parameters,
            "ms": summary(list(seconds[name]), 1e3),
            "time_ratio": summary(list(seconds[name] / seconds[BASELINE]), 1.0),
            "temp_mb": round(memory.temp_size_in_bytes / 1e6, 1),
            "compile_s": round(program.compile_s, 1),
            "tokens_per_second": round(tokens / np.median(seconds[name])),
            "mfu": peak and round(flops / np.median(seconds[name]) / peak, 3),
        }
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| step with | ms | time | temp MB | compile s | tokens/s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        ratio = row["time_ratio"]
        lines.append(
            f"| {name} | {row['ms']['median']:.1f} "
            f"| {ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f}) "
            f"| {row['temp_mb']:.1f} | {row['compile_s']:.1f} "
            f"| {row['tokens_per_second']:,} |"
        )
    return "\n".join(lines)


def readme_table() -> str:
    """All results that are kept, as the README shows them."""
    lines = [
        "| whole step of the trainer | on | plain optax | the chain | time |",
        "|---|---|--:|--:|--:|",
    ]
    for path in sorted(RESULTS.glob("trainer_step_*.json")):
        report = json.loads(path.read_text())
        rows, device = report["rows"], report["device"]
        device = "two CPU cores" if device == "cpu" else device
        plain, ours = (rows[name]["ms"]["median"] for name in (BASELINE, OURS))
        ratio = rows[OURS]["time_ratio"]
        lines.append(
            f"| {report['title']} | {device} | {plain:.1f} ms | {ours:.1f} ms "
            f"| {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny, few rounds")
    flags = parser.parse_args()
    size, rounds = ("tiny", 2) if flags.quick else (flags.size, flags.rounds)
    config = Config(size=size, dtype=flags.dtype, batch_size=flags.batch_size)
    rows = measure(config, rounds)
    parameters = rows[BASELINE]["parameters"] / 1e6
    tokens = flags.batch_size * SIZES[size].context
    title = f"GPT {size}, {parameters:.1f}M parameters, {tokens} tokens, {flags.dtype}"
    sys.stdout.write(f"{title}\n\n{table(rows)}\n")
    if not flags.quick:
        RESULTS.mkdir(exist_ok=True)
        report = machine() | {"title": title, "rows": rows}
        name = f"trainer_step_{size}_{jax.default_backend()}.json"
        (RESULTS / name).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
