"""Does Adam train alike, however the same data are split into steps?

A fixed number of microbatch gradients, independent and Gaussian, goes through each
optimizer in steps of K = 1, 8 and 32 of them. Every optimizer gets the same gradients.
The table shows how far the parameters went, relative to the same Adam at K = 1: 1 means
that K can be changed without a trace, to first order in the learning rate. Gradients do
not depend on the parameters here, so only that order exists.

* **μ/σ**: mean of a gradient over its spread within one microbatch. At 0.05 noise
  dominates, at 10 the signal.
* The microbatches of a warm-up, in which the second moment settles, do not count.
* Standard errors come from the spread over coordinates. They are small because both
  sides of a ratio share the noise of the gradients.
* The 0.6 % that are left with β₂ = 0.95, K = 32 and much noise are no error: v is then
  a mean of few squares, and how many of these belong to gradients that m holds as well
  depends a little on K.

    python benchmarks/batch_invariance.py            # 1.5 minutes on two CPU cores
    python benchmarks/batch_invariance.py --quick    # fewer coordinates, no JSON
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reporting import Report, markdown, run_suite

import optax_stability as ost

B1 = 0.9
B2S = (0.999, 0.95)
LEARNING_RATE = 1e-3
SPLITS = (8, 32)


class Regime(NamedTuple):
    """Mean and spread of one microbatch gradient."""

    mean: float
    spread: float

    @property
    def name(self) -> str:
        """The ratio that Adam can see."""
        return f"μ/σ = {self.mean / self.spread:g}"


REGIMES = (Regime(0.05, 1.0), Regime(1.0, 1.0), Regime(1.0, 0.1))


class Size(NamedTuple):
    """How much is run: coordinates per regime, microbatches before and while counting.

    Both numbers of microbatches are multiples of every K.
    """

    coordinates: int
    warm_up: int
    counted: int


FULL, QUICK = Size(8192, 2048, 4096), Size(2048, 1024, 1024)


def ours(k: jax.Array, b2: float) -> Any:
    """Second moment from the microbatches, learning rate × K."""
    rate = ost.scale_learning_rate(LEARNING_RATE, k, "linear")
    adam = ost.scale_by_safe_adam(B1, b2, second_moment="microbatch")
    tx = optax.chain(adam, optax.scale_by_learning_rate(rate))
    return ost.accumulate_moments(tx, k)


def plain_adam(k: jax.Array, b2: float, rule: Literal["linear", "sqrt"]) -> Any:
    """Adam as everyone runs it under accumulation."""
    rate = ost.scale_learning_rate(LEARNING_RATE, k, rule)
    adam = optax.scale_by_adam(B1, b2)
    tx = optax.chain(adam, optax.scale_by_learning_rate(rate))
    return optax.MultiSteps(tx, lambda step: k)


def plain_adam_linear(k: jax.Array, b2: float) -> Any:
    """Adam with the rule of SGD, learning rate × K."""
    return plain_adam(k, b2, "linear")


def plain_adam_sqrt(k: jax.Array, b2: float) -> Any:
    """Adam with the rule of Adam, learning rate × √K."""
    return plain_adam(k, b2, "sqrt")


OPTIMIZERS: dict[str, Callable[[jax.Array, float], Any]] = {
    'second_moment="microbatch", lr × K': ours,
    "optax Adam in MultiSteps, lr × √K": plain_adam_sqrt,
    "optax Adam in MultiSteps, lr × K": plain_adam_linear,
}


def displacements(make: Callable, b2: float, size: Size) -> dict[int, np.ndarray]:
    """How far each coordinate goes while it is counted, for every K.

    Returns:
      K to an array [regimes, coordinates].
    """
    means = jnp.array([[regime.mean] for regime in REGIMES])
    spreads = jnp.array([[regime.spread] for regime in REGIMES])
    zeros = jnp.zeros((len(REGIMES), size.coordinates))

    @jax.jit
    def run(k, keys):
        tx = make(k, b2)

        def advance(carry, now):
            (params, state), (key, starts_to_count) = carry, now
            params = jnp.where(starts_to_count, 0, params)
            grads = means + spreads * jax.random.normal(key, zeros.shape)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        starts_to_count = jnp.arange(len(keys)) == size.warm_up
        carry = zeros, tx.init(zeros)
        return jax.lax.scan(advance, carry, (keys, starts_to_count))[0][0]

    keys = jax.random.split(jax.random.key(0), size.warm_up + size.counted)
    # K is traced: one program for all.
    return {k: np.asarray(run(k, keys), np.float64) for k in (1, *SPLITS)}


def compare(found: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Ratio of the means of paired values, and its standard error."""
    ratio = found.mean() / base.mean()
    left = found - ratio * base
    error = left.std(ddof=1) / np.sqrt(left.size) / abs(base.mean())
    return {"ratio": float(ratio), "standard_error": float(error)}


def measure(b2: float, size: Size) -> dict[str, Any]:
    """Optimizer to K to regime to how far it went, relative to itself at K = 1."""
    rows = {}
    for name, make in OPTIMIZERS.items():
        base, *others = displacements(make, b2, size).values()
        rows[name] = {
            str(k): {
                regime.name: compare(found[i], base[i])
                for i, regime in enumerate(REGIMES)
            }
            for k, found in zip(SPLITS, others, strict=True)
        }
    return rows


def table(rows: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    names = [regime.name for regime in REGIMES]
    lines = [
        [optimizer, k, *[f"{cells[name]['ratio']:.3f}" for name in names]]
        for optimizer, splits in rows.items()
        for k, cells in splits.items()
    ]
    return markdown(["distance relative to K = 1", "K", *names], lines)


def largest_error(rows: dict[str, Any]) -> float:
    """The largest standard error in a table, relative to its ratio."""
    cells = [
        cell
        for splits in rows.values()
        for regimes in splits.values()
        for cell in regimes.values()
    ]
    return max(cell["standard_error"] / cell["ratio"] for cell in cells)


def make_report(quick: bool) -> Report:
    """Runs the grid."""
    size, b2s = (QUICK, B2S[:1]) if quick else (FULL, B2S)
    results = {str(b2): measure(b2, size) for b2 in b2s}
    return {"b1": B1, **size._asdict(), "b2": results}


def readme_table(report: Report) -> str:
    """The table of the usual β₂."""
    return table(report["b2"][str(B2S[0])])


def tables(report: Report) -> dict[str, str]:
    """One table per β₂."""
    return {
        f"β₁ = {B1}, β₂ = {b2}; standard errors are below {largest_error(rows):.2%} "
        "of the ratio": table(rows)
        for b2, rows in report["b2"].items()
    }


if __name__ == "__main__":
    run_suite("batch_invariance", __doc__, make_report, tables)
