"""Records S and G² of every step of a run, and the noise scale as it truly was.

Trains the GPT of ``examples/gpt`` with its default chain. At some steps the parameters
are frozen, and the gradients of many other windows say what tr Σ and ‖G‖² are there.
From n microbatch gradients of b windows both are U-statistics of the Gram matrix::

  ‖G‖² = mean of ⟨gᵢ, gⱼ⟩, i ≠ j        tr Σ = b·(mean of ‖gᵢ‖² − ‖G‖²)

so that neither has a bias. Their error is that of the jackknife, which leaves out one
microbatch at a time. Windows are added until the error of log(tr Σ/‖G‖²) is at most
``ERROR``, or there are ``MOST`` of them.
"""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optax_stability as ost

sys.path.append(str(Path(__file__).parents[1] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "examples" / "gpt"))
import data
import training
from config import Config
from model import SIZES, next_token_loss

# The first steps are seen often: there the noise scale changes most.
FROZEN = (20, 30, 40, 50, 60, 70, 80, 90, 100, 120, 150, 180, 210, 250, 300)
FROZEN += (350, 400, 450, 500, 600)
# Windows per microbatch, added at a time, and in all.
PART, MORE, MOST = 8, 192, 384
ERROR = 0.12
GROUPS = ("all", "embedding", "norm", "attention", "perceptron")


class Observation(NamedTuple):
    """S and G² of each leaf in one step, float32[n_leaves] each."""

    trace: jax.Array
    grad_sq: jax.Array


def observe() -> optax.GradientTransformationExtraArgs:
    """Keeps S and G² of the last step; updates pass unchanged."""

    def init_fn(params):
        zeros = jnp.zeros(len(jax.tree.leaves(params)), jnp.float32)
        return Observation(zeros, zeros)

    def update_fn(updates, state, params=None, *, moments, **extra_args):
        del state, params, extra_args
        trace = moments.deviation / (moments.num_microbatches - 1)
        squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(updates)]
        return updates, Observation(trace, jnp.stack(squares) - trace / moments.weight)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def group_of(path: str) -> str:
    """The group of a leaf."""
    if "norm" in path:
        return "norm"
    if "embedding" in path:
        return "embedding"
    return "perceptron" if "mlp" in path else "attention"


def sum_by_group(groups: list[str], values: np.ndarray) -> np.ndarray:
    """Sums over the leaves, the first axis, for every group."""
    member = [[name in ("all", group) for group in groups] for name in GROUPS]
    return np.tensordot(np.array(member, np.float64), values, 1)


def truth(gram: np.ndarray, part: int) -> dict[str, list[float]]:
    """tr Σ, ‖G‖², and the error of the log of their ratio, for every group.

    Args:
      gram: float64[groups, n, n] – inner products of the microbatch gradients.
      part: windows per microbatch.
    """
    count = gram.shape[-1]
    own = np.trace(gram, axis1=1, axis2=2)
    shared = gram.sum((1, 2)) - own
    # Without one of them, [groups, n].
    own_without = own[:, None] - np.diagonal(gram, axis1=1, axis2=2)
    rows = gram.sum(2) - np.diagonal(gram, axis1=1, axis2=2)
    shared_without = shared[:, None] - 2 * rows

    def both(own, shared, count):
        grad_sq = shared / (count * (count - 1))
        return part * (own / count - grad_sq), grad_sq

    trace, grad_sq = both(own, shared, count)
    less = both(own_without, shared_without, count - 1)
    floor = 1e-30
    logs = np.log(less[0] / np.maximum(less[1], floor))
    spread = ((logs - logs.mean(1, keepdims=True)) ** 2).sum(1) * (count - 1) / count
    found = {"trace": trace, "grad_sq": grad_sq, "error": np.sqrt(spread)}
    return {name: values.tolist() for name, values in found.items()}


class Recorder:
    """A run whose parameters can be frozen."""

    def __init__(self, config: Config):
        """Creates the model, its optimizer and the compiled functions."""
        size = SIZES[config.size]
        self._corpus = data.load(config.data, size.context, config.tokenizer)
        self._shape = size.context, config.batch_size
        self._config = config

        def create():
            model, _ = training.create(config, size.vocabulary)
            chain = optax.chain(observe(), training.make_optimizer(config))
            return model, nnx.Optimizer(model, chain, wrt=nnx.Param)

        model, optimizer = nnx.jit(create)()
        graphdef, arrays = nnx.split((model, optimizer))
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
            return jax.tree.leaves(state), (*kept, metrics["loss"])

        def gradient(leaves, windows):
            state = jax.tree.unflatten(self._structure, leaves)
            model, _ = nnx.merge(graphdef, state.arrays)
            found = nnx.grad(next_token_loss)(model, windows)
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

    def truth(self, at: int, most: int = MOST) -> dict[str, Any]:
        """The noise scale of the present parameters, from other windows."""
        seed = 1000 * (1 + self._config.seed) + at
        drawn = data.Windows(self._corpus.train, self._shape[0], PART, seed)
        gradients: list[list[jax.Array]] = []
        count = MORE
        while True:
            done = len(gradients)
            gradients += [
                self._gradient(self._leaves, drawn(i))
                for i in range(done, count // PART)
            ]
            gram = np.asarray(self._gram(gradients), np.float64)
            found = truth(sum_by_group(self._groups, gram), PART)
            if found["error"][0] <= ERROR or count >= most:
                return {"windows": count} | found
            count += MORE

    def run(self, frozen: tuple[int, ...], most: int = MOST) -> dict[str, Any]:
        """Trains to the last frozen step; the series and the truths."""
        batches = data.Windows(self._corpus.train, *self._shape, self._config.seed)
        series, skipped, losses, truths = [], [], [], {}
        for at in range(1, frozen[-1] + 1):
            if at in frozen:
                # The parameters of which this step takes the gradient.
                start = time.perf_counter()
                truths[at] = self.truth(at, most)
                seconds = time.perf_counter() - start
                scale = truths[at]["trace"][0] / truths[at]["grad_sq"][0]
                sys.stderr.write(
                    f"{at} truth {scale:.3g} ± {truths[at]['error'][0]:.2f} "
                    f"{truths[at]['windows']} {seconds:.0f} s\n"
                )
            self._leaves, seen = self._step(self._leaves, batches(at - 1))
            trace, grad_sq, skip, loss = jax.device_get(seen)
            series.append(sum_by_group(self._groups, np.array([trace, grad_sq]).T))
            skipped.append(bool(skip))
            losses.append(float(loss))
        # [steps, groups, 2]
        return {
            "series": np.array(series),
            "skipped": np.array(skipped),
            "losses": np.array(losses),
            "truths": truths,
        }
