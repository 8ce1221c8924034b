"""Records S and G² of every step of a run, and the noise scale as it truly was.

Trains the GPT of ``examples/gpt`` with its default chain. Before some steps the
parameters are frozen, and the gradients of many other windows say what tr Σ and ‖G‖²
are there. From n microbatch gradients of b windows both are U-statistics of the Gram
matrix::

  ‖G‖² = mean of ⟨gᵢ, gⱼ⟩, i ≠ j        tr Σ = b·(mean of ‖gᵢ‖² − ‖G‖²)

so that neither has a bias. Their error is that of the jackknife, which leaves out one
microbatch at a time: a bootstrap would draw pairs of the same microbatch. Windows are
added until the error of log(tr Σ/‖G‖²) is at most ``ERROR``, or there are ``MOST``.

Run by ``python benchmarks/noise_truth.py --record``.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optax_stability as ost

sys.path.append(str(Path(__file__).parents[1] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "examples" / "gpt"))
import data
import model as gpt
import training
from config import Config

# The first steps are seen often: there the noise scale changes most.
FROZEN = (20, 30, 40, 50, 60, 70, 80, 90, 100, 120, 150, 180, 210, 250, 300)
FROZEN += (350, 400, 450, 500, 600)
# Windows per microbatch; added at a time, and in all, by the size of the model.
PART = 8
WINDOWS = {"tiny": (192, 384), "small": (48, 144)}
ERROR = 0.12
# The whole gradient, and the groups of leaves that make it up.
GROUPS = ("whole gradient", "embeddings", "norms", "attention", "perceptrons")
PARTS = Config().microbatches


class Run(NamedTuple):
    """A run to record: the trainer's default but for these settings."""

    batch_size: int
    decaying: bool
    seed: int
    steps: int
    size: Literal["tiny", "small"] = "tiny"

    @property
    def name(self) -> str:
        """What the run is called in tables."""
        size = "" if self.size == "tiny" else f"{self.size}, "
        rate = "decaying" if self.decaying else "constant"
        return f"{size}batch {self.batch_size}, {rate} rate, seed {self.seed}"

    @property
    def frozen(self) -> tuple[int, ...]:
        """The steps at which the truth is measured."""
        if self.size == "small":
            return tuple(range(4, self.steps + 1, 4))
        return tuple(step for step in FROZEN if step <= self.steps)

    @property
    def config(self) -> Config:
        """The settings of the trainer."""
        config = Config(
            size=self.size, batch_size=self.batch_size, steps=600, seed=self.seed
        )
        if self.decaying:
            return config
        rate = config.value("learning_rate")
        return dataclasses.replace(config, min_learning_rate=rate)


RUNS = (
    Run(8, True, 0, 600),
    Run(8, True, 1, 600),
    Run(8, False, 0, 600),
    Run(8, True, 2, 600),
    Run(32, True, 0, 300),
    Run(32, True, 1, 300),
    Run(8, False, 1, 600),
    Run(32, True, 2, 300),
    Run(8, False, 2, 600),
    Run(8, True, 0, 40, "small"),
)


class Recording(NamedTuple):
    """A run, as it was recorded.

    Attributes:
      examples: windows per step.
      series: float32[steps, groups − 1, 2] – S and G² of the groups of leaves.
      skipped: bool[steps] – whether the guard skipped the step.
      at: int[points] – the frozen steps.
      truth: float32[points, groups, 3] – tr Σ, ‖G‖² and the error of the log of their
        ratio, the whole gradient first.
    """

    examples: int
    series: np.ndarray
    skipped: np.ndarray
    at: np.ndarray
    truth: np.ndarray


class Observation(NamedTuple):
    """S and G² of each leaf in one step, float32[n_leaves] each."""

    trace: jax.Array
    grad_sq: jax.Array


def observe() -> optax.GradientTransformationExtraArgs:
    """Keeps S and G² of the last step; updates pass unchanged."""

    def init_fn(params):
        zeros = jnp.zeros(len(jax.tree.leaves(params)), jnp.float32)
        return Observation(zeros, zeros)

    def update_fn(updates, state, params=None, *, moments=None, **extra_args):
        del state, params, extra_args
        assert moments is not None
        trace = moments.deviation / (moments.num_microbatches - 1)
        squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(updates)]
        return updates, Observation(trace, jnp.stack(squares) - trace / moments.weight)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def group_of(path: str) -> str:
    """The group of a leaf."""
    if "norm" in path:
        return "norms"
    if "embedding" in path:
        return "embeddings"
    return "perceptrons" if "mlp" in path else "attention"


def sum_by_group(groups: list[str], values: np.ndarray) -> np.ndarray:
    """Sums over the leaves, the first axis, for every group."""
    member = [[name in (GROUPS[0], group) for group in groups] for name in GROUPS]
    return np.tensordot(np.array(member, np.float64), values, 1)


def u_statistics(gram: np.ndarray) -> np.ndarray:
    """The trace, ‖G‖² and the error of the log of their ratio, float64[groups, 3].

    Args:
      gram: float64[groups, n, n] – inner products of the gradients of n microbatches.
    """
    count = gram.shape[-1]
    diagonal = np.diagonal(gram, axis1=1, axis2=2)
    own, whole = diagonal.sum(1), gram.sum((1, 2))

    def both(own, shared, count):
        grad_sq = shared / (count * (count - 1))
        return PART * (own / count - grad_sq), grad_sq

    # Without each of the microbatches, [groups, n].
    own_less = own[:, None] - diagonal
    whole_less = whole[:, None] - 2 * gram.sum(2) + diagonal
    trace, grad_sq = both(own_less, whole_less - own_less, count - 1)
    logs = np.log(trace / np.maximum(grad_sq, 1e-30))
    error = np.sqrt((count - 1) * logs.var(1))
    return np.stack([*both(own, whole - own, count), error], 1)


class Recorder:
    """A run whose parameters can be frozen."""

    def __init__(self, config: Config):
        """Creates the model, its optimizer and the compiled functions."""
        size = gpt.SIZES[config.size]
        self._corpus = data.load(config.data, size.context, config.tokenizer)
        self._shape = size.context, config.batch_size
        self._config = config

        def create():
            model, _ = training.create(config, size.vocabulary)
            chain = optax.chain(observe(), training.make_optimizer(config))
            return model, nnx.Optimizer(model, chain, wrt=nnx.Param)

        model, optimizer = nnx.jit(create)()
        graphdef, arrays = nnx.split((model, optimizer))
        self._graphdef = graphdef
        state = training.TrainState(arrays, None)
        self._leaves, self._structure = jax.tree.flatten(state)
        names = ost.leaf_names(nnx.state(model, nnx.Param))
        self._groups = [group_of(name) for name in names]

        def step(leaves, windows):
            state = jax.tree.unflatten(self._structure, leaves)
            state, metrics = training.train_step(graphdef, config, state, windows, {})
            _, optimizer = nnx.merge(graphdef, state.arrays)
            seen = optimizer.opt_state[0]
            kept = seen.trace[...], seen.grad_sq[...], metrics["skip/skipped"]
            return jax.tree.leaves(state), kept

        def gradient(leaves, windows):
            state = jax.tree.unflatten(self._structure, leaves)
            model, _ = nnx.merge(graphdef, state.arrays)
            found = nnx.grad(gpt.next_token_loss)(model, windows)
            return [jnp.ravel(leaf) for leaf in jax.tree.leaves(found)]

        self._step = jax.jit(step, donate_argnums=0)
        self._gradient = jax.jit(gradient)
        self._gram = jax.jit(
            lambda parts: jnp.stack(
                [
                    jnp.stack(leaf) @ jnp.stack(leaf).T
                    for leaf in zip(*parts, strict=True)
                ]
            )
        )

    def truth(self, at: int, more: int, most: int) -> np.ndarray:
        """The noise scale of the present parameters, from windows of another order."""
        seed = 1000 * (1 + self._config.seed) + at
        drawn = data.Windows(self._corpus.train, self._shape[0], PART, seed)
        gradients: list[list[jax.Array]] = []
        while True:
            start = len(gradients)
            added = range(start, start + more // PART)
            gradients += [self._gradient(self._leaves, drawn(i)) for i in added]
            gram = np.asarray(self._gram(gradients), np.float64)
            found = u_statistics(sum_by_group(self._groups, gram))
            if found[0, 2] <= ERROR or PART * len(gradients) >= most:
                return found

    def run(self, frozen: tuple[int, ...], more: int, most: int) -> Recording:
        """Trains to the last frozen step.

        Args:
          frozen: the steps at which the truth is measured.
          more: windows that are added at a time, until the truth is known.
          most: windows after which no more are added.
        """
        batches = data.Windows(self._corpus.train, *self._shape, self._config.seed)
        series, skipped, truths = [], [], []
        for at in range(1, frozen[-1] + 1):
            if at in frozen:
                # Of the parameters whose gradient this step takes.
                truths.append(self.truth(at, more, most))
            self._leaves, seen = self._step(self._leaves, batches(at - 1))
            trace, grad_sq, skip = jax.device_get(seen)
            series.append(sum_by_group(self._groups, np.array([trace, grad_sq]).T)[1:])
            skipped.append(bool(skip))
        return Recording(
            examples=self._config.batch_size,
            series=np.array(series, np.float32),
            skipped=np.array(skipped),
            at=np.array(frozen),
            truth=np.array(truths, np.float32),
        )


def record(path: Path, runs: tuple[Run, ...]) -> None:
    """Records the runs that the file lacks, and writes each as soon as it is done."""
    known = load(path) if path.exists() else {}
    for run in runs:
        if run.name in known:
            continue
        known[run.name] = Recorder(run.config).run(run.frozen, *WINDOWS[run.size])
        arrays = {
            f"{name}/{key}": x
            for name, recording in known.items()
            for key, x in recording._asdict().items()
        }
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(path, **arrays)


def load(path: Path) -> dict[str, Recording]:
    """The recordings of a file, by the name of the run."""
    with np.load(path) as arrays:
        names = dict.fromkeys(key.partition("/")[0] for key in arrays.files)
        return {
            name: Recording(*(arrays[f"{name}/{key}"] for key in Recording._fields))
            for name in names
        }


def short_run() -> dict[str, Recording]:
    """A run of forty steps, with a truth that is hardly known."""
    run = Run(8, True, 0, 40)
    return {run.name: Recorder(run.config).run((10, 20, 40), 192, 192)}
