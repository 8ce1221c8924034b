"""What the programs of this library are on a GPU and on TPUs, counted without one.

Each program is compiled for an H100 and for TPUs v5e and v6e, and its text is counted:
kernels, bytes of device memory that it moves, questions to the host, temporary memory
(``hlo_counts.py`` says how). Both sides of a comparison are compiled in one run.

*The optimizer alone*: gradients are arguments, everything is donated. For
``branch_on_spike`` the gradient is made in the same program, as in a training step: its
buffer is where parameters change places.

*The whole step* of ``examples/gpt``: against a really plain step, a scan that adds the
gradients of the microbatches up, then optax's clip and AdamW. An *ordinary* step has
``look=False``; every tenth has ``look=True``.

*The notebooks*: their steps as they stand, which leave it to the program when to look.

It needs ``pip install -e ".[accelerators]"`` and no accelerator.

    python benchmarks/accelerator_programs.py            # tables and JSON
    python benchmarks/accelerator_programs.py --check    # a few rows, held to a bound
    python benchmarks/accelerator_programs.py --quick    # one row, no JSON
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hlo_counts
import jax
import jax.numpy as jnp
import notebook_steps
import optax
from flax import nnx
from hlo_counts import COLLECTIVES
from jax.sharding import NamedSharding, PartitionSpec
from reporting import Report, finish, markdown, parser
from targets import TARGETS, Compiled, Target, compile_for, on_one_device

import optax_stability as ost

sys.path.append(str(Path(__file__).parents[1] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "examples" / "gpt"))
import training
from config import Config
from model import GPT, SIZES
from plain_step import make_plain_step

Row = dict[str, Any]
Sides = dict[str, Callable[[], optax.GradientTransformation]]

OPTAX, CHAIN, GUARD = "optax clip + adamw", "clip_by_zscore + safe_adamw", "spike_guard"
BRANCH, WINDOW = "branch_on_spike", "accumulate_moments, no step"
PLAIN, ORDINARY, LOOK = "really plain", "ordinary step", "with look=True"
ADD = "acc += g"
CONFIGS = {
    "small": Config(size="small", batch_size=8),
    "gpt2": Config(size="gpt2", dtype="bfloat16", batch_size=16),
}
ACCELERATORS = ("H100", "TPU v5e", "TPU v6e")
TPUS = ACCELERATORS[1:]
NOTEBOOKS = {
    "quickstart, plain optax": lambda: notebook_steps.quickstart("plain_step", "plain"),
    "quickstart, ours": lambda: notebook_steps.quickstart("our_step", "ours"),
    "noise_scale, batches of 8": lambda: notebook_steps.noise_scale(8),
}


def chain() -> optax.GradientTransformation:
    """The adaptive clip and safe Adam."""
    return optax.chain(ost.clip_by_zscore(), ost.safe_adamw(1e-3))


OPTIMIZERS: Sides = {
    OPTAX: lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    CHAIN: chain,
    GUARD: lambda: ost.spike_guard(chain()),
}
BRANCHES: Sides = {
    OPTAX: OPTIMIZERS[OPTAX],
    BRANCH: lambda: ost.branch_on_spike(chain()),
}


def parameters(size: str) -> Any:
    """The shapes of the parameters of the GPT."""

    def make():
        model = GPT(SIZES[size], SIZES[size].vocabulary, jnp.float32, nnx.Rngs(0))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    return jax.eval_shape(make)


def entries(tree: Any) -> int:
    """The number of entries of all arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def counted(compiled: Compiled, size: int) -> Row:
    """The counts of a program, bytes per parameter."""
    counts = hlo_counts.count(compiled.program.as_text())
    memory = compiled.program.memory_analysis()
    return {
        "kernels": counts.kernels,
        "asks": counts.asks,
        "bytes": round(counts.bytes / size, 2),
        "temp": round(memory.temp_size_in_bytes / size, 3),
        "seconds": round(compiled.seconds, 2),
    }


def optimizer_program(
    target: Target, make: Callable[[], optax.GradientTransformation], params: Any
) -> Compiled:
    """An optimizer and its update, applied."""
    tx = optax.with_extra_args_support(make())

    def step(params, state, grads, loss):
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    shapes = (params, jax.eval_shape(tx.init, params), params, jnp.float32(0))
    return compile_for(target, step, on_one_device(target, shapes), (0, 1, 2))


def branching_program(
    target: Target, make: Callable[[], optax.GradientTransformation], params: Any
) -> Compiled:
    """The same, with a gradient that is made in the program."""
    tx = optax.with_extra_args_support(make())

    def step(params, state, batch, loss):
        grads = jax.tree.map(lambda p, x: p * loss + x, params, batch)
        grads = jax.lax.optimization_barrier(grads)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    shapes = (params, jax.eval_shape(tx.init, params), params, jnp.float32(0))
    return compile_for(target, step, on_one_device(target, shapes), (0, 1))


def accumulation_programs(target: Target, params: Any) -> dict[str, Row]:
    """A call that takes no step, against the sum alone; the update is not applied."""
    size = entries(params)
    tx = ost.accumulate_moments(chain(), every_k=8, mean_square=False)

    def add(total, grads):
        return jax.tree.map(jnp.add, total, grads)

    def call(state, grads, params, loss):
        return tx.update(grads, state, params, value=loss)[1]

    state = jax.eval_shape(tx.init, params)
    plain = on_one_device(target, (params, params))
    ours = on_one_device(target, (state, params, params, jnp.float32(0)))
    return {
        ADD: counted(compile_for(target, add, plain, (0,)), size),
        WINDOW: counted(compile_for(target, call, ours, (0,)), size),
    }


def _shapes_of(config: Config) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """Structure and arrays of model and optimizer, and a batch."""
    size = SIZES[config.size]
    made = nnx.eval_shape(lambda: training.create(config, size.vocabulary))
    graphdef, arrays = nnx.split(made)
    shape = config.batch_size, size.context + 1
    return graphdef, arrays, jax.ShapeDtypeStruct(shape, jnp.int32)


def trainer_step(config: Config, look: bool | None) -> tuple[Callable, tuple]:
    """The step of ``examples/gpt``, and the shapes of its arguments."""
    graphdef, arrays, windows = _shapes_of(config)
    state = training.TrainState(arrays, training.start_loss_scale(config))
    leaves, structure = jax.tree.flatten(state)

    def step(leaves, windows):
        state = jax.tree.unflatten(structure, leaves)
        state, metrics = training.train_step(graphdef, config, state, windows, {}, look)
        return jax.tree.leaves(state), metrics

    return step, (leaves, windows)


def plain_step(config: Config) -> tuple[Callable, tuple]:
    """The step to compare with."""
    plain = dataclasses.replace(config, baseline=True)
    graphdef, arrays, windows = _shapes_of(plain)
    leaves, structure = jax.tree.flatten(arrays)
    plain_step = make_plain_step(graphdef, config.microbatches)

    def step(leaves, windows):
        arrays, metrics = plain_step(jax.tree.unflatten(structure, leaves), windows)
        return jax.tree.leaves(arrays), metrics

    return step, (leaves, windows)


def trainer_programs(target: Target, config: Config) -> dict[str, Row]:
    """The whole step, plain and ours."""
    size, found = entries(parameters(config.size)), {}
    steps = {
        PLAIN: plain_step(config),
        ORDINARY: trainer_step(config, False),
        LOOK: trainer_step(config, True),
    }
    for name, (step, shapes) in steps.items():
        arguments = on_one_device(target, shapes)
        found[name] = counted(compile_for(target, step, arguments, (0,)), size)
    return found


def mesh_program(
    target: Target,
    step: Callable,
    shapes: tuple,
    matrices: set[tuple[int, ...]],
    batch_axis: int = 0,
) -> Row:
    """A step on four chips, 2 by 2: the largest array of each kind that they send.

    Every matrix is split along its first axis, every batch along both axes of the mesh.
    """
    mesh = target.mesh((2, 2), ("data", "fsdp"))
    leaves, windows, *others = shapes

    def place(leaf, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def spec_of(leaf):
        return ("fsdp",) if leaf.shape in matrices else ()

    arguments = (
        [place(leaf, *spec_of(leaf)) for leaf in leaves],
        place(windows, *[None] * batch_axis, ("data", "fsdp")),
        *map(place, others),
    )
    with jax.set_mesh(mesh):
        compiled = compile_for(target, step, arguments, (0,))
    return hlo_counts.collectives(compiled.program.as_text())


def mesh_programs(target: Target, config: Config) -> dict[str, Row]:
    """The plain and the ordinary step on a mesh."""
    leaves = jax.tree.leaves(parameters(config.size))
    matrices = {leaf.shape for leaf in leaves if leaf.ndim == 2}
    return {
        PLAIN: mesh_program(target, *plain_step(config), matrices),
        ORDINARY: mesh_program(target, *trainer_step(config, False), matrices),
    }


def notebook_programs(target: Target) -> dict[str, Row]:
    """The steps of the notebooks, on one device."""
    found = {}
    for name, make in NOTEBOOKS.items():
        step, shapes, _ = make()
        arguments = on_one_device(target, shapes)
        program = compile_for(target, step, arguments, (0,)).program
        counts = hlo_counts.count(program.as_text())
        found[name] = {"kernels": counts.kernels, "asks": counts.asks}
    return found


def notebook_mesh_programs(target: Target) -> dict[str, Row]:
    """The same on a mesh, with the same parameters on all chips."""
    found = {}
    for name, make in NOTEBOOKS.items():
        step, shapes, batch_axis = make()
        found[name] = mesh_program(target, step, shapes, set(), batch_axis)
    return found


def compile_times(target: Target, leaves: int) -> Row:
    """Seconds to trace and compile, as ratios to optax; sides take turns."""
    params = {
        str(i): jax.ShapeDtypeStruct((64, 64), jnp.float32) for i in range(leaves)
    }
    ratios = []
    for _ in range(3):
        plain = optimizer_program(target, OPTIMIZERS[OPTAX], params).seconds
        ours = optimizer_program(target, OPTIMIZERS[GUARD], params).seconds
        ratios.append(ours / plain)
        jax.clear_caches()
    return {"leaves": leaves, "ratio": round(sorted(ratios)[1], 2)}


def optimizer_rows(target: Target, params: Any, sides: Sides, compile_side) -> Row:
    """Every side of a comparison."""
    size = entries(params)
    return {
        name: counted(compile_side(target, make, params), size)
        for name, make in sides.items()
    }


def make_report(*, quick: bool, check: bool) -> Report:
    """All programs; a few of them for a check, one for a quick look."""
    names = ("H100",) if quick else ("H100", "TPU v5e") if check else ACCELERATORS
    sizes = ("small",) if quick or check else ("small", "gpt2")
    found: Report = {"optimizer": {}, "branch": {}, "accumulation": {}, "step": {}}
    for size in sizes:
        params = parameters(size)
        arrays = len(jax.tree.leaves(params))
        for name in names:
            target, title = TARGETS[name], f"{name}, {size}, {arrays} arrays"
            sys.stderr.write(f"{title}\n")
            found["optimizer"][title] = optimizer_rows(
                target, params, OPTIMIZERS, optimizer_program
            )
            if quick or (check and name != "H100"):
                continue
            found["branch"][title] = optimizer_rows(
                target, params, BRANCHES, branching_program
            )
            found["accumulation"][title] = accumulation_programs(target, params)
            found["step"][title] = trainer_programs(target, CONFIGS[size])
    if not (quick or check):
        found["mesh"] = {
            f"{name}, {size}": mesh_programs(TARGETS[name], CONFIGS[size])
            for name in TPUS
            for size in sizes
        }
        found["notebooks"] = {
            name: notebook_programs(TARGETS[name]) for name in ACCELERATORS
        }
        for name in TPUS:
            found["mesh"][f"{name}, notebooks"] = notebook_mesh_programs(TARGETS[name])
        found["compile"] = {
            name: [compile_times(TARGETS[name], leaves) for leaves in (76, 1000)]
            for name in ("H100", "TPU v5e", "CPU")
        }
    return found


def table(rows: dict[str, Row]) -> str:
    """Counts, and their ratios to the first row."""
    first = next(iter(rows.values()))
    lines = [
        [
            name,
            f"{row['kernels']:,}",
            f"{row['kernels'] / first['kernels']:.2f}",
            f"{row['asks']}",
            f"{row['bytes']:.1f}",
            f"{row['bytes'] / first['bytes']:.2f}",
            f"{row['temp']:.2f}",
        ]
        for name, row in rows.items()
    ]
    head = ["", "kernels", "ratio", "asks", "B/param", "ratio", "temp B/param"]
    return markdown(head, lines)


def tables(report: Report) -> dict[str, str]:
    """One table per comparison."""
    found = {}
    for kind in ("optimizer", "branch", "accumulation", "step"):
        for title, rows in report[kind].items():
            found[f"{kind}: {title}"] = table(rows)
    if "notebooks" in report:
        lines = [
            [f"{target}: {name}", f"{row['kernels']:,}", f"{row['asks']}"]
            for target, rows in report["notebooks"].items()
            for name, row in rows.items()
        ]
        found["notebooks"] = markdown(["steps of notebooks", "kernels", "asks"], lines)
    if "mesh" in report:
        lines = [
            [f"{title}: {name}", *(f"{sent.get(kind, 0):,}" for kind in COLLECTIVES)]
            for title, sides in report["mesh"].items()
            for name, sent in sides.items()
        ]
        head = ["largest array sent among 2×2 chips, bytes", *COLLECTIVES]
        found["mesh"] = markdown(head, lines)
    if "compile" in report:
        lines = [
            [name, *(f"{row['ratio']:.2f}" for row in rows)]
            for name, rows in report["compile"].items()
        ]
        head = ["seconds to compile, guard / optax", "76 arrays", "1,000 arrays"]
        found["compile"] = markdown(head, lines)
    return found


def readme_table(report: Report) -> str:
    """The guard and the whole step on every target, with their ratios."""
    chosen = {"optimizer": (OPTAX, GUARD), "step": (PLAIN, ORDINARY, LOOK)}
    lines = []
    for kind, names in chosen.items():
        for title, rows in report[kind].items():
            lines.append([f"**{title}**", *[""] * 5])
            first = rows[names[0]]
            lines += [
                [
                    name,
                    f"{rows[name]['kernels']:,}",
                    f"{rows[name]['kernels'] / first['kernels']:.2f}",
                    f"{rows[name]['asks']}",
                    f"{rows[name]['bytes']:.1f}",
                    f"{rows[name]['bytes'] / first['bytes']:.2f}",
                ]
                for name in names
            ]
    return markdown(["", "kernels", "ratio", "asks", "bytes", "ratio"], lines)


# Bounds that --check holds: the largest ratio to the first row; of asks, the number.
BOUNDS = {
    "optimizer": {GUARD: {"bytes": 1.02, "asks": 0}},
    "branch": {BRANCH: {"bytes": 1.02, "asks": 1}},
    "accumulation": {WINDOW: {"asks": 1}},
    "step": {ORDINARY: {"bytes": 1.05, "asks": 0, "kernels": 1.10}},
}
# Temporary memory beyond that of the first row, in bytes per parameter.
MORE_TEMP = 0.1


def exceeded(report: Report) -> list[str]:
    """What exceeds its bound, in words."""
    found = []
    for kind, bounds in BOUNDS.items():
        for title, rows in report[kind].items():
            first = next(iter(rows.values()))
            for name, limits in bounds.items():
                found += _exceeded_by(rows[name], first, limits, f"{title}: {name}")
    return found


def _exceeded_by(row: Row, first: Row, limits: dict[str, float], name: str):
    """What one row exceeds."""
    found = []
    for key, limit in limits.items():
        value = row[key] if key == "asks" else row[key] / first[key]
        if value > limit:
            found.append(f"{name}: {key} {value:.3g} is above {limit}")
    # On a TPU, what stays on the chip is among the temporary memory. It saves traffic.
    saved = max(0.0, first["bytes"] - row["bytes"])
    more = row["temp"] - first["temp"] - saved
    if "kernels" not in limits and more > MORE_TEMP:
        found.append(f"{name}: {more:.3g} more temp B/param is above {MORE_TEMP}")
    return found


def main() -> None:
    """The command line."""
    options = parser(__doc__)
    options.add_argument(
        "--check", action="store_true", help="hold a few rows to bounds"
    )
    chosen = options.parse_args()
    jax.config.update("jax_platforms", "cpu")
    report = make_report(quick=chosen.quick, check=chosen.check)
    short = chosen.quick or chosen.check
    finish("accelerator_programs", report, tables, quick=short)
    failures = exceeded(report) if chosen.check else []
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
