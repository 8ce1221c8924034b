"""Does a narrow second moment train as well as a float32 one?

Trains a small byte-level GPT on the sources of Python's standard library, once per
storage dtype and seed, and compares final held-out losses with the float32 run of the
same seed. The spread over seeds is the noise that a difference must beat. For contrast,
``v in float16`` is what storing v itself, as optax's ``nu``, would do.

    python benchmarks/low_precision.py            # about 4 minutes on two CPU cores
    python benchmarks/low_precision.py --quick    # one seed, fewer steps, no JSON
"""

import functools
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from corpus import corpus, windows
from reporting import Report, markdown, run_suite

import optax_stability as ost

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gpt"))


def scale_by_adam_in_float16(b1: float, b2: float) -> optax.GradientTransformation:
    """The Adam of optax with v stored in float16, for contrast."""
    adam = optax.scale_by_adam(b1, b2)

    def store(state, dtype):
        return state._replace(nu=optax.tree.cast(state.nu, dtype))

    def init_fn(params):
        return store(adam.init(params), jnp.float16)

    def update_fn(updates, state, params=None):
        updates, state = adam.update(updates, store(state, jnp.float32), params)
        return updates, store(state, jnp.float16)

    return optax.GradientTransformation(init_fn, update_fn)


def stored_in(dtype: Any) -> optax.GradientTransformation:
    """Safe Adam with √v in the given dtype."""
    return ost.scale_by_safe_adam(0.9, 0.999, rms_dtype=dtype)


OPTIMIZERS = {
    "√v in float32": functools.partial(stored_in, jnp.float32),
    "√v in bfloat16": functools.partial(stored_in, jnp.bfloat16),
    "√v in float16": functools.partial(stored_in, jnp.float16),
    "v in float16": functools.partial(scale_by_adam_in_float16, 0.9, 0.999),
}


def train_once(make: Any, seed: int, steps: int) -> dict[str, float]:
    """One run; returns the held-out loss and the largest update seen."""
    from flax import nnx
    from model import GPT, Size, next_token_loss

    train, held_out = corpus()
    rng = np.random.default_rng(seed)
    size = Size(2, 64, 2, 64, 256, 3e-3)
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        1e-4, size.learning_rate, 30, steps, 3e-4
    )
    tx = optax.chain(
        ost.clip_by_threshold(ost.thresholds.constant(1.0)),
        make(),
        ost.record("direction", per_leaf=False),
        optax.scale_by_learning_rate(schedule),
    )
    model = GPT(size, size.vocabulary, jnp.float32, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(next_token_loss)(model, batch)
        optimizer.update(model, grads)
        return ost.metrics(optimizer)["direction/max_abs"]

    evaluate = nnx.jit(next_token_loss)
    largest = [step(model, optimizer, windows(train, rng, 8)) for _ in range(steps)]
    fixed = windows(held_out, np.random.default_rng(0), 512)
    loss = np.mean(
        [float(evaluate(model, jnp.asarray(part))) for part in np.split(fixed, 8)]
    )
    return {"loss": float(loss), "max_update": float(np.max(jax.device_get(largest)))}


def make_report(quick: bool) -> Report:
    """Runs the grid."""
    seeds, steps = (range(1), 60) if quick else (range(4), 300)
    runs = {
        name: [train_once(make, seed, steps) for seed in seeds]
        for name, make in OPTIMIZERS.items()
    }
    base = [run["loss"] for run in next(iter(runs.values()))]
    return {
        "steps": steps,
        "seeds": len(base),
        "spread": statistics.stdev(base) if len(base) > 1 else 0.0,
        "runs": {name: summarise(each, base) for name, each in runs.items()},
    }


def summarise(runs: list[dict[str, float]], base: list[float]) -> dict[str, Any]:
    """One row: the runs of all seeds."""
    losses = [run["loss"] for run in runs]
    differences = [a - b for a, b in zip(losses, base, strict=True)]
    return {
        "losses": losses,
        "mean": statistics.fmean(losses),
        "mean_difference": statistics.fmean(differences),
        "largest_difference": max(differences, key=abs),
        "max_update": max(run["max_update"] for run in runs),
    }


def tables(report: Report) -> dict[str, str]:
    """The table, and by how much seeds differ."""
    head = ["second moment", "held-out loss", "minus float32, same seed (worst)"]
    rows = [
        [
            name,
            f"{row['mean']:.3f}",
            f"{row['mean_difference']:+.3f} ({row['largest_difference']:+.3f})",
            f"{row['max_update']:,.2f}",
        ]
        for name, row in report["runs"].items()
    ]
    title = (
        f"A small GPT, {report['seeds']} seeds × {report['steps']} steps, β₂ = 0.999; "
        f"spread of the first row over seeds: {report['spread']:.3f}"
    )
    return {title: markdown([*head, "largest update"], rows)}


if __name__ == "__main__":
    run_suite("low_precision", __doc__, make_report, tables)
