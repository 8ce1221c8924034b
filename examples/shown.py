"""The metrics of an optimizer that a run logs and shows, of all that its chain has."""

from typing import Any

import jax
import jax.numpy as jnp

import optax_stability as ost

# They are logged if the chain has them.
SHOWN = """attention/logit_bound grad/norm grad/zero_fraction clip/fraction skip/skipped
skip/total skip/value_limit when_noisy/active branch/mode branch/probed branch/length
branch/rollbacks branch/accepted noise_scale/b_simple noise_scale/low noise_scale/high
noise_scale/noise_to_weight"""


def no_skips() -> dict[str, jax.Array]:
    """What a chain without a guard counts."""
    return {"skip/skipped": jnp.zeros(()), "skip/total": jnp.zeros(())}


def shown_metrics(opt_state: Any, params: Any) -> dict[str, jax.Array]:
    """The metrics of a chain with a clip; without a limit of the clip it is ∞."""
    measured = no_skips() | ost.metrics(opt_state, params=params)
    limit = measured["clip/limit"]  # 0 before a clip is switched on
    clips = (limit > 0) & measured.get("when_noisy/active", True)
    shown = [key for key in measured if key in SHOWN.split() or "histogram" in key]
    limit = jnp.where(clips, limit, jnp.inf)
    return {key: measured[key] for key in shown} | {"clip/limit": limit}
