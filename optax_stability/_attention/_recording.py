"""Records the bound on the attention logits of every head.

*Problem*: attention that saturates shows in no norm, and a model in production is not
changed to hand out its logits.

*Where in the chain*: anywhere inside ``record_history``; outside of a guard, so that
skipped steps are recorded too.

*Cost*: that of :func:`attention_logit_bound`, every ``every`` steps: in the trainer of
``examples/gpt`` at size "small", less than a thousandth of the FLOPs of a step. State:
one float32 per head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._attention._heads import (
    HeadsOf,
    bounds,
    check_heads_of,
    find_heads,
)
from optax_stability._core import _known_norms, _numerics, _parts, _tree, _validate
from optax_stability._core._checked import checked
from optax_stability._core._in_place import measure_if
from optax_stability._core._look import is_due


class RecordLogitBoundState(NamedTuple):
    """State of :func:`record_logit_bound`.

    Attributes:
      step: int32[] – calls of ``update``.
      bound: float32[n_heads] – the last bounds, of all layers; zeros before the first;
        None without heads, because Orbax saves no array of size 0.
      entries: one mark per head, to name it by layer and index.
    """

    step: jax.Array
    bound: jax.Array | None
    entries: Any

    reports_metrics = True  # For ost.metrics.

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``attention/logit_bound``: the largest, and that of each head; if any."""
        if self.bound is None:
            return {}
        return {
            "attention/logit_bound": jnp.max(self.bound, initial=0.0),
            "attention/logit_bound/per_entry": self.bound,
        }


def record_logit_bound(
    heads_of: HeadsOf, *, rotary: bool = False, every: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Records how large the attention logits of each head can be, from the weights.

    The model is not changed. :func:`diagnose` reports ``attention_saturates`` from it,
    with the layer and head that were first.

    **Rule**: every ``every`` steps, :func:`attention_logit_bound` of each head, for the
    parameters as they are before the step.

    **Guarantees**

    * The updates pass bit for bit.
    * Nothing is asked of the host if ``look=`` is given, or ``every`` is 1.

    **Edge cases**: between two measurements the value stays. The first step is
    measured. A head with a weight that is not finite is reported as NaN, and the others
    are not affected. Where ``heads_of`` finds no head there is no metric. Models that
    normalise queries and keys need no bound: leave it out.

    Args:
      heads_of: a function from the parameters to a dict: for each layer, by its name,
        its :class:`AttentionHeads`. Slices and reshapes of the parameters.
      rotary: whether queries and keys are rotated by their position.
      every: steps between measurements, ≥ 1.

    Returns:
      A transformation with state :class:`RecordLogitBoundState` and the metrics
      ``attention/logit_bound``, float32[], the largest, and
      ``attention/logit_bound/per_entry``, float32[n_heads], with the names
      ``<layer>/<head>``. Its ``update`` needs the parameters, and takes ``look=`` as
      that of :func:`record`.

    Raises:
      TypeError: ``heads_of`` is no function, or returns anything else; or ``rotary``
        is not True or False.
      ValueError: ``every`` is below 1; at ``update``, the parameters are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_stability import AttentionHeads, metrics
      >>> def heads_of(params):
      ...     kernel = params["qkv"].reshape(4, 3, 2, 2)  # width, qkv, heads, dim
      ...     return {"block": AttentionHeads(kernel[:, 0], kernel[:, 1])}
      >>> params = {"qkv": jnp.ones((4, 12))}
      >>> tx = record_logit_bound(heads_of)
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> print(sorted(metrics(state, params=params))[1:])
      ['attention/logit_bound/block/0', 'attention/logit_bound/block/1']
    """
    check_heads_of(heads_of)
    _validate.check_flags(rotary=rotary)
    _validate.check_count("every", every, 1, "1 measures at every step")

    def init_fn(params):
        if _tree.is_placeholder(params):  # It has no heads to find.
            zero = jnp.zeros((), jnp.int32)
            return RecordLogitBoundState(zero, bound=jnp.zeros(()), entries=0)
        shapes = jax.eval_shape(
            lambda params: bounds(find_heads(heads_of, params), rotary), params
        )
        heads = sum(shape.size for shape in shapes.values())
        return RecordLogitBoundState(
            step=jnp.zeros((), jnp.int32),
            bound=jnp.zeros((heads,), jnp.float32) if heads else None,
            entries={
                name: _tree.mark_entries(shape.shape) for name, shape in shapes.items()
            },
        )

    def measure(updates, params, last):
        del updates, last
        found = bounds(find_heads(heads_of, params), rotary)
        return _parts.concatenate([each.reshape(-1) for each in found.values()])

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "record_logit_bound measures the parameters; pass params to update."
            )
        step = _numerics.increment(state.step)
        if state.bound is None:
            return updates, state._replace(step=step)
        due = is_due(extra_args, lambda: every == 1 or state.step % every == 0)
        passed, bound = measure_if(due, measure, updates, params, state.bound)
        _known_norms.alias_norms(updates, passed)
        return passed, state._replace(step=step, bound=bound)

    return checked("record_logit_bound", RecordLogitBoundState, init_fn, update_fn)
