"""Records the noise of a run in two norms, and what batches of each size achieve.

A small GPT is trained by Adam, and frozen at some steps: the gradients of
``PARTS_OF_TRUTH`` microbatches of other windows tell the noise scale in both norms, and
how much the sign of a batch of each size achieves. From some of these steps branches of
``STEPS`` steps are trained with batches of ``BATCHES`` windows, each with the learning
rate that suits it best, found by doubling and halving; their loss is that of windows
held out.

Run by ``python benchmarks/noise_norms.py --record``.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from noise_recording import PART, PARTS, data, gpt, u_statistics
from scipy import special

import optax_stability as ost

MODEL = dataclasses.replace(gpt.SIZES["tiny"], layers=2, width=64, context=64)
BATCH, RATE, WARMUP = 8, 3e-3, 50
SEEDS = (0, 1)
AT = (20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400, 500, 600)
BRANCHED = (60, 150, 300, 600)
BATCHES, STEPS = (2, 4, 8, 16, 32, 64), 50
HELD_OUT, PARTS_OF_TRUTH, FOLDS = 256, 96, 4
ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)
# The first rate that is tried in the smallest branch.
FIRST_RATE, MOST_RATES = 1e-3, 8


class Frozen(NamedTuple):
    """What was measured at one step.

    Attributes:
      start: held-out loss before the branches.
      rates: float64[batches, tried] – learning rates; NaN where fewer were tried; empty
        without branches.
      losses: float64[batches, tried] – held-out losses at the end of the branches.
      l2: tr Σ, ‖G‖² and the error of the log of their ratio.
      l1: Σσ, ΣG²/σ and the error of the log of their ratio.
      progress: float64[n, 2] – windows B, and ΣGᵢ·E sign(ḡᵢ) of a batch of B.
    """

    start: np.ndarray
    rates: np.ndarray
    losses: np.ndarray
    l2: np.ndarray
    l1: np.ndarray
    progress: np.ndarray


def best_rate(loss_at: Callable[[float], float], rate: float) -> dict[float, float]:
    """Losses by rate, by doubling and halving until the best is inside."""
    found = {rate: loss_at(rate), 2 * rate: loss_at(2 * rate)}
    while True:
        best = min(found, key=lambda each: found[each])
        missing = [x for x in (best / 2, 2 * best) if x not in found]
        if not missing or len(found) == MOST_RATES:
            return found
        found[missing[0]] = loss_at(missing[0])


def l1_statistics(leaf: np.ndarray) -> np.ndarray:
    """Σσ and ΣG²/σ of a leaf, unbiased for Gaussian gradients, [n, d] of them.

    The mean of n numbers and their deviation s are independent; E s = c·σ and
    E 1/s = k/σ.
    """
    n = len(leaf)
    half = (n - 1) / 2
    gamma = np.exp(special.gammaln(half) - special.gammaln(half + 0.5))
    c = 1 / (gamma * math.sqrt(half))
    k = math.sqrt(half) * np.exp(special.gammaln(half - 0.5) - special.gammaln(half))
    s = leaf.std(0, ddof=1)
    s, mean = s[s > 0], leaf.mean(0)[s > 0]
    per_window = math.sqrt(PART)
    sigma = per_window * s.sum() / c
    signal = (mean**2 / s).sum() / k - s.sum() / (c * n)
    return np.array([sigma, signal / per_window])


def progress(leaf: np.ndarray, size: int) -> float:
    """ΣGᵢ·E sign(ḡᵢ) of ``size`` microbatches, against all the others, without bias."""
    total, n, found = leaf.sum(0), len(leaf), []
    for start in range(0, n - size + 1, size):
        part = leaf[start : start + size].sum(0)
        found.append(np.sign(part) @ (total - part) / (n - size))
    return float(np.mean(found))


class Trainer:
    """A run that can be frozen."""

    def __init__(self, seed: int):
        """Creates the model and the compiled functions."""
        self._corpus = data.load(None, MODEL.context, None)
        self._seed = seed
        model = gpt.GPT(MODEL, MODEL.vocabulary, jnp.dtype("float32"), nnx.Rngs(seed))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        self._params = nnx.pure(params)
        self._state = ADAM.init(self._params)

        def loss(params, windows):
            return gpt.next_token_loss(nnx.merge(graph, params, rest), windows)

        def move(params, state, grads, rate):
            updates, state = ADAM.update(grads, state)
            moved = jax.tree.map(lambda p, x: p - rate * x, params, updates)
            return moved, state

        measured = ost.microbatch_gradients(loss, PARTS, vmap_size=1, l1=True)

        def step(params, state, windows, rate):
            _, grads, moments = measured(params, windows)
            return *move(params, state, grads, rate), _statistics(grads, moments)

        def branch_step(params, state, windows, rate):
            return move(params, state, jax.grad(loss)(params, windows), rate)

        def gradient(params, windows):
            leaves = jax.tree.leaves(jax.grad(loss)(params, windows))
            return jnp.concatenate([leaf.ravel() for leaf in leaves])

        self._loss, self._step = jax.jit(loss), jax.jit(step)
        self._branch_step, self._gradient = jax.jit(branch_step), jax.jit(gradient)

    def _windows(self, size: int, seed: int, held_out: bool = False) -> data.Windows:
        stream = self._corpus.held_out if held_out else self._corpus.train
        return data.Windows(stream, MODEL.context, size, seed)

    def _held_out_loss(self, params) -> float:
        drawn = self._windows(64, 0, held_out=True)
        return float(
            np.mean([self._loss(params, drawn(i)) for i in range(HELD_OUT // 64)])
        )

    def _branch(self, batch: int, at: int, steps: int, rate: float) -> float:
        """The held-out loss after a branch."""
        params, state = self._params, ADAM.init(self._params)
        drawn = self._windows(batch, 5000 + 1000 * self._seed + at)
        for i in range(steps):
            params, state = self._branch_step(params, state, drawn(i), rate)
        return self._held_out_loss(params)

    def _checkpoint(self, at: int, steps: int) -> Frozen:
        """Noise of the present parameters, and branches of so many steps, if any."""
        drawn = self._windows(PART, 9000 + 1000 * self._seed + at)
        found = [self._gradient(self._params, drawn(i)) for i in range(PARTS_OF_TRUTH)]
        parts = np.stack([np.asarray(each, np.float64) for each in found])
        folds = [l1_statistics(parts[i::FOLDS]) for i in range(FOLDS)]
        logs = [math.log(sigma / max(signal, 1e-30)) for sigma, signal in folds]
        counts = (1, 2, 4, 8, 16, 32, 48)
        losses: dict[int, dict[float, float]] = {}
        rate = FIRST_RATE
        for batch in BATCHES if steps else ():
            tried = best_rate(functools.partial(self._branch, batch, at, steps), rate)
            losses[batch], rate = tried, min(tried, key=tried.__getitem__)
        return Frozen(
            start=np.array(self._held_out_loss(self._params)),
            rates=_rows([list(each) for each in losses.values()]),
            losses=_rows([list(each.values()) for each in losses.values()]),
            l2=u_statistics((parts @ parts.T)[None])[0],
            l1=np.array([*l1_statistics(parts), np.std(logs, ddof=1) / FOLDS**0.5]),
            progress=np.array([[PART * n, progress(parts, n)] for n in counts]),
        )

    def run(
        self, frozen: tuple[int, ...], branched: tuple[int, ...], steps: int
    ) -> dict[str, np.ndarray]:
        """Trains to the last frozen step; the noise of every step, and checkpoints.

        Args:
          frozen: the steps at which the truth is measured.
          branched: those of them from which branches are trained.
          steps: of each branch.
        """
        batches, series, found = self._windows(BATCH, self._seed), [], {}
        for at in range(1, frozen[-1] + 1):
            if at in frozen:
                seen = self._checkpoint(at, steps if at in branched else 0)
                for key, value in seen._asdict().items():
                    found[f"{self._seed}/{at}/{key}"] = value
            rate = RATE * min(1, at / WARMUP)
            self._params, self._state, seen = self._step(
                self._params, self._state, batches(at - 1), rate
            )
            series.append(seen)
        found[f"{self._seed}/series"] = np.array(jax.device_get(series))
        return found


def _statistics(grads, moments: ost.Moments) -> jax.Array:
    """S and G² of the whole gradient, and both in the L1 norm; and ‖ḡ‖₁."""
    trace = moments.deviation.sum() / (PARTS - 1)
    grad_sq = jnp.square(moments.norm).sum() - trace / moments.weight
    sigma = moments.l1.deviation.sum() / (PARTS - 1)
    signal = moments.l1.agreement.sum() / (PARTS * (PARTS - 1) / 2)
    size = sum(jnp.abs(g).sum() for g in jax.tree.leaves(grads))
    return jnp.stack([trace, grad_sq, sigma, signal, size])


def _rows(rows: list[list[float]]) -> np.ndarray:
    """An array, with NaN where a row is shorter."""
    width = max(map(len, rows), default=0)
    full = [row + [math.nan] * (width - len(row)) for row in rows]
    return np.array(full).reshape(len(rows), width)


def record(path: Path) -> None:
    """Records a run for each seed."""
    arrays: dict[str, np.ndarray] = {}
    for seed in SEEDS:
        arrays |= Trainer(seed).run(AT, BRANCHED, STEPS)
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


def short_run() -> dict[str, np.ndarray]:
    """A run of a few steps, whose branches are shorter still."""
    return Trainer(0).run((4, 8), (8,), 2)
