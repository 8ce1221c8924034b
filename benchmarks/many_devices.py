"""What the library adds on many devices: messages per step, memory per device.

Nothing is timed. Messages are counted in the program that XLA makes for eight CPU
devices: what it combines there, GPUs and TPUs combine as well. Memory is the size of
the state, by shape; for one model it is held against XLA's own count.

    python benchmarks/many_devices.py          # prints tables, writes results/*.json
    python benchmarks/many_devices.py --quick  # fewer leaves, a smaller model
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from reporting import Report, markdown, run_suite

import optax_stability as ost

LEAVES = (10, 100, 1000)
WIDTH = 1024  # of the parameters whose messages are counted, in entries
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
KINDS += ("collective-permute", "collective-broadcast")
BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}

Make = Callable[[], optax.GradientTransformation]


class Collective(NamedTuple):
    """One message among devices.

    Attributes:
      kind: one of ``KINDS``.
      sizes: bytes of each array in it, on one device.
    """

    kind: str
    sizes: tuple[int, ...]


def collectives(program: str) -> list[Collective]:
    """Those of a compiled program, by its text."""
    started = rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\("
    found = []
    for result, kind in re.findall(started, program):
        arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result)
        sizes = [
            BYTES.get(dtype, 1) * math.prod(map(int, filter(None, shape.split(","))))
            for dtype, shape in arrays
        ]
        found.append(Collective(kind, tuple(sizes)))
    return found


def messages_of(compiled: Any) -> list[Collective]:
    """Those of a compiled program."""
    return collectives(compiled.as_text())


def summarise(found: list[Collective]) -> dict[str, Any]:
    """How many messages of which kind, and how large."""
    sizes = [size for each in found for size in each.sizes]
    return {
        "kinds": sorted({each.kind for each in found}),
        "messages": len(found),
        "arrays": len(sizes),
        "bytes": sum(sizes),
        "largest": max(sizes, default=0),
    }


def guarded_chain() -> optax.GradientTransformation:
    """What is recommended, without looking."""
    return ost.spike_guard(optax.chain(ost.clip_by_zscore(), ost.safe_adamw(1e-3)))


def full_stack() -> optax.GradientTransformation:
    """What the example trainer has."""
    step = optax.chain(
        ost.estimate_noise_scale(),
        ost.clip_by_zscore(),
        ost.safe_adamw(1e-3),
        ost.record("update", ratio_to_params=True),
    )
    looks = optax.chain(ost.record("grad"), ost.spike_guard(step))
    return ost.record_history(looks, length=1000)


def plain() -> optax.GradientTransformation:
    """Without this library."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


SIDES: dict[str, Make] = {
    "clip_by_global_norm + adamw": plain,
    "clip_by_zscore + safe_adamw": lambda: optax.chain(
        ost.clip_by_zscore(), ost.safe_adamw(1e-3)
    ),
    "spike_guard around it": guarded_chain,
    "the full stack": full_stack,
    "accumulate_moments around it": lambda: ost.accumulate_moments(full_stack(), 4),
}
LAYOUTS = {
    "data": ((8,), ("data",), PartitionSpec()),
    "fsdp": ((8,), ("data",), PartitionSpec("data")),
    "data × model": ((4, 2), ("data", "model"), PartitionSpec("data", "model")),
}


MOST = "data × model"  # where there are most messages


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    """Of the first devices."""
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, names, (AxisType.Auto,) * len(shape), devices=devices)


def give(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """The shapes of a tree of matrices, each sharded."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def state_of(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """The shapes of a state: what has the shape of a parameter lies as that does."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    lies = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params)}

    def shape(leaf):
        sharding = lies.get(leaf.shape, everywhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, jax.eval_shape(tx.init, params))


def compile_update(make: Make, params: Any, mesh: Mesh) -> Any:
    """The step of an optimizer, for a gradient that is there already."""
    tx = optax.with_extra_args_support(make())
    state = state_of(tx, params, mesh)
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    moments = jax.eval_shape(
        lambda: ost.Moments(
            num_microbatches=jnp.zeros((), jnp.int32),
            weight=jnp.zeros(()),
            deviation=jnp.zeros(len(params)),
            mean_square=None,
        )
    )

    def step(grads, state, params, loss, moments):
        if make is SIDES["accumulate_moments around it"]:
            moments = moments._replace(mean_square=grads)
        updates, state = tx.update(grads, state, params, value=loss, moments=moments)
        return optax.apply_updates(params, updates), state

    lie = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    step = jax.jit(step, donate_argnums=(1, 2), out_shardings=lie)
    return step.lower(params, state, params, loss, moments).compile()


def count_messages(make: Make, layout: str, leaves: int, devices: int = 8) -> dict:
    """Messages of the optimizer's step, whatever the gradient took."""
    shape, names, spec = LAYOUTS[layout]
    shape = (devices // math.prod(shape[1:]), *shape[1:])
    mesh = make_mesh(shape, names)
    matrix = jax.ShapeDtypeStruct((WIDTH // 8, 8), jnp.float32)
    params = give({f"leaf_{i}": matrix for i in range(leaves)}, mesh, spec)
    return summarise(messages_of(compile_update(make, params, mesh)))


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    """As small as a loss with a matrix product per leaf can be."""
    return sum((jnp.mean((x @ leaf) ** 2) for leaf in params.values()), jnp.zeros(()))


def count_of_gradient(leaves: int, kind: str) -> dict[str, Any]:
    """Messages of a gradient over data parallel devices: plain, or in microbatches."""
    mesh = make_mesh((8,), ("data",))
    matrix = jax.ShapeDtypeStruct((WIDTH // 8, 8), jnp.float32)
    params = give({f"leaf_{i}": matrix for i in range(leaves)}, mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((64, WIDTH // 8), jnp.float32)
    (x,) = jax.tree.leaves(give([x], mesh, PartitionSpec("data")))
    gradient = {
        "value_and_grad": jax.value_and_grad(loss_fn),
        "microbatch_gradients, one per device": ost.microbatch_gradients(
            loss_fn, 8, spmd_axis_name="data"
        ),
        "microbatch_gradients, 4 after each other": ost.microbatch_gradients(
            loss_fn, 4, vmap_size=1
        ),
    }[kind]
    everywhere = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(gradient, out_shardings=everywhere).lower(params, x).compile()
    return summarise(messages_of(compiled))


GRADIENTS = ("value_and_grad", "microbatch_gradients, one per device")
GRADIENTS += ("microbatch_gradients, 4 after each other",)


class Model(NamedTuple):
    """A transformer, by its shape."""

    width: int
    layers: int
    vocabulary: int
    devices: int  # that share it

    def params(self) -> dict[str, Any]:
        """The shapes of its parameters, bfloat16 nowhere."""
        width = self.width
        shapes: dict[str, tuple[int, ...]] = {"tokens": (self.vocabulary, width)}
        for i in range(self.layers):
            shapes |= {
                f"{i}/query_key_value": (width, 3 * width),
                f"{i}/attention_out": (width, width),
                f"{i}/mlp_in": (width, 4 * width),
                f"{i}/mlp_out": (4 * width, width),
                f"{i}/attention_norm": (width,),
                f"{i}/mlp_norm": (width,),
            }
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in shapes.items()
        }


SMALL = Model(256, 2, 1024, 8)
MODELS = {
    "1B": Model(2048, 18, 50304, 8),
    "70B": Model(8192, 86, 128000, 64),
    "1T": Model(25600, 127, 128000, 1024),
}
STATES: dict[str, Make] = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "safe_adamw": lambda: ost.safe_adamw(1e-3),
    "safe_adamw, both moments bfloat16": lambda: ost.safe_adamw(
        1e-3, mu_dtype=jnp.bfloat16, rms_dtype=jnp.bfloat16
    ),
    "clip_by_zscore": ost.clip_by_zscore,
    "clip_by_leaf_history": ost.clip_by_leaf_history,
    "spike_guard": lambda: ost.spike_guard(optax.identity()),
    "estimate_noise_scale": ost.estimate_noise_scale,
    'record("grad")': lambda: ost.record("grad"),
    'record("grad", correlation=True)': lambda: ost.record("grad", correlation=True),
    "accumulate_moments, mean_square=False": lambda: ost.accumulate_moments(
        optax.identity(), 4, mean_square=False
    ),
    "accumulate_moments": lambda: ost.accumulate_moments(optax.identity(), 4),
    "the full stack, 1,000 steps of history": full_stack,
}


def size_of(tree: Any) -> int:
    """In bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_sizes(tx: optax.GradientTransformation, params: Any) -> tuple[int, int]:
    """Bytes of a state that lie as the parameters do, and of the rest."""
    state = jax.eval_shape(tx.init, params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    like = size_of([leaf for leaf in jax.tree.leaves(state) if leaf.shape in shapes])
    return like, size_of(state) - like


def memory(name: str, model: Model) -> dict[str, float]:
    """Of the state of a transformation, in bytes; whole, and on one of the devices."""
    params = model.params()
    like, rest = state_sizes(STATES[name](), params)
    return {
        "times": like / size_of(params),
        "rest": rest,
        "whole": like + rest,
        "per_device": like / model.devices + rest,
    }


def check_memory(model: Model) -> dict[str, int]:
    """What XLA counts on one of eight devices, and what the shapes say."""
    mesh = make_mesh((8,), ("data",))
    params = {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=NamedSharding(mesh, PartitionSpec("data")),
        )
        for name, leaf in model.params().items()
    }
    compiled = compile_update(full_stack, params, mesh)
    like, rest = state_sizes(full_stack(), params)
    given = 2 * size_of(params) / 8  # the parameters and their gradient
    return {
        "counted": compiled.memory_analysis().argument_size_in_bytes,
        "expected": round(given + like / 8 + rest),
        "parameters": round(size_of(params) / 8),
    }


def show_bytes(size: float) -> str:
    """With three digits, as MB and the like."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            break
        size, unit = size / 1000, "TB" if unit == "GB" else unit
    else:
        return f"{size:.3g} TB"
    return f"{size:.3g} {unit}"


def message_table(report: Report) -> str:
    """Messages of an update, as Markdown."""
    leaves = [str(count) for count in report["leaves"]]
    at = ", ".join(f"{count:,}" for count in report["leaves"])
    head = ["on eight devices", "parameters copied", "rows split"]
    head += [f"split 4 × 2, at {at} leaves", "numbers in them", "largest"]
    lines = []
    for name, by_layout in report["messages"].items():
        copied, split = (by_layout[x][leaves[0]]["messages"] for x in ("data", "fsdp"))
        rows = [by_layout[MOST][count] for count in leaves]
        messages, numbers = (
            ", ".join(f"{row[key]:,}" for row in rows) for key in ("messages", "arrays")
        )
        largest = show_bytes(rows[-1]["largest"])
        lines.append([name, str(copied), str(split), messages, numbers, largest])
    return markdown(head, lines)


def memory_table(report: Report) -> str:
    """State by model, as Markdown."""
    heads = [f"{name} on {MODELS[name].devices:,}" for name in report["memory"]]
    lines = []
    for name in STATES:
        rows = [by_state[name] for by_state in report["memory"].values()]
        cells = [show_bytes(row["per_device"]) for row in rows]
        times, rest = rows[-1]["times"], show_bytes(rows[-1]["rest"])
        lines.append([name, f"{times:.2g}", rest, *cells])
    return markdown(["state", "× parameters", "beside, at 1T", *heads], lines)


def measure(leaves: tuple[int, ...], checked: Model) -> dict[str, Any]:
    """Everything."""
    count = functools.cache(count_messages)
    return {
        "leaves": leaves,
        "messages": {
            name: {
                layout: {
                    str(n): count(make, layout, n)
                    for n in (leaves if layout == MOST else leaves[:1])
                }
                for layout in LAYOUTS
            }
            for name, make in SIDES.items()
        },
        "by_devices": {
            str(devices): count(full_stack, "fsdp", leaves[0], devices)
            for devices in (2, 4, 8)
        },
        "gradient": {
            kind: {str(n): count_of_gradient(n, kind) for n in leaves[:2]}
            for kind in GRADIENTS
        },
        "memory": {
            name: {state: memory(state, model) for state in STATES}
            for name, model in MODELS.items()
        },
        "checked": check_memory(checked),
    }


def make_report(quick: bool) -> Report:
    """Counts, on eight CPU devices wherever it runs."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    return measure((2,), SMALL) if quick else measure(LEAVES, MODELS["1B"])


def tables(report: Report) -> dict[str, str]:
    """Both tables."""
    return {
        "Messages": message_table(report),
        "Memory": memory_table(report),
    }


if __name__ == "__main__":
    run_suite("many_devices", __doc__, make_report, tables)
