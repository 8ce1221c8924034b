"""Arrays on a mesh, and what the devices of a program send each other."""

import re

import jax
from jax.sharding import NamedSharding, PartitionSpec

COLLECTIVES = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"


def place(tree, mesh, *spec):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))


def collectives(program):
    """What devices send each other: the operation and the shapes it gives."""
    text = program.as_text()
    found = re.findall(rf"= (\(.*?\)|\S+) ({COLLECTIVES})(?:-start)?\(", text)
    sizes = [re.findall(r"\[([\d,]*)\]", shapes) for shapes, _ in found]
    return [
        (operation, [tuple(map(int, filter(None, s.split(",")))) for s in shapes])
        for (_, operation), shapes in zip(found, sizes, strict=True)
    ]
