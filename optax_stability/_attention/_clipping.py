"""Scales queries and keys down where attention logits are above a limit: QK-Clip.

*Problem*: with a learning rate that is too high, logits grow until the attention of a
head looks at one token alone.

*Where in the chain*: around the whole chain with the learning rate, inside the guard:
``spike_guard(clip_attention_logits(optimizer, heads_of=…))``.

*Cost*: queries and keys of the new parameters are read once more, and their update is
written before it is scaled; all other leaves cost nothing. From the bound, also that of
:func:`attention_logit_bound` at every step. Nothing is asked of the host.

*Source*: Kimi Team, "Kimi K2: Open Agentic Intelligence", 2025, arXiv:2507.20534,
§2.1, algorithm 1.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._attention._heads import (
    AttentionHeads,
    HeadsOf,
    bounds,
    check_heads_of,
    find_heads,
)
from optax_stability._core import _leaves, _numerics, _parts, _validate
from optax_stability._core._checked import checked

# The logits of each layer, by its name: [heads], or [layers, heads].
Logits = Mapping[str, jax.Array]


class ClipAttentionLogitsState(NamedTuple):
    """State of :func:`clip_attention_logits`.

    Attributes:
      largest: float32[] – the largest finite logit of the last step, before it.
      heads: int32[] – heads that were scaled down in the last step.
      steps: int32[] – steps in which at least one head was scaled down.
      inner_state: state of ``inner``.
    """

    largest: jax.Array
    heads: jax.Array
    steps: jax.Array
    inner_state: Any

    reports_metrics = True  # For ost.metrics.
    number = "steps"

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``attention_clip/…``: largest logit, heads and steps scaled down."""
        return {
            "attention_clip/largest": self.largest,
            "attention_clip/heads": self.heads,
            "attention_clip/steps": self.steps,
        }


def _factor(logits, limit):
    """limit/|logit| where a finite logit is above the limit, else exactly 1."""
    size = jnp.abs(logits)
    above = jnp.isfinite(size) & (size > limit)
    return jnp.where(above, limit / jnp.where(above, size, 1.0), 1.0)


def _add_to_query(heads: AttentionHeads, each) -> AttentionHeads:
    """Adds the number of each head to its queries and their biases."""
    query, bias = heads.query, heads.query_bias
    return heads._replace(
        query=query + each[..., None, :, None].astype(query.dtype),
        query_bias=None if bias is None else bias + each[..., None].astype(bias.dtype),
    )


def _add_to_key(heads: AttentionHeads, each) -> AttentionHeads:
    """Adds the number of each head to its keys and their biases."""
    key, bias = heads.key, heads.key_bias
    return heads._replace(
        key=key + each[..., None, :, None].astype(key.dtype),
        key_bias=None if bias is None else bias + each[..., None].astype(bias.dtype),
    )


def _excess(heads: AttentionHeads, factor) -> AttentionHeads:
    """By how much each query and key is multiplied, minus 1; 0 for all else.

    Query and key share the factor of a head; a key of several heads is not changed, and
    their queries take it alone.
    """
    zeros = jax.tree.map(jnp.zeros_like, heads)
    if heads.key.shape[-2] != heads.query.shape[-2]:
        return _add_to_query(zeros, factor - 1)
    of_each = jnp.sqrt(factor) - 1
    return _add_to_key(_add_to_query(zeros, of_each), of_each)


def _spread(heads_of: HeadsOf, params: Any, factors: Logits) -> Any:
    """A tree like the parameters: by how much each entry is multiplied, minus 1.

    ``heads_of`` takes entries out of the parameters; its transpose puts them back.
    """
    wide = jax.tree.map(_numerics.widen, params)
    heads, put_back = jax.vjp(lambda params: find_heads(heads_of, params), wide)
    (spread,) = put_back({k: _excess(x, factors[k]) for k, x in heads.items()})
    return spread


def _scaled(update, param, excess):
    """The update that takes the parameter to factor·(parameter + update)."""
    excess = excess.real
    target = _numerics.times(param + update, 1 + excess)
    wanted = (target - _numerics.widen(param)).astype(update.dtype)
    return jnp.where(excess != 0, wanted, update)


def _check_measured(measured: Any) -> None:
    """Raises unless it is None, or can be the name of an argument of ``update``."""
    if measured is None or (isinstance(measured, str) and measured.isidentifier()):
        return
    raise ValueError(
        f"measured={measured!r} must be a Python name, such as 'attention_logits', or "
        "None: update takes the logits as a keyword argument."
    )


def _given(extra_args: Mapping[str, Any], name: str, like: Logits) -> Logits:
    """The logits that the model has measured, by the names of the layers."""
    given = extra_args.get(name)
    if given is None:
        raise ValueError(
            f"clip_attention_logits(measured={name!r}) needs the largest logits of the "
            f"step: call tx.update(grads, state, params, {name}={{layer: [heads]}}), "
            "or leave measured out to use the bound from the weights."
        )
    shapes = {key: x.shape for key, x in like.items()}
    layers = given if isinstance(given, Mapping) else {}
    found = {key: jnp.shape(x) for key, x in layers.items()}
    if found != shapes:
        raise ValueError(
            f"{name} has the shapes {found}, but the heads have {shapes}; give the "
            "largest logit of each head, by the names that heads_of uses."
        )
    return {key: jnp.asarray(given[key], jnp.float32) for key in like}


def clip_attention_logits(
    inner: optax.GradientTransformation,
    limit: float = 100.0,
    *,
    heads_of: HeadsOf,
    measured: str | None = None,
    rotary: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Scales the queries and keys of heads whose attention logits are above a limit.

    QK-Clip, as a change of the update: the parameters after the step are what Kimi K2
    makes of them. A brake, not a cure: it keeps logits small, and a learning rate that
    is too high stays too high. Normalise queries and keys where you can choose the
    model (``benchmarks/attention_saturation.py``). A logit that was measured before the
    step lags it, and may be far above the limit after it.

    **Rule**, for a head with the logit S, and its queries and keys W (and their biases)
    after the step of ``inner``::

      γ = limit/S if S > limit, else 1
      W ← √γ·W, for queries and keys
      W ← γ·W for queries alone, where several heads share a key

    **Guarantees**

    * From the bound, a head above the limit has exactly the bound ``limit`` after the
      step, up to rounding. From measured logits, the logits of the same inputs become
      ``limit``, but for what the update itself changes.
    * The updates of all other entries pass bit for bit, and so do all updates while no
      head is above the limit. The state of ``inner`` is that without the clip.
    * A logit that is NaN or Inf is ignored.
    * Inside :func:`spike_guard` a skipped step changes nothing, bit for bit.

    **Edge cases**: updates in bfloat16 hit the limit to half a percent, and the next
    step corrects it. If the embedding of positions is rotary, give ``rotary=True`` or
    measured logits. A weight must not belong to two heads of ``heads_of``, unless as a
    shared key. Not for models that normalise queries and keys: their logits do not
    depend on the size of the weights.

    Args:
      inner: the whole chain, with the learning rate.
      limit: largest logit, > 0. The bound is several times the largest logit that
        occurs: a limit of 100 on logits corresponds to one of about 500 on the bound.
      heads_of: a function from the parameters to a dict: for each layer, by its name,
        its :class:`AttentionHeads`. It may only take entries out of the parameters and
        arrange them: slices, reshapes, transposes.
      measured: name of the extra argument with the largest logit of each head in this
        step, a dict by layer of float[heads]; None for the bound from the weights.
      rotary: whether queries and keys are rotated by their position, for the bound.

    Returns:
      A transformation with state :class:`ClipAttentionLogitsState`; its ``update``
      needs the parameters. Metrics: ``attention_clip/largest``,
      ``attention_clip/heads``, ``attention_clip/steps``.

    Raises:
      TypeError: ``inner`` is not a transformation, ``heads_of`` no function, or
        ``rotary`` is not True or False.
      ValueError: ``limit`` is not above 0, or ``measured`` is not a Python name; at
        ``update``, the parameters or the measured logits are missing, or have other
        names or shapes than the heads or the gradient.

    Example:
      >>> import optax
      >>> from optax_stability import AttentionHeads, spike_guard
      >>> def heads_of(params):
      ...     kernel = params["qkv"].reshape(4, 3, 2, 2)  # width, qkv, heads, dim
      ...     return {"block": AttentionHeads(kernel[:, 0], kernel[:, 1])}
      >>> tx = spike_guard(clip_attention_logits(optax.adamw(1e-3), heads_of=heads_of))

    References:
      Kimi K2 (arXiv:2507.20534), algorithm 1, with α = ½. Deviations: through the
      update; logits may come from the bound; with grouped queries, queries alone.
    """
    _validate.check_transformation("inner", inner)
    _validate.check_interval("limit", limit, "(0, inf)", "100 is the default")
    check_heads_of(heads_of)
    _check_measured(measured)
    _validate.check_flags(rotary=rotary)
    limit = _validate.as_float32(limit)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return ClipAttentionLogitsState(
            largest=jnp.zeros((), jnp.float32),
            heads=jnp.zeros((), jnp.int32),
            steps=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "clip_attention_logits scales the parameters; pass params to update."
            )
        _leaves.check_params("clip_attention_logits", params, updates)
        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        updates, params = jax.tree.map(jnp.asarray, (updates, params))
        heads = find_heads(heads_of, optax.apply_updates(params, updates))
        if measured is None:
            logits = bounds(heads, rotary)
        else:
            like = jax.eval_shape(lambda heads: bounds(heads, rotary), heads)
            logits = _given(extra_args, measured, like)
        factors = {name: _factor(each, limit) for name, each in logits.items()}
        spread = _spread(heads_of, params, factors)
        updates = jax.tree.map(_scaled, updates, params, spread)
        flat = _parts.concatenate([each.reshape(-1) for each in logits.values()])
        clipped = jnp.isfinite(flat) & (jnp.abs(flat) > limit)
        return updates, ClipAttentionLogitsState(
            largest=jnp.max(jnp.abs(flat), initial=0.0, where=jnp.isfinite(flat)),
            heads=jnp.sum(clipped, dtype=jnp.int32),
            steps=jnp.where(
                jnp.any(clipped), _numerics.increment(state.steps), state.steps
            ),
            inner_state=inner_state,
        )

    return checked(
        "clip_attention_logits", ClipAttentionLogitsState, init_fn, update_fn
    )
