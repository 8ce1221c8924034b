"""Fine-tunes a trained GPT on another kind of text, by low-rank adapters (LoRA).

    python examples/gpt/train.py                    # a GPT that has read Python
    python examples/lora_finetune.py                # reads Python's manual

Every matrix W of the blocks becomes W + (α/rank)·A·B. W is frozen. A and B are trained
by the same stability chain, with checkpoints, resuming, rewinding, log and report as in
``gpt/train.py``. At the end the product is added to W. The result is an ordinary GPT,
saved in ``merged`` under ``--out``; this script can fine-tune it again.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685.
"""

import dataclasses
import math
import sys
import sysconfig
from pathlib import Path

import jax
import tyro
from flax import nnx

sys.path.append(str(Path(__file__).parent / "gpt"))
import console
import data
import devices
import train
import training
from command import run_command
from config import FIXED, Config, check
from inputs import InputError, Resume
from model import GPT, SIZES
from resuming import as_json

from optax_stability.orbax import Checkpoints

# The manual that ``help("if")`` shows: English, and part of every Python installation.
MANUAL = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
MATRICES = ("query_key_value", "attention_out", "mlp_in", "mlp_out")


@dataclasses.dataclass(frozen=True)
class Flags:
    """Fine-tunes a checkpoint of gpt/train.py on other text.

    The same command, given again, resumes a run that was interrupted.
    """

    base: Path = Path("runs/gpt")
    """Folder of the run whose newest checkpoint is fine-tuned."""
    data: Path = MANUAL
    """Text file or folder of text; by default the manual that Python's help() shows."""
    rank: int = 8
    """Columns of A and rows of B."""
    alpha: float = 16.0
    """Size of the change: A·B is multiplied by alpha/rank."""
    steps: int = 200
    """Optimizer steps."""
    learning_rate: float = 3e-3
    """Peak of the schedule."""
    warmup_steps: int | None = None
    """Steps in which the rate rises to its peak; by default a tenth, at most 50."""
    inject: tuple[str, ...] = ()
    """Faults to inject, such as nan@100; see optax_stability.faults."""
    sample_tokens: int = 300
    """Length of the text that the model writes at the end; 0 for none."""
    resume: Resume = "auto"
    """Resume the run in --out, if there is one; changed: also with other settings."""
    out: Path = Path("runs/lora")
    """Folder for the checkpoints, the merged model, the log and the report."""


class Adapted(nnx.Module):
    """A frozen linear layer, and a trained low-rank layer whose output is added."""

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, rngs: nnx.Rngs):
        """Starts as the same function as ``base``, because B is 0."""
        self.base, self.scale = base, alpha / rank
        self.change = nnx.LoRA(
            base.in_features, rank, base.out_features, dtype=base.dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds the outputs of both layers."""
        return self.base(x) + self.scale * self.change(x)

    def merged(self) -> nnx.Linear:
        """One linear layer with the same outputs."""
        product = self.change.lora_a[...] @ self.change.lora_b[...]
        self.base.kernel[...] += self.scale * product
        return self.base


def adapt(model: GPT, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
    """Replaces the linear layers of every block by adapters."""
    for block in model.blocks:
        for name in MATRICES:
            setattr(block, name, Adapted(getattr(block, name), rank, alpha, rngs))


def merge(model: GPT) -> None:
    """Removes the adapters, and adds their products to the matrices."""
    for block in model.blocks:
        for name in MATRICES:
            setattr(block, name, getattr(block, name).merged())


def load(folder: Path) -> tuple[Config, GPT]:
    """Loads settings and model of the newest checkpoint in a folder.

    Raises:
      InputError: there is no complete checkpoint.
    """
    if not (folder / "checkpoints").is_dir():
        remedy = "train one with gpt/train.py, or check the path"
        raise InputError(f"--base: no checkpoints in {folder}; {remedy}")
    where, report = folder / "checkpoints", console.warn
    with Checkpoints(where, read_only=True, report=report) as saved:
        newest = saved.newest()
        if newest is None:
            raise InputError(f"--base: no complete checkpoint in {folder}; train again")
        settings = newest["settings"]
        tokenizer = settings["tokenizer"] and Path(settings["tokenizer"])
        config = Config(**settings | {"tokenizer": tokenizer})
        # Shapes only: the file holds an optimizer state, which is not used here.
        shapes = nnx.eval_shape(lambda: training.create(config, newest["vocabulary"]))
        graphdef, arrays = nnx.split(shapes)
        state = training.TrainState(arrays, training.start_loss_scale(config))
        mesh = devices.make_mesh(None)
        whole = devices.replicated(mesh)
        found = saved.load(newest, like=state, sharding=whole)
    return config, nnx.merge(graphdef, found.arrays)[0]


def configure(flags: Flags, before: Config) -> Config:
    """The settings of the run: those of the base, with the values of the flags."""
    names = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(flags).items() if name in names}
    return dataclasses.replace(
        before,
        **given,
        min_learning_rate=None,
        baseline=False,
        histogram_every=0,
        mesh=None,
        processes=None,
    )


def finetune(flags: Flags) -> tuple[GPT, train.Row]:
    """Trains the adapters and saves the merged model.

    Returns:
      The merged model, and what the last step and the last evaluation measured.

    Raises:
      InputError: a flag, the base, the data or the output folder cannot be used.
    """
    if flags.rank < 1:
        raise InputError(f"--rank: {flags.rank} is too small; give 1 or more")
    if not 0 < flags.alpha < math.inf:
        remedy = "is out of range; give a finite number above 0"
        raise InputError(f"--alpha: {flags.alpha} {remedy}")
    before, model = load(flags.base)
    config = configure(flags, before)
    check(config)
    corpus = data.load(config.data, SIZES[config.size].context, config.tokenizer)
    vocabulary = model.tokens.num_embeddings
    if corpus.vocabulary > vocabulary:
        problem = f"{flags.data} has {corpus.vocabulary} token ids, but the model of"
        remedy = f"{flags.base} has {vocabulary}; give data of the same tokenizer"
        raise InputError(f"--data: {problem} {remedy}")

    graphdef, arrays = nnx.split(model)

    def create(arrays: nnx.State) -> tuple[GPT, nnx.Optimizer]:
        adapted = nnx.merge(graphdef, arrays)
        adapt(adapted, flags.rank, flags.alpha, nnx.Rngs(config.seed))
        chain = training.make_optimizer(config)
        return adapted, nnx.Optimizer(adapted, chain, wrt=nnx.LoRAParam)

    fixed = FIXED | {"base", "rank", "alpha"}
    run, row = train.run_training(
        config, corpus, create, as_json(config) | as_json(flags), fixed, (arrays,)
    )
    merged = run.model()
    merge(merged)
    save(merged, config, flags.out / "merged" / "checkpoints")
    return merged, row


def save(model: GPT, config: Config, folder: Path) -> None:
    """Writes a checkpoint of step 0, like that of a new run."""
    optimizer = nnx.Optimizer(model, training.make_optimizer(config), wrt=nnx.Param)
    arrays = nnx.state((model, optimizer))
    state = training.TrainState(arrays, training.start_loss_scale(config))
    about = {"settings": as_json(config), "vocabulary": model.tokens.num_embeddings}
    with Checkpoints(folder, keep=1) as saved:
        saved.save(state, about | {"step": 0, "batch": 0})


def main() -> None:
    """Runs the command line."""
    run_command(lambda: finetune(tyro.cli(Flags)))


if __name__ == "__main__":
    main()
