"""The devices of a run: those of one process, or of several that train together.

They form a mesh with up to three axes:

    data   splits the batch; every device has all parameters
    fsdp   splits batch and parameters; parameters are gathered layer by layer
    model  splits the matrices; its devices work together on the same examples

JAX's compiler does the rest: from the shardings of the arrays it derives the
communication.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from inputs import InputError
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optax_stability as ost

AXES = ("data", "fsdp", "model")
# The axes that split a parameter, by the end of its name; others are replicated.
Rules = Mapping[str, tuple[str | None, ...]]


def join(processes: str | None) -> None:
    """Connects this process to the others, before its devices are first used.

    Args:
      processes: ``"auto"`` on a cluster that JAX knows, such as a TPU slice or Slurm;
        elsewhere ``"HOST:PORT,INDEX/COUNT"``, where HOST is the host of process 0;
        None: there is only this process.

    Raises:
      InputError: ``processes`` is none of these, or JAX finds no cluster.
    """
    if processes is None or jax.distributed.is_initialized():
        return
    if processes == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            remedy = "JAX finds no cluster here; give HOST:PORT,INDEX/COUNT"
            raise InputError(f"--processes: {processes}, but {remedy}") from error
        return
    found = re.fullmatch(r"(.+:\d+),(\d+)/(\d+)", processes)
    if not found or int(found[2]) >= int(found[3]):
        remedy = "give auto, or HOST:PORT,INDEX/COUNT with INDEX from 0 to COUNT - 1"
        raise InputError(f"--processes: {processes} is not valid; {remedy}")
    jax.distributed.initialize(found[1], int(found[3]), int(found[2]))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def parse_mesh(text: str | None) -> dict[str, int]:
    """The size of each axis; None: one axis, ``data``, of all devices.

    Raises:
      InputError: it is not a mesh, or does not fit the number of devices.
    """
    count = jax.device_count()
    if text is None:
        return {"data": count}
    sizes = {}
    for part in text.split(","):
        found = re.fullmatch(rf"({'|'.join(AXES)})=([1-9]\d*)", part)
        if not found or found[1] in sizes:
            remedy = f"give sizes of {', '.join(AXES)}, such as data=4,model=2"
            raise InputError(f"--mesh: {text} is not a mesh; {remedy}")
        sizes[found[1]] = int(found[2])
    if math.prod(sizes.values()) != count:
        needs = f"needs {math.prod(sizes.values())} devices, but there are {count}"
        raise InputError(f"--mesh: {text} {needs}; give sizes whose product is {count}")
    return sizes


def describe(text: str | None) -> str:
    """The number and the kind of all devices, and the mesh if one was given."""
    mesh = f" as {text}" if text else ""
    return f"{jax.device_count()} {jax.default_backend()}{mesh}"


def make_mesh(text: str | None) -> Mesh:
    """A mesh of the devices of all processes; see :func:`parse_mesh`."""
    sizes = parse_mesh(text)
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds)


def batch_shards(sizes: Mapping[str, int]) -> int:
    """The number of parts into which a batch is split."""
    return sizes.get("data", 1) * sizes.get("fsdp", 1)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: split by examples over ``data`` and ``fsdp``."""
    axes = [axis for axis in ("data", "fsdp") if axis in mesh.axis_names]
    return NamedSharding(mesh, PartitionSpec(tuple(axes)))


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts an array that all processes have on the devices; each process its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The shardings of the parameters, and of the optimizer state, which follows them.

    Optimizer arrays of a parameter have its name and shape. Arrays with such a name but
    another number of axes are replicated.

    Args:
      tree: parameters, or a whole state, as arrays or shapes.
      mesh: the devices.
      rules: axes of the mesh by the end of a name; axes that the mesh lacks are
        ignored.

    Raises:
      InputError: an axis of the mesh does not divide an array.
    """

    def sharding_of(name: str, leaf: Any) -> NamedSharding:
        matches = (
            axes for end, axes in rules.items() if f"/{name}".endswith(f"/{end}")
        )
        axes = next(matches, ())
        if len(axes) != len(leaf.shape):
            return replicated(mesh)
        axes = [axis if axis in mesh.axis_names else None for axis in axes]
        for axis, size in zip(axes, leaf.shape, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                given = f"{axis}={mesh.shape[axis]}"
                problem = f"{given} does not divide {name}, {leaf.shape}"
                raise InputError(f"--mesh: {problem}; give a smaller power of two")
        return NamedSharding(mesh, PartitionSpec(*axes))

    leaves, structure = jax.tree.flatten(tree)
    names = ost.leaf_names(tree)
    return jax.tree.unflatten(structure, map(sharding_of, names, leaves))


def create_sharded(
    create: Callable[..., Any], arguments: tuple, mesh: Mesh, rules: Rules
) -> tuple[Any, Any]:
    """Returns ``create(*arguments)``, sharded, and its shardings.

    Each device creates its own part: no device ever holds the whole of a split array.
    """
    sharding = shardings(jax.eval_shape(create, *arguments), mesh, rules)
    return jax.jit(create, out_shardings=sharding)(*arguments), sharding


def look(step: int, every: int) -> bool | None:
    """Whether a step takes the costly measurements; None lets the program decide.

    On a CPU a condition costs nothing. Elsewhere the host chooses between two programs.
    """
    return None if jax.default_backend() == "cpu" else step % every == 0
