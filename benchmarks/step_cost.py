"""What one optimizer step costs: stability chain against optax's own.

Both sides of a pair run in one process, alternating, and are compared as a ratio of
medians: that survives a noisy machine. Bytes and buffers come from XLA's own analysis
of the compiled program and do not drift.

*The floor* is the time in which the device moves what such a step must move at least:
the gradient, the parameters and Adam's two moments are read, all but the gradient are
written (28 bytes per parameter), and a clip needs the norm of the whole gradient before
any of it is used (4 more). Where the gradient is made in the same step, the parameters
are read for it and it is written (8 more). How fast the device moves is measured in the
same rounds, by adding 1 in place to an array as large as parameters, moments and
gradient together.

    python benchmarks/step_cost.py            # prints the tables, writes results/*.json
    python benchmarks/step_cost.py --quick    # a tenth of the parameters, fewer rounds
"""

import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from reporting import Report, markdown, on_cpu, quartiles, run_suite

import optax_stability as ost

LEARNING_RATE = 1e-3
GUARDED = "spike_guard(clip_by_zscore + safe_adamw)"
RECORDED = "record_history with record, gradient and update"
# Bytes per parameter that AdamW must move, with a clip in front of it, and with a
# gradient that is made in the same step.
ADAMW_MOVES, CLIPPED_MOVES, STEP_MOVES = 28, 32, 40


class Program(NamedTuple):
    """One side of a comparison, compiled.

    Attributes:
      step: the compiled step, ``(params, state, batch) -> (params, state)``.
      arguments: its donated arguments; replaced after each call.
      bytes_accessed: what XLA counts, in bytes per parameter.
      temp: temporary memory, in bytes per parameter.
      held: what it is given, parameters and state, in bytes per parameter.
      compile_seconds: time to compile, once and then once per round.
    """

    step: Callable
    arguments: list
    bytes_accessed: float
    temp: float
    held: float
    compile_seconds: list[float]


class Case(NamedTuple):
    """What is compared, and on what.

    Attributes:
      sides: name to optimizer; the first is what the others are compared with.
      params: the parameters.
      batch: what the loss is computed from.
      differentiate: ``(params, batch) -> (loss, gradient)``, part of the step.
      moves: name to bytes per parameter that the side must move at least.
    """

    sides: dict[str, Callable[[], optax.GradientTransformation]]
    params: Any
    batch: Any
    differentiate: Callable
    moves: Mapping[str, int] = MappingProxyType({})


def plain_adamw() -> optax.GradientTransformation:
    """AdamW without clipping, with ε as usual."""
    return optax.adamw(LEARNING_RATE)


def optax_chain() -> optax.GradientTransformation:
    """What most training code uses today."""
    return optax.chain(optax.clip_by_global_norm(1.0), plain_adamw())


def stability_chain() -> optax.GradientTransformation:
    """The same with this library."""
    return optax.chain(ost.clip_by_zscore(), ost.safe_adamw(LEARNING_RATE))


def optax_if_finite() -> optax.GradientTransformation:
    """The chain of optax, guarded as optax guards it: against NaN and Inf."""
    return optax.apply_if_finite(optax_chain(), 5)


def guarded_chain() -> optax.GradientTransformation:
    """The chain of this library, guarded against spikes of norm and loss as well."""
    return ost.spike_guard(stability_chain())


def recording_chain(every: int) -> optax.GradientTransformation:
    """The guarded chain, with gradient and update recorded per leaf."""
    inside = optax.chain(stability_chain(), ost.record("update", every=every))
    return optax.chain(ost.record("grad", every=every), ost.spike_guard(inside))


def norms_recorded() -> optax.GradientTransformation:
    """Norms at every step; what takes more passes so rarely that no round sees it."""
    return ost.record_history(recording_chain(1000), slow_every=1000)


def norms_recorded_alone() -> optax.GradientTransformation:
    """The same without a history, which would share the norms of the gradient."""
    return recording_chain(1000)


def everything_recorded() -> optax.GradientTransformation:
    """Every number at every step: what a round costs in which all are due."""
    return ost.record_history(recording_chain(1), slow_every=1)


def history_alone() -> optax.GradientTransformation:
    """The guarded chain in a history."""
    return ost.record_history(guarded_chain(), slow_every=1000)


def safe_adamw() -> optax.GradientTransformation:
    """AdamW on √v, without clipping."""
    return ost.safe_adamw(LEARNING_RATE)


def transformer_shapes(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """The parameter shapes of a GPT: 34M with width 512, 9 layers, vocabulary 8192."""
    block = {
        "attention": {"qkv": (width, 3 * width), "out": (width, width)},
        "mlp": {"up": (width, 4 * width), "down": (4 * width, width)},
        "norm_1": {"scale": (width,), "bias": (width,)},
        "norm_2": {"scale": (width,), "bias": (width,)},
    }
    shapes = {f"block_{i}": block for i in range(layers)}
    return shapes | {"tokens": (vocabulary, width), "positions": (2048, width)}


def draw(shapes: Any, key: jax.Array, scale: float) -> Any:
    """Normal numbers of the given shapes."""
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef,
        [
            scale * jax.random.normal(k, shape)
            for k, shape in zip(keys, leaves, strict=True)
        ],
    )


def gradient_like(params: Any) -> Any:
    """A gradient as large as in the middle of a run."""
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    return draw(shapes, jax.random.key(1), 0.01)


def count(tree: Any) -> int:
    """Number of entries of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def given(params: Any, grads: Any) -> tuple[float, Any]:
    """No loss, and the gradient that was drawn: the cost of the optimizer alone."""
    del params
    return 0.0, grads


def small_loss(params: Any, scale: jax.Array) -> jax.Array:
    """A loss with a matrix product per leaf, as cheap as such a loss can be."""

    def term(leaf):
        rows = scale * jnp.ones((4, leaf.shape[0]))
        return jnp.mean(jnp.tanh(rows @ leaf if leaf.ndim > 1 else rows * leaf) ** 2)

    return sum((term(leaf) for leaf in jax.tree.leaves(params)), jnp.zeros(()))


def make_step(tx: optax.GradientTransformation, differentiate: Callable) -> Callable:
    """One step as a trainer writes it: parameters and state donated and returned."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, batch):
        value, grads = differentiate(params, batch)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return step


def lower(tx: optax.GradientTransformation, case: "Case", state: Any) -> Any:
    """The step of a case, ready to compile."""
    step = make_step(tx, case.differentiate)
    return jax.jit(step, donate_argnums=(0, 1)).lower(case.params, state, case.batch)


def build(tx: optax.GradientTransformation, case: "Case") -> Program:
    """Compiles a step and reads XLA's analysis of it."""
    # Copies, because the step donates its arguments.
    arguments = [jax.tree.map(jnp.copy, case.params), tx.init(case.params)]
    lowered = lower(tx, case, arguments[1])
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    size = count(case.params)
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if costs is None or memory is None:
        raise RuntimeError("this backend does not analyse its programs")
    return Program(
        step=compiled,
        arguments=arguments,
        bytes_accessed=costs["bytes accessed"] / size,
        temp=memory.temp_size_in_bytes / size,
        held=memory.argument_size_in_bytes / size,
        compile_seconds=[seconds],
    )


def compile_once(tx: optax.GradientTransformation, case: "Case") -> float:
    """Seconds to compile a step that is already lowered, nothing cached."""
    jax.clear_caches()
    lowered = lower(tx, case, tx.init(case.params))
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


def run_once(program: Program, batch: Any) -> float:
    """Seconds for one step."""
    start = time.perf_counter()
    program.arguments[:] = program.step(*program.arguments, batch)
    jax.block_until_ready(program.arguments)
    return time.perf_counter() - start


def copier(size: int) -> Callable[[], float]:
    """Measures, at each call, the seconds to read and write so many float32 numbers."""
    add_one = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    numbers = [add_one(jnp.zeros(size))]

    def seconds() -> float:
        jax.block_until_ready(numbers)
        start = time.perf_counter()
        numbers[0] = add_one(numbers[0])
        jax.block_until_ready(numbers)
        return time.perf_counter() - start

    return seconds


def measure(
    case: "Case", *, rounds: int, compile_rounds: int
) -> dict[str, dict[str, Any]]:
    """Runs all sides alternately and summarises each."""
    programs = {name: build(make(), case) for name, make in case.sides.items()}
    size = count(case.params)
    copy = copier(4 * size if case.moves else 1)
    for program in programs.values():
        run_once(program, case.batch)
    seconds = {name: [] for name in programs}
    copies = []
    for _ in range(rounds):
        copies.append(copy())
        for name, program in programs.items():
            seconds[name].append(run_once(program, case.batch))
    for _ in range(compile_rounds):
        for name, make in case.sides.items():
            programs[name].compile_seconds.append(compile_once(make(), case))
    seconds_per_byte = statistics.median(copies) / (2 * 16 * size)
    rows = {
        name: {
            "parameters": size,
            "leaves": len(jax.tree.leaves(case.params)),
            "bytes_per_parameter": round(program.bytes_accessed, 3),
            "temp_bytes_per_parameter": round(program.temp, 4),
            "held_bytes_per_parameter": round(program.held, 4),
            "ms": summary(seconds[name], 1e3),
            "compile_s": summary(program.compile_seconds, 1.0),
        }
        for name, program in programs.items()
    }
    for name, moves in case.moves.items():
        floor = moves * size * seconds_per_byte
        rows[name]["floor_gb_per_s"] = round(1e-9 / seconds_per_byte, 1)
        rows[name]["floor_ratio"] = round(statistics.median(seconds[name]) / floor, 3)
    add_ratios(rows)
    return rows


def summary(values: list[float], unit: float) -> dict[str, float]:
    """Median and quartiles, in the given unit."""
    low, middle, high = statistics.quantiles(values * 2, n=4, method="inclusive")
    return {
        "median": round(middle * unit, 3),
        "low": round(low * unit, 3),
        "high": round(high * unit, 3),
    }


def threshold_times(rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds that one threshold takes for one value, compiled alone."""
    kinds = {
        "zscore()": ost.thresholds.zscore(),
        "window_zscore()": ost.thresholds.window_zscore(),
        "window_quantile(0.9)": ost.thresholds.window_quantile(0.9),
        "window_median(3.0)": ost.thresholds.window_median(3.0),
        "ema_ratio()": ost.thresholds.ema_ratio(),
        "detrended_mad(5.0, floor=5.0)": ost.thresholds.detrended_mad(5.0, floor=5.0),
    }
    return {name: summary(time_one(each, rounds), 1e6) for name, each in kinds.items()}


def time_one(threshold: ost.thresholds.Threshold, rounds: int) -> list[float]:
    """Seconds per value, a thousand values in one program."""

    @jax.jit
    def watch(values):
        def step(state, x):
            limit, state = threshold.update(x, state)
            return state, limit

        return jax.lax.scan(step, threshold.init(), values)[1]

    values = jnp.exp(0.2 * jax.random.normal(jax.random.key(0), (1000,)))
    jax.block_until_ready(watch(values))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(watch(values))
        seconds.append((time.perf_counter() - start) / len(values))
    return seconds


def add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """Adds time and compile time as ratios to the medians of the first row."""
    base = next(iter(rows.values()))
    for row in rows.values():
        row["time_ratio"] = round(row["ms"]["median"] / base["ms"]["median"], 3)
        compile_ratio = row["compile_s"]["median"] / base["compile_s"]["median"]
        row["compile_ratio"] = round(compile_ratio, 3)


def cases(quick: bool) -> dict[str, Case]:
    """What is compared."""
    baseline = "clip_by_global_norm + adamw"
    sides = {
        baseline: optax_chain,
        "clip_by_zscore + safe_adamw": stability_chain,
        "adamw": plain_adamw,
        "safe_adamw": safe_adamw,
    }
    guarded = {
        baseline: optax_chain,
        "apply_if_finite of it": optax_if_finite,
        GUARDED: guarded_chain,
    }
    recording = {
        GUARDED: guarded_chain,
        "in record_history": history_alone,
        "with record, gradient and update": norms_recorded_alone,
        RECORDED: norms_recorded,
        "the same, every number at every step": everything_recorded,
    }
    width, layers = (160, 1) if quick else (512, 9)
    gpt = draw(transformer_shapes(width, layers, 8192), jax.random.key(0), 0.1)
    many = {f"leaf_{i}": (64, 64) for i in range(30 if quick else 1000)}
    small = draw(many, jax.random.key(0), 0.1)
    chains = dict(list(sides.items())[:2])
    value_and_grad, scale = jax.value_and_grad(small_loss), jnp.float32(0.1)
    alone = dict.fromkeys(chains, CLIPPED_MOVES)
    alone |= dict.fromkeys(("adamw", "safe_adamw"), ADAMW_MOVES)
    whole = dict.fromkeys(guarded, STEP_MOVES)
    return {
        "optimizer alone, GPT-shaped": Case(
            sides, gpt, gradient_like(gpt), given, alone
        ),
        "optimizer alone, many small leaves": Case(
            chains, small, gradient_like(small), given
        ),
        "gradient in the same step, GPT-shaped": Case(
            guarded, gpt, scale, value_and_grad, whole
        ),
        "recording, GPT-shaped": Case(recording, gpt, scale, value_and_grad),
        "recording, many small leaves": Case(
            {name: recording[name] for name in (GUARDED, RECORDED)},
            small,
            gradient_like(small),
            given,
        ),
    }


def make_report(quick: bool) -> Report:
    """Measures every case."""
    rounds, compile_rounds = (5, 0) if quick else (41, 2 if on_cpu() else 0)
    return {
        "cases": {
            name: measure(case, rounds=rounds, compile_rounds=compile_rounds)
            for name, case in cases(quick).items()
        },
        "threshold_us": threshold_times(rounds),
    }


HEAD = ["step", "bytes/param", "temp/param", "ms", "time", "× floor", "compile"]


def lines_of(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The rows of one case."""
    return [
        [
            name,
            f"{row['bytes_per_parameter']:.0f}",
            f"{row['temp_bytes_per_parameter']:.1f}",
            quartiles(row["ms"], 1),
            f"{row['time_ratio']:.2f}",
            f"{row['floor_ratio']:.2f}" if "floor_ratio" in row else "",
            f"{row['compile_ratio']:.2f}",
        ]
        for name, row in rows.items()
    ]


def title_of(name: str, rows: dict[str, dict[str, Any]]) -> str:
    """What is compared, and on what."""
    first = next(iter(rows.values()))
    return (
        f"{name}: {first['parameters'] / 1e6:.1f}M parameters, {first['leaves']} leaves"
    )


def readme_table(report: Report) -> str:
    """All cases in one table."""
    lines = []
    for name, rows in report["cases"].items():
        lines.append([f"**{title_of(name, rows)}**", *[""] * (len(HEAD) - 1)])
        lines += lines_of(rows)
    return markdown(HEAD, lines)


def tables(report: Report) -> dict[str, str]:
    """One table per case, and what a threshold takes."""
    found = {
        title_of(name, rows): markdown(HEAD, lines_of(rows))
        for name, rows in report["cases"].items()
    }
    lines = [
        [name, f"{row['median']:.1f}"] for name, row in report["threshold_us"].items()
    ]
    return found | {"One threshold, one value": markdown(["threshold", "µs"], lines)}


if __name__ == "__main__":
    run_suite("step_cost", __doc__, make_report, tables)
