"""Short chains of existing transformations, to copy.

Each is tested in ``tests/examples/test_recipes.py``.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_stability as ost
from optax_stability.thresholds import Threshold


def clip_after_warmup(
    clip: optax.GradientTransformation, warmup_steps: int
) -> optax.GradientTransformation:
    """Passes the gradient unchanged for ``warmup_steps`` steps, then clips.

    The clip's own statistics start after these steps.
    """
    return optax.conditionally_transform(
        clip, lambda step, **_: jnp.asarray(step) >= warmup_steps
    )


def unit_wise_agc(clipping: float = 0.01) -> optax.GradientTransformation:
    """Adaptive gradient clipping of NFNets: each unit by the norm of its weights.

    optax has this clip, but a NaN in a unit makes the whole unit NaN. So it is wrapped
    in ``skip_spikes``, here without thresholds: only non-finite steps are skipped. An
    optimizer behind it still moves the parameters then: put a guard around both.
    Axis 0 is the input of a dense kernel; for stacked layers give optax the ``axis``.
    """
    return ost.skip_spikes(optax.adaptive_grad_clip(clipping), grad_norm=None)


def adagc(
    max_norm: float = 1.0, warmup_steps: int = 100, relearn_after: int | None = 25
) -> optax.GradientTransformation:
    """Complete AdaGC: clips the global norm in the warm-up, and each leaf after it.

    ``relearn_after=None`` is the published rule. Under that rule a leaf whose smallest
    norm in the warm-up was small is clipped too strongly for the rest of the run.
    """
    by_norm = ost.clip_by_threshold(ost.thresholds.constant(max_norm))
    return optax.chain(
        optax.conditionally_transform(
            by_norm, lambda step, **_: jnp.asarray(step) < warmup_steps
        ),
        ost.clip_by_leaf_history(warmup=warmup_steps, relearn_after=relearn_after),
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    by_adam: str = "embed|tokens|positions|head",
    consistent_rms: float | None = 0.2,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """``optax.contrib.muon`` that is told which matrices are its own.

    By default every leaf with two axes is: embeddings and the output head as well.
    Here leaves whose names match ``by_adam``, and all that are no matrices, are Adam's.
    With ``consistent_rms`` of 0.2 updates are as large as those of AdamW, and so is the
    learning rate. A fused query-key-value kernel is one matrix; for three, split it in
    the model. The other arguments are those of ``adamw``; Adam's leaves do not decay.
    """

    def dimension_numbers(params):
        names, leaves = ost.leaf_names(params), jax.tree.leaves(params)
        numbers = [
            optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
            if leaf.ndim == 2 and not re.search(by_adam, name)
            else None
            for name, leaf in zip(names, leaves, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), numbers)

    return optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=mask,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=dimension_numbers,
        consistent_rms=consistent_rms,
    )


def guarded_muon(
    learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformation:
    """Muon as it should be protected: a clip in front, and the guard outermost.

    An orthogonal update is as large after a spike as before, but momentum remembers:
    after a gradient × 1e4 the update points elsewhere for more than 100 steps. A clip
    *behind* Muon cuts an update whose norm is √rank to its limit, so that the learning
    rate of a layer depends on its width. Do not use ``clip_by_leaf_history`` in front:
    it clips leaves of a healthy run, and Muon takes the direction alone.
    """
    chain = optax.chain(ost.clip_by_zscore(), muon(learning_rate, **options))
    return ost.spike_guard(chain)


class LowerAfterSpikeState(NamedTuple):
    """State of :func:`lower_after_spike`.

    Attributes:
      scale: float32[] – current factor on the learning rate.
      threshold: state of the threshold.
      inner_state: state of ``inner``.
    """

    scale: jax.Array
    threshold: Any
    inner_state: Any


def lower_after_spike(
    inner: optax.GradientTransformation,
    threshold: Threshold,
    *,
    factor: float = 0.5,
    recovery_steps: int = 200,
    min_scale: float = 0.05,
) -> optax.GradientTransformationExtraArgs:
    """Lowers the learning rate when the gradient norm spikes, and raises it again.

    Like ``optax.contrib.reduce_on_plateau``, but driven by gradient norms, and the
    scale recovers. A norm above its limit multiplies the scale by ``factor``; every
    other step raises it a little, so that ``recovery_steps`` of them undo one spike.
    ``inner`` must contain the learning rate. A non-finite norm changes nothing.
    """
    inner = optax.with_extra_args_support(inner)
    growth = factor ** (-1 / recovery_steps)

    def init_fn(params):
        return LowerAfterSpikeState(
            jnp.ones((), jnp.float32), threshold.init(), inner.init(params)
        )

    def update_fn(updates, state, params=None, **extra_args):
        norm = optax.tree.norm(updates)
        limit, learned = threshold.update(norm, state.threshold)
        lowered = jnp.maximum(state.scale * factor, min_scale)
        raised = jnp.minimum(state.scale * growth, 1.0)
        scale = jnp.where(norm > limit, lowered, raised)
        scale = jnp.where(jnp.isfinite(norm), scale, state.scale)
        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        updates = jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)
        return updates, LowerAfterSpikeState(scale, learned, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def muon_clip(
    learning_rate: optax.ScalarOrSchedule,
    heads_of: Callable[[Any], Mapping[str, ost.AttentionHeads]],
    limit: float = 100.0,
    measured: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """MuonClip of Kimi K2 (arXiv:2507.20534): Muon, with a brake on attention logits.

    Give ``measured`` the name of the argument of ``update`` that holds the largest
    logit of each head; without it the bound from the weights is used, which is several
    times the logit: then raise ``limit``. A matrix with the queries, keys and values of
    all heads together is one matrix for Muon; separate kernels serve it better.
    """
    chain = optax.chain(ost.clip_by_zscore(), optax.contrib.muon(learning_rate))
    clipped = ost.clip_attention_logits(
        chain, limit, heads_of=heads_of, measured=measured
    )
    return ost.spike_guard(clipped)
