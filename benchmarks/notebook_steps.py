"""The training steps of the notebooks in ``examples``, to compile without training.

Of the cells up to the one that defines the step, only definitions are run: imports,
functions, classes and assignments. So nothing is trained, printed or installed.
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

EXAMPLES = Path(__file__).parents[1] / "examples"
_DEFINITIONS = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign

# A step over arrays, the shapes of its arguments, and the axis of the batch.
Program = tuple[Callable[..., Any], tuple, int]


def definitions(notebook: str, last: str) -> dict[str, Any]:
    """What the cells of a notebook define, up to the cell that defines ``last``."""
    # Of the extra "accelerators"; the tables are made without it.
    import nbformat
    from IPython.core.inputtransformer2 import TransformerManager

    found: dict[str, Any] = {}
    without_magic = TransformerManager().transform_cell
    for cell in nbformat.read(EXAMPLES / f"{notebook}.ipynb", as_version=4).cells:
        if cell.cell_type != "code":
            continue
        lines = ast.parse(without_magic(cell.source)).body
        kept: list[ast.stmt] = [x for x in lines if isinstance(x, _DEFINITIONS)]
        exec(compile(ast.Module(kept, []), notebook, "exec"), found)
        if last in found:
            return found
    raise ValueError(f"no cell of {notebook}.ipynb defines {last}.")


def _with_arrays(create: Callable[[], tuple], step: Callable, *shapes) -> tuple:
    """A step of a model and an optimizer as a function of their arrays."""
    graphdef, arrays = nnx.split(nnx.eval_shape(create))
    leaves, structure = jax.tree.flatten(arrays)

    def on_arrays(leaves, *inputs):
        made = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
        found = step(*made, *inputs)
        return jax.tree.leaves(nnx.state(made)), found

    return on_arrays, (leaves, *shapes)


def quickstart(step: str, optimizer: str) -> Program:
    """One of the two steps of the quickstart, with its optimizer."""
    of = definitions("quickstart", "plain_step")

    def create():
        model = of["GPT"](nnx.Rngs(0))
        return model, nnx.Optimizer(model, of[optimizer], wrt=nnx.Param)

    windows = jax.ShapeDtypeStruct((of["BATCH"], of["CONTEXT"] + 1), jnp.int32)
    damage = jax.ShapeDtypeStruct((), jnp.float32)
    return *_with_arrays(create, of[step], windows, damage), 0


def noise_scale(batch_size: int) -> Program:
    """The steps between two looks of the notebook about the noise scale."""
    of = definitions("noise_scale", "train_chunk")

    def create():
        model = of["GPT"](nnx.Rngs(0))
        return model, of["make_optimizer"](model, batch_size)

    shape = of["CHUNK"] // batch_size, batch_size, of["CONTEXT"] + 1
    batches = jax.ShapeDtypeStruct(shape, jnp.int32)
    return *_with_arrays(create, of["train_chunk"], batches), 1
