"""Records the noise of a run in two norms, and what a batch of each size achieves there.

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
from noise_recording import PART, PARTS, data, next_token_loss, u_statistics
from noise_recording import SIZES as MODELS
from model import GPT
from scipy import special

import optax_stability as ost

MODEL = dataclasses.replace(MODELS["tiny"], layers=2, width=64, context=64)
BATCH, RATE, WARMUP = 8, 3e-3, 50
SEEDS = (0, 1, 2)
FROZEN = (20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400, 500, 600)
BRANCHED = (60, 150, 300, 600)
BATCHES, STEPS = (2, 4, 8, 16, 32, 64), 50
HELD_OUT, PARTS_OF_TRUTH, FOLDS = 256, 96, 4
ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)
# The first rate that is tried in the smallest branch.
FIRST_RATE, MOST_RATES = 1e-3, 8


class Checkpoint(NamedTuple):
    """What was measured at one step.

    Attributes:
      at: the step.
      start: held-out loss before the branches.
      rates: float64[batches, tried] – learning rates; NaN where fewer were tried; empty
        without branches.
      losses: float64[batches, tried] – held-out losses at the end of the branches.
      l2: tr Σ, ‖G‖² and the error of the log of their ratio.
      l1: Σσ, ΣG²/σ and the error of the log of their ratio.
      progress: float64[n, 2] – windows B, and ΣGᵢ·E sign(ḡᵢ) of a batch of B.
    """

    at: int
    start: float
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
        model = GPT(MODEL, MODEL.vocabulary, jnp.dtype("float32"), nnx.Rngs(seed))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        self._params = nnx.pure(params)
        self._state = ADAM.init(self._params)

        def loss(params, windows):
            return next_token_loss(nnx.merge(graph, params, rest), windows)

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

    def _branch(self, batch: int, at: int, rate: float) -> float:
        """The held-out loss after a branch."""
        params, state = self._params, ADAM.init(self._params)
        drawn = self._windows(batch, 5000 + 1000 * self._seed + at)
        for i in range(STEPS):
            params, state = self._branch_step(params, state, drawn(i), rate)
        return self._held_out_loss(params)

    def _checkpoint(self, at: int) -> Checkpoint:
        """Noise and branches of the present parameters."""
        drawn = self._windows(PART, 9000 + 1000 * self._seed + at)
        found = [self._gradient(self._params, drawn(i)) for i in range(PARTS_OF_TRUTH)]
        parts = np.stack([np.asarray(each, np.float64) for each in found])
        folds = [l1_statistics(parts[i::FOLDS]) for i in range(FOLDS)]
        logs = [math.log(sigma / max(signal, 1e-30)) for sigma, signal in folds]
        counts = (1, 2, 4, 8, 16, 32, 48)
        losses: dict[int, dict[float, float]] = {}
        rate = FIRST_RATE
        for batch in BATCHES if at in BRANCHED else ():
            tried = best_rate(functools.partial(self._branch, batch, at), rate)
            losses[batch], rate = tried, min(tried, key=tried.__getitem__)
        return Checkpoint(
            at=at,
            start=self._held_out_loss(self._params),
            rates=_rows([list(each) for each in losses.values()]),
            losses=_rows([list(each.values()) for each in losses.values()]),
            l2=u_statistics((parts @ parts.T)[None])[0],
            l1=np.array([*l1_statistics(parts), np.std(logs, ddof=1) / FOLDS**0.5]),
            progress=np.array([[PART * n, progress(parts, n)] for n in counts]),
        )

    def run(self) -> tuple[np.ndarray, list[Checkpoint]]:
        """Trains to the last frozen step; the noise of every step, and checkpoints."""
        batches, series, found = self._windows(BATCH, self._seed), [], []
        for at in range(1, FROZEN[-1] + 1):
            if at in FROZEN:
                found.append(self._checkpoint(at))
            rate = RATE * min(1, at / WARMUP)
            self._params, self._state, seen = self._step(
                self._params, self._state, batches(at - 1), rate
            )
            series.append(seen)
        return np.array(jax.device_get(series)), found


def _statistics(grads, moments: ost.Moments) -> jax.Array:
    """S and G² of the whole gradient, and both in the ℓ1 norm; and ‖ḡ‖₁."""
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
    arrays = {}
    for seed in SEEDS:
        series, found = Trainer(seed).run()
        arrays[f"{seed}/series"] = series
        for each in found:
            for key, value in each._asdict().items():
                arrays[f"{seed}/{each.at}/{key}"] = value
        np.savez_compressed(path, **arrays)
