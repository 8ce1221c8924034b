"""What a reversible branch costs while nothing is wrong, and what an exchange rounds.

*Cost*: the guarded chain and the branching one, in the same process, alternating, as
in ``step_cost.py``; memory is XLA's own count.

*Exactness*: parameters are kept, others are trained, the two change places as often as
in a branch with so many probes in vain, and what comes back is compared with what was
kept. How far the others have drifted is in units of the parameters' own size.

    python benchmarks/branching.py            # prints the tables, writes results/*.json
    python benchmarks/branching.py --quick    # a tenth of the parameters, fewer rounds
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import step_cost
from reporting import Report, markdown, quartiles, run_suite

import optax_stability as ost

GUARD = "spike_guard"
DTYPES = ("float32", "bfloat16", "float16")
DRIFTS = (0.001, 0.1, 1.0)
PROBES = (0, 4)  # In vain, before the one that rolls back.


def branching(keep: Any) -> optax.GradientTransformation:
    """The recommended chain, which can take a branch back."""
    return ost.branch_on_spike(step_cost.stability_chain(), keep=keep)


def cost(quick: bool) -> dict[str, dict[str, Any]]:
    """Time and memory of steps with which nothing is wrong."""
    width, layers = (160, 1) if quick else (512, 9)
    shapes = step_cost.transformer_shapes(width, layers, 8192)
    case = step_cost.Case(
        {
            GUARD: step_cost.guarded_chain,
            'branch_on_spike(keep="params")': lambda: branching("params"),
            'branch_on_spike(keep="all")': lambda: branching("all"),
        },
        step_cost.draw(shapes, jax.random.key(0), 0.1),
        jnp.float32(0.1),
        jax.value_and_grad(step_cost.small_loss),
    )
    return step_cost.measure(case, rounds=5 if quick else 61, compile_rounds=0)


def exchanged(kept: jax.Array, others: jax.Array, probes: int) -> jax.Array:
    """What is restored of ``kept`` after so many probes in vain."""
    never = ost.thresholds.constant(1.0)
    tx = ost.branch_on_spike(optax.set_to_zero(), value=never)
    state: Any = tx.init(others)
    state = state._replace(mode=jnp.int32(1), kept=state.kept._replace(params=kept))
    update = jax.jit(tx.update)
    params: Any = others
    # Familiar to what is kept, then not, so that it is asked again and again.
    for loss in [0.0, 2.0] * probes + [0.0]:
        state = state._replace(waited=jnp.int32(10_000))
        updates, state = update(jnp.zeros_like(params), state, params, value=loss)
        params = optax.apply_updates(params, updates)
    return params


def exactness(dtype: str, drift: float, probes: int, size: int) -> dict[str, float]:
    """How exactly parameters come back."""
    rng = np.random.default_rng(0)
    values = 0.02 * rng.standard_normal(size)
    kept = jnp.asarray(values, dtype)
    change = 0.02 * drift * rng.standard_normal(size)
    found = exchanged(kept, jnp.asarray(values + change, dtype), probes)
    error = np.abs(np.float64(found) - np.float64(kept))
    return {
        "exact": round(float((error == 0).mean()), 4),
        "largest": float(error.max() / 0.02),
        "rms": float(np.sqrt(np.mean(error**2)) / 0.02),
        "spacing": float(jnp.finfo(dtype).eps),
    }


def make_report(quick: bool) -> Report:
    """Measures both."""
    size = 10_000 if quick else 1_000_000
    return {
        "cost": cost(quick),
        "exactness": {
            f"{dtype}, drift {drift:g}, {probes} probes in vain": exactness(
                dtype, drift, probes, size
            )
            for dtype in DTYPES
            for drift in DRIFTS
            for probes in PROBES
        },
    }


def cost_table(report: Report) -> str:
    """Time and memory against the guard."""
    rows = [
        [
            name,
            f"{row['bytes_per_parameter']:.0f}",
            f"{row['temp_bytes_per_parameter']:.2f}",
            f"{row['held_bytes_per_parameter']:.2f}",
            quartiles(row["ms"], 1),
            f"{row['time_ratio']:.2f}",
        ]
        for name, row in report["cost"].items()
    ]
    head = "optimizer", "bytes", "temp", "held", "ms", "time"
    return markdown(list(head), rows)


def exactness_table(report: Report) -> str:
    """What comes back of the kept parameters, in units of their deviation."""
    rows = [
        [
            name,
            f"{row['exact']:.1%}",
            f"{row['rms']:.1e}",
            f"{row['largest']:.1e}",
            f"{row['spacing']:.1e}",
        ]
        for name, row in report["exactness"].items()
    ]
    head = "kept in", "exact", "RMS error", "largest error", "spacing at 1"
    return markdown(list(head), rows)


def tables(report: Report) -> dict[str, str]:
    """Both tables."""
    size = next(iter(report["cost"].values()))["parameters"]
    return {
        f"{size:,} parameters, gradient in the same step": cost_table(report),
        "what an exchange restores": exactness_table(report),
    }


if __name__ == "__main__":
    run_suite("branching", __doc__, make_report, tables)
