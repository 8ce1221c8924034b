"""What is seen of a run, step by step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_stability as ost


class Trace(NamedTuple):
    """What is seen of one run, float32[steps] each.

    Attributes:
      loss: of the batch, nats per byte.
      norm: L2 norm of the gradient, before the clip.
      shallow: likewise, of the positions and the first block.
      rho: ρ̂ of all parameters.
      rho_leaf: ρ̂ of each leaf, [steps, leaves].
      update_rms: of Adam's update.
      param_ratio: ‖change‖/‖parameters‖.
      cosine: of this gradient and the one before.
      freshness: mean of g²/v̂ over the entries.
      energy: Σg²/Σv̂.
      stalest: the least Σg²/Σv̂ of a leaf.
      bimodality: (Σu²)²/(n₊Σu⁴) of Adam's update u.
    """

    loss: Any
    norm: Any
    shallow: Any
    rho: Any
    rho_leaf: Any
    update_rms: Any
    param_ratio: Any
    cosine: Any
    freshness: Any
    energy: Any
    stalest: Any
    bimodality: Any


def squares(tree: Any) -> jax.Array:
    """Σx² of each leaf, float32[leaves]."""
    return jnp.stack([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)])


def look(loss, norm, grads, last, u, change, params, state, early) -> Trace:
    """One step of the trace."""
    rms = optax.tree.scale(1 / state.rms_unit, state.rms)
    relative = jax.tree.map(
        lambda g, r: jnp.where(r > 0, g / jnp.where(r > 0, r, 1), 0), grads, rms
    )
    seen = sum(jnp.sum(r > 0) for r in jax.tree.leaves(rms))
    grad_squares, rms_squares, u_squares = map(squares, (grads, rms, u))
    ratios = grad_squares / jnp.where(rms_squares > 0, rms_squares, jnp.inf)
    fourth = jnp.sum(squares(jax.tree.map(jnp.square, u)))
    metrics = ost.metrics(state)
    cosine = optax.tree.vdot(grads, last) / jnp.maximum(
        optax.tree.norm(grads) * optax.tree.norm(last), 1e-30
    )
    return Trace(
        loss=loss,
        norm=norm,
        shallow=jnp.sqrt(jnp.sum(jnp.where(early, grad_squares, 0))),
        rho=metrics["adam/correlation"],
        rho_leaf=metrics["adam/correlation/per_leaf"],
        update_rms=metrics["adam/update_rms"],
        param_ratio=optax.tree.norm(change) / optax.tree.norm(params),
        cosine=cosine,
        freshness=jnp.sum(squares(relative)) / seen,
        energy=jnp.sum(grad_squares) / jnp.sum(rms_squares),
        stalest=jnp.min(jnp.where(rms_squares > 0, ratios, jnp.inf)),
        bimodality=jnp.square(jnp.sum(u_squares)) / (seen * fourth),
    )


def stack(traces: list[Trace]) -> Trace:
    """A leading axis of runs."""
    return Trace(*map(np.stack, zip(*traces, strict=True)))
