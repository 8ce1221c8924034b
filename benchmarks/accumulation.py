"""What gradient accumulation costs: across steps and inside one.

*Across steps* ``accumulate_moments`` stands in the place of ``optax.MultiSteps``, both
around AdamW with K = 8. *Inside a step* ``microbatch_gradients`` stands in the place of
a ``lax.scan`` written by hand, on the GPT of ``examples/gpt``, with K = 4.

All sides of a table run in one process, taking turns call by call, and are compared as
medians of the ratios of neighbouring calls: that survives a noisy machine. Memory,
copies and operations come from XLA's analysis of the compiled program and do not drift.

    python benchmarks/accumulation.py            # prints, writes results/*.json
    python benchmarks/accumulation.py --quick    # small models, few rounds, no JSON
"""

import functools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import step_cost
from jax import lax
from reporting import Report, markdown, quartiles, run_suite
from step_cost import LEARNING_RATE

import optax_stability as ost

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gpt"))

CALLS = 8  # per step of the optimizer, across steps
MICROBATCHES = 4  # inside a step
MULTI_STEPS = "MultiSteps(adamw)"
BY_HAND, BY_HAND_SQUARES = "by hand", "by hand, with Σg²"

_COPY = re.compile(r"= \w+\[([\d,]*)\]\S* copy\(")


class Program(NamedTuple):
    """One side of a comparison, compiled.

    Attributes:
      step: ``(params, state, batch) -> (params, state, …)``, the first two donated.
      arguments: parameters and state; replaced after each call.
      batch: what every call is given.
    """

    step: Any
    arguments: list
    batch: Any


class Gpt(NamedTuple):
    """A model to accumulate gradients of.

    Attributes:
      params: its parameters.
      loss_fn: ``(params, windows) -> loss``.
      batch: int[rows, tokens + 1], for all microbatches together.
    """

    params: Any
    loss_fn: Callable
    batch: jax.Array


class Scale(NamedTuple):
    """How much is measured.

    Attributes:
      shapes: parameters of the optimizer that accumulates across steps.
      cycles: of ``CALLS`` calls each.
      steps: name to shape of the GPT, rows per microbatch and timed steps.
      tokens: (rows, length) of the microbatches whose memory is compared.
    """

    shapes: dict[str, Any]
    cycles: int
    steps: dict[str, tuple[tuple[int, ...], int, int]]
    tokens: list[tuple[int, int]]


# (layers, width, heads, context, vocabulary) as in SIZES of examples/gpt/model.py.
TINY, SMALL = (4, 128, 4, 128, 256), (6, 384, 6, 256, 256)
FULL = Scale(
    step_cost.transformer_shapes(512, 9, 8192),
    cycles=21,
    # Two rows per microbatch: the batch of 8 that the example trains with.
    steps={"0.8M": (TINY, 2, 31), "10.8M": (SMALL, 2, 15)},
    tokens=[(1, 32), (1, 256), (2, 256), (4, 256)],
)
QUICK = Scale(
    step_cost.transformer_shapes(160, 1, 2048),
    cycles=3,
    steps={"0.3M": ((1, 128, 4, 64, 256), 2, 3)},
    tokens=[],
)


# --- one compiled step ----------------------------------------------------------------


def build(step: Callable, params: Any, state: Any, batch: Any) -> Program:
    """Compiles a step that donates parameters and state."""
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
    # Copies, because the step donates its arguments.
    arguments = [jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, state)]
    return Program(lowered.compile(), arguments, batch)


def run_once(program: Program) -> float:
    """Seconds for one call."""
    start = time.perf_counter()
    program.arguments[:] = program.step(*program.arguments, program.batch)[:2]
    jax.block_until_ready(program.arguments)
    return time.perf_counter() - start


def run_alternately(
    programs: dict[str, Program], rounds: int, calls: int
) -> dict[str, np.ndarray]:
    """Seconds of every call, [rounds, calls], after one round that is not counted."""
    seconds = {name: np.empty((rounds + 1, calls)) for name in programs}
    rng, order = np.random.default_rng(0), list(programs)
    for place in np.ndindex(rounds + 1, calls):
        # What a call leaves in caches and free pages is not to fall to the same side.
        rng.shuffle(order)
        for name in order:
            seconds[name][place] = run_once(programs[name])
    return {name: each[1:] for name, each in seconds.items()}


def count_copies(program: Program) -> int:
    """Copies of arrays that are shaped like a parameter, in the compiled program."""
    leaves = jax.tree.leaves(program.arguments[0])
    shapes = {",".join(map(str, leaf.shape)) for leaf in leaves}
    return sum(shape in shapes for shape in _COPY.findall(program.step.as_text()))


def analysis(program: Program) -> dict[str, Any]:
    """What XLA says of a compiled step; it counts the body of a loop once."""
    size = step_cost.count(program.arguments[0])
    temp = program.step.memory_analysis().temp_size_in_bytes
    return {
        "parameters": size,
        "temp_mb": round(temp / 1e6, 3),
        "temp_bytes_per_parameter": round(temp / size, 4),
        "gflops": round(program.step.cost_analysis()["flops"] / 1e9, 6),
        "copies": count_copies(program),
    }


def compare(seconds: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Median and quartiles of the ratio of what ran next to each other."""
    return step_cost.summary(list(seconds / base), 1.0)


# --- across steps ---------------------------------------------------------------------


def multi_steps(calls: int = CALLS) -> optax.GradientTransformation:
    """What optax offers."""
    steps = optax.MultiSteps(step_cost.plain_adamw(), calls)
    return steps.gradient_transformation()


def with_squares(calls: int = CALLS) -> optax.GradientTransformation:
    """Σg² is kept, and Adam reads it."""
    inner = ost.safe_adamw(LEARNING_RATE, second_moment="microbatch")
    return ost.accumulate_moments(inner, calls)


def with_adamw() -> optax.GradientTransformation:
    """Σg² is kept, for whoever wants it."""
    return ost.accumulate_moments(step_cost.plain_adamw(), CALLS)


def without_squares() -> optax.GradientTransformation:
    """Only the mean is kept, as in MultiSteps."""
    return ost.accumulate_moments(step_cost.plain_adamw(), CALLS, mean_square=False)


ACROSS = {
    MULTI_STEPS: multi_steps,
    "accumulate_moments(safe_adamw), reads Σg²": with_squares,
    "accumulate_moments(adamw)": with_adamw,
    "accumulate_moments(adamw), no Σg²": without_squares,
}


def accumulators(
    params: Any, batch: Any, differentiate: Callable
) -> dict[str, Program]:
    """Every way to accumulate across steps, compiled."""
    programs = {}
    for name, make in ACROSS.items():
        step = step_cost.make_step(make(), differentiate)
        programs[name] = build(step, params, make().init(params), batch)
    return programs


def measure_across(programs: dict[str, Program], cycles: int) -> dict[str, Any]:
    """Mini-steps and cycles of every side, and what XLA says of it."""
    seconds = run_alternately(programs, cycles, CALLS)
    rows = {name: analysis(program) for name, program in programs.items()}
    base, first = seconds[MULTI_STEPS], rows[MULTI_STEPS]
    for name, row in rows.items():
        each = seconds[name]
        # The last call of a cycle takes the step.
        row["mini_step_ms"] = step_cost.summary(list(each[:, :-1].ravel()), 1e3)
        row["cycle_ms"] = step_cost.summary(list(each.sum(1)), 1e3)
        row["mini_step_ratio"] = compare(each[:, :-1].ravel(), base[:, :-1].ravel())
        row["cycle_ratio"] = compare(each.sum(1), base.sum(1))
        row["temp_ratio"] = round(row["temp_mb"] / first["temp_mb"], 4)
    return rows


def across_cases(scale: Scale) -> dict[str, tuple[Any, Callable]]:
    """Where the gradient comes from: batch, and how to make loss and gradient of it."""
    params = parameters(scale)
    return {
        "gradient given": (step_cost.gradient_like(params), step_cost.given),
        "gradient in the same step": (
            jnp.float32(0.1),
            jax.value_and_grad(step_cost.small_loss),
        ),
    }


def parameters(scale: Scale) -> Any:
    """Parameters shaped like a GPT's."""
    return step_cost.draw(scale.shapes, jax.random.key(0), 0.1)


# --- inside a step --------------------------------------------------------------------


def gpt(shape: tuple[int, ...], rows: int, length: int | None = None) -> Gpt:
    """A GPT and random tokens for it, ``rows`` of them per microbatch."""
    from flax import nnx
    from model import GPT, Size, next_token_loss

    size = Size(*shape, learning_rate=LEARNING_RATE)
    model = GPT(size, size.vocabulary, jnp.float32, nnx.Rngs(0))
    graph, params = nnx.split(model)

    def loss_fn(params, windows):
        return next_token_loss(nnx.merge(graph, params), windows)

    windows = (MICROBATCHES * rows, 1 + (length or size.context))
    batch = jax.random.randint(jax.random.key(1), windows, 0, size.vocabulary)
    return Gpt(nnx.as_pure(params), loss_fn, batch)


def scan_by_hand(
    loss_fn: Callable, params: Any, batch: jax.Array, *, squares: bool
) -> tuple[jax.Array, Any, Any]:
    """Mean loss, gradient and square of the gradient, as everyone writes it."""
    parts = batch.reshape(MICROBATCHES, -1, *batch.shape[1:])

    def add(total, part):
        loss, grads = jax.value_and_grad(loss_fn)(params, part)
        square = jax.tree.map(jnp.square, grads) if squares else None
        return jax.tree.map(jnp.add, total, (loss, grads, square)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    start = jnp.zeros(()), zeros, zeros if squares else None
    total, _ = lax.scan(add, start, parts)
    return jax.tree.map(lambda leaf: leaf / MICROBATCHES, total)


def by_hand(loss_fn: Callable) -> Callable:
    """In the place of ``microbatch_gradients``; has no moments."""
    return functools.partial(scan_by_hand, loss_fn, squares=False)


def by_hand_with_squares(loss_fn: Callable) -> Callable:
    """In the place of ``microbatch_gradients(..., mean_square=True)``."""

    def differentiate(params, batch):
        loss, grads, squares = scan_by_hand(loss_fn, params, batch, squares=True)
        # For the marks that name its leaves, which only the library can make.
        state: Any = ost.accumulate_moments(optax.identity(), 1).init(params)
        moments = state.moments._replace(
            num_microbatches=jnp.int32(MICROBATCHES), mean_square=squares
        )
        return loss, grads, moments

    return differentiate


def by_library(
    loss_fn: Callable, *, mean_square: bool = False, reject_nonfinite: bool = True
) -> Callable:
    """``microbatch_gradients``, one microbatch after the other."""
    return ost.microbatch_gradients(
        loss_fn,
        MICROBATCHES,
        vmap_size=1,
        mean_square=mean_square,
        reject_nonfinite=reject_nonfinite,
    )


class Inside(NamedTuple):
    """One way to accumulate inside a step.

    Attributes:
      differentiate: from a loss to ``(params, batch) -> (loss, gradient, moments)``.
      squares: whether Adam reads the squares.
    """

    differentiate: Callable
    squares: bool = False

    @property
    def baseline(self) -> str:
        """What it is compared with."""
        return BY_HAND_SQUARES if self.squares else BY_HAND


INSIDE = {
    BY_HAND: Inside(by_hand),
    "microbatch_gradients": Inside(by_library),
    "…, reject_nonfinite=False": Inside(
        functools.partial(by_library, reject_nonfinite=False)
    ),
    BY_HAND_SQUARES: Inside(by_hand_with_squares, squares=True),
    "…, mean_square=True": Inside(
        functools.partial(by_library, mean_square=True), squares=True
    ),
    "…, mean_square=True, reject_nonfinite=False": Inside(
        functools.partial(by_library, mean_square=True, reject_nonfinite=False),
        squares=True,
    ),
}


def build_inside(side: Inside, case: Gpt) -> Program:
    """A step of a trainer that accumulates inside it, compiled."""
    second_moment = "microbatch" if side.squares else "mean"
    tx = ost.safe_adamw(LEARNING_RATE, second_moment=second_moment)
    tx = optax.with_extra_args_support(tx)
    differentiate = side.differentiate(case.loss_fn)

    def step(params, state, batch):
        loss, grads, moments = differentiate(params, batch)
        updates, state = tx.update(grads, state, params, moments=moments)
        return optax.apply_updates(params, updates), state, loss

    return build(step, case.params, tx.init(case.params), case.batch)


def add_differences(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adds memory and operations as compared with what is written by hand."""
    for name, row in rows.items():
        base = rows[INSIDE[name].baseline]
        row["temp_mb_more"] = round(row["temp_mb"] - base["temp_mb"], 3)
        row["flops_ratio"] = round(row["gflops"] / base["gflops"], 5)
    return rows


def measure_inside(programs: dict[str, Program], rounds: int) -> dict[str, Any]:
    """Steps of every side, and what XLA says of it."""
    seconds = run_alternately(programs, rounds, 1)
    rows = add_differences({name: analysis(each) for name, each in programs.items()})
    for name, row in rows.items():
        base = seconds[INSIDE[name].baseline]
        row["ms"] = step_cost.summary(list(seconds[name].ravel()), 1e3)
        row["time_ratio"] = compare(seconds[name].ravel(), base.ravel())
    return rows


def memory_by_tokens(shape: tuple[int, ...], tokens: list) -> dict[str, Any]:
    """How much more memory than by hand, by size of the microbatch; nothing is run."""
    names = [name for name, side in INSIDE.items() if not side.squares]
    found = {}
    for rows, length in tokens:
        case = gpt(shape, rows, length)
        sides = {name: analysis(build_inside(INSIDE[name], case)) for name in names}
        found[f"{rows}×{length}"] = add_differences(sides)
    return found


# --- tables and report ----------------------------------------------------------------


def across_table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = ["around", "mini-step ms", "ratio", "cycle ms", "ratio"]
    head += ["temp bytes/param", "ratio", "copies"]
    lines = [
        [
            name,
            f"{row['mini_step_ms']['median']:.1f}",
            quartiles(row["mini_step_ratio"], 2),
            f"{row['cycle_ms']['median']:.0f}",
            quartiles(row["cycle_ratio"], 2),
            f"{row['temp_bytes_per_parameter']:.1f}",
            f"{row['temp_ratio']:.2f}",
            str(row["copies"]),
        ]
        for name, row in rows.items()
    ]
    return markdown(head, lines)


def inside_table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a Markdown table; flops without those of a loop's repetitions."""
    lines = [
        [
            name,
            f"{row['ms']['median']:.0f}",
            quartiles(row["time_ratio"], 3),
            f"{row['temp_mb']:.2f}",
            f"{row['temp_mb_more']:+.2f}",
            f"{row['flops_ratio']:.4f}",
        ]
        for name, row in rows.items()
    ]
    return markdown(["gradient", "ms", "time", "temp MB", "more", "flops"], lines)


def memory_table(found: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for tokens, rows in found.items():
        hand, rejecting, keeping = rows.values()
        more = [f"{row['temp_mb_more']:+.2f}" for row in (rejecting, keeping)]
        lines.append([f"{tokens} tokens", f"{hand['temp_mb']:.2f}", *more])
    head = ["microbatch", "by hand, temp MB", "rejecting", "not rejecting"]
    return markdown(head, lines)


def report_across(scale: Scale) -> dict[str, Any]:
    """Measures accumulation across steps."""
    report, params = {}, parameters(scale)
    for case, (batch, differentiate) in across_cases(scale).items():
        programs = accumulators(params, batch, differentiate)
        report[case] = measure_across(programs, scale.cycles)
    return report


def report_inside(scale: Scale) -> dict[str, Any]:
    """Measures accumulation inside a step."""
    report = {}
    for name, (shape, rows, rounds) in scale.steps.items():
        case = gpt(shape, rows)
        programs = {key: build_inside(side, case) for key, side in INSIDE.items()}
        tokens = f"{rows}×{case.batch.shape[1] - 1} tokens"
        report[f"GPT of {name}, {tokens} each"] = measure_inside(programs, rounds)
    return report


def make_report(quick: bool) -> Report:
    """Measures both ways."""
    scale = QUICK if quick else FULL
    return {
        "parameters": step_cost.count(parameters(scale)),
        "across_steps": report_across(scale),
        "inside_a_step": report_inside(scale),
        "memory_by_tokens": memory_by_tokens(SMALL, scale.tokens),
    }


def readme_table(report: Report) -> str:
    """Across steps, the gradient given."""
    return across_table(next(iter(report["across_steps"].values())))


def tables(report: Report) -> dict[str, str]:
    """All tables."""
    size = f"{report['parameters'] / 1e6:.1f}M parameters, K = {CALLS}"
    across = {
        f"Across steps, {case}, {size}": across_table(rows)
        for case, rows in report["across_steps"].items()
    }
    inside = {
        f"Inside a step, {case}, K = {MICROBATCHES}": inside_table(rows)
        for case, rows in report["inside_a_step"].items()
    }
    memory = memory_table(report["memory_by_tokens"])
    return across | inside | {"Temporary memory beyond that by hand, MB": memory}


if __name__ == "__main__":
    run_suite("accumulation", __doc__, make_report, tables)
