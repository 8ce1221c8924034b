"""The devices of a run: those of one process, or of several that train together.

They form a mesh with three axes, any of which may be left away:

    data   the batch is split along it; every device has all parameters
    fsdp   batch and parameters are split along it, and gathered layer by layer
    model  matrices are split along it, and work together on the same examples

JAX's compiler does the rest: it knows how arrays lie, and puts in what must be sent.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from input_error import InputError
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optax_stability as ost

AXES = ("data", "fsdp", "model")
# Along which axes a parameter is split, by the end of its name; others are not.
Rules = Mapping[str, tuple[str | None, ...]]


def join(processes: str | None) -> None:
    """Connects this process to the others, before its devices are first used.

    Args:
      processes: ``"auto"`` on a cluster that JAX knows, such as a TPU slice or Slurm;
        elsewhere ``"HOST:PORT,INDEX/COUNT"``, where HOST is that of the process with
        index 0; None: it works alone.

    Raises:
      InputError: it is none of these, or there is no such cluster.
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
        raise InputError(f"--processes: {processes} is no place among them; {remedy}")
    jax.distributed.initialize(found[1], int(found[3]), int(found[2]))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def parse_mesh(text: str | None) -> dict[str, int]:
    """The size of each axis; None: one axis, ``data``, of all devices.

    Raises:
      InputError: it is no mesh, or not one of the devices there are.
    """
    count = jax.device_count()
    if text is None:
        return {"data": count}
    sizes = {}
    for part in text.split(","):
        found = re.fullmatch(rf"({'|'.join(AXES)})=([1-9]\d*)", part)
        if not found or found[1] in sizes:
            remedy = f"give sizes of {', '.join(AXES)}, such as data=4,model=2"
            raise InputError(f"--mesh: {text} is no mesh; {remedy}")
        sizes[found[1]] = int(found[2])
    if math.prod(sizes.values()) != count:
        needs = f"needs {math.prod(sizes.values())} devices, and there are {count}"
        raise InputError(f"--mesh: {text} {needs}; give sizes whose product is {count}")
    return sizes


def make_mesh(text: str | None) -> Mesh:
    """The devices of all processes, in the shape that :func:`parse_mesh` reads."""
    sizes = parse_mesh(text)
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds)


def batch_shards(sizes: Mapping[str, int]) -> int:
    """In how many parts a batch is split."""
    return sizes.get("data", 1) * sizes.get("fsdp", 1)


def everywhere(mesh: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """A batch, split along the axes that split it."""
    axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(axes))


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that all processes have, on all devices; each puts up its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """How parameters lie, and with them what the optimizer keeps for each.

    That has the names of the parameters and their shapes. What else has such a name,
    but fewer axes, lies everywhere.

    Args:
      tree: parameters, or all of a state, as arrays or shapes.
      mesh: the devices.
      rules: axes of the mesh by the end of a name; those it lacks split nothing.

    Raises:
      InputError: an axis of the mesh does not divide an array.
    """

    def lie(name: str, leaf: Any) -> NamedSharding:
        matches = (
            axes for end, axes in rules.items() if f"/{name}".endswith(f"/{end}")
        )
        axes = next(matches, ())
        if len(axes) != len(leaf.shape):
            return everywhere(mesh)
        axes = [axis if axis in mesh.axis_names else None for axis in axes]
        for axis, size in zip(axes, leaf.shape, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                says = f"{axis}={mesh.shape[axis]} does not divide {name}, {leaf.shape}"
                raise InputError(f"--mesh: {says}; give a smaller power of two")
        return NamedSharding(mesh, PartitionSpec(*axes))

    leaves, structure = jax.tree.flatten(tree)
    names = ost.leaf_names(tree)
    return jax.tree.unflatten(structure, map(lie, names, leaves))


def make_split(
    create: Callable[..., Any], given: tuple, mesh: Mesh, rules: Rules
) -> tuple[Any, Any]:
    """What ``create`` makes of what is given, and how it lies.

    Each device makes its part of it: no array is ever whole on one that shares it.
    """
    lie = shardings(jax.eval_shape(create, *given), mesh, rules)
    return jax.jit(create, out_shardings=lie)(*given), lie
