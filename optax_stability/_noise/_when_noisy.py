"""Lets a transformation act only while the gradient is noisy.

*Problem*: clipping biases a gradient that is nearly all signal, and is wanted where
noise makes its tails heavy.

*Where in the chain*: in the place of what it wraps, and of ``estimate_noise_scale``,
which it contains.

*Cost*: that of both. The inner transformation runs on every step; a select decides.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _validate
from optax_stability._noise import _lookup

Measure = Literal["b_simple", "noise_to_weight"]


class WhenNoisyState(NamedTuple):
    """State of :func:`when_noisy`.

    Attributes:
      active: bool[] – whether the last updates came from ``inner``.
      estimate: state of the noise scale.
      inner_state: state of ``inner``.
    """

    active: jax.Array
    estimate: Any
    inner_state: Any

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``when_noisy/active``."""
        return {"when_noisy/active": self.active}


def _range(estimate, measure: Measure):
    """What the measure certainly is above, and what it is certainly below."""
    known = _lookup.whole_gradient(estimate)
    if measure == "b_simple":
        return known["low"], known["high"]
    return known[measure], known[measure]


def when_noisy(
    inner: optax.GradientTransformation,
    *,
    above: float | jax.Array,
    below: float | jax.Array | None = None,
    measure: Measure = "b_simple",
    estimator: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Applies ``inner``, say a clip, while the noise scale is above a level.

    **Rule**, for the interval of the noise scale after this step::

      on   if low > above
      off  if high < below
      else as it was; off at first

    The interval is the hysteresis: nothing is switched by what may be chance. A noise
    scale without an upper end can switch on, and not off.

    **Guarantees**

    * While off, updates pass bit for bit.
    * ``inner`` sees every gradient: an adaptive clip knows what is normal when it is
      switched on. Only its updates are left out, so that its own metrics, such as
      ``clip/fraction``, say what it would have done.

    **Edge cases**: while off, what ``inner`` would stop passes, NaN and Inf included;
    put ``skip_spikes`` around. With one microbatch per step it never switches, unless
    the estimator takes differences.

    Args:
      inner: what acts while it is noisy.
      above: level of the measure, ≥ 0; examples for ``"b_simple"``.
      below: lower level to switch off, ≤ ``above``; None for the same.
      measure: ``"b_simple"``, or ``"noise_to_weight"``, which has no interval: then
        give ``below``.
      estimator: an :func:`estimate_noise_scale` with settings of your own; by default
        with those it has, of the whole gradient only.

    Returns:
      A transformation with state :class:`WhenNoisyState`; its ``update`` needs
      ``moments=``. Metrics: ``when_noisy/active``, and those of the estimator and of
      ``inner``.

    Raises:
      TypeError: ``inner`` or ``estimator`` is no transformation, a level no number.
      ValueError: an argument is outside its range; at ``init``, ``estimator`` holds no
        noise scale; at ``update``, ``moments=`` are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_stability import clip_by_zscore, metrics
      >>> tx = when_noisy(clip_by_zscore(), above=1000.0)
      >>> bool(metrics(tx.init({"w": jnp.ones(2)}))["when_noisy/active"])
      False
    """
    _validate.check_transformation("inner", inner)
    _validate.check_interval("above", above, "[0, inf)", "count examples")
    _validate.check_choice("measure", measure, get_args(Measure))
    if below is None and measure != "b_simple":
        raise ValueError(
            f"measure={measure!r} has no interval that would keep it from switching to "
            "and fro; give below=, a level lower than above."
        )
    below = above if below is None else below
    _validate.check_interval("below", below, "[0, inf)", "count examples")
    if _validate.is_concrete(above) and _validate.is_concrete(below) and below > above:
        raise ValueError(
            f"below={below!r} is above above={above!r}; it switches off at a lower "
            "level, or the same."
        )
    estimator = _lookup.estimator_or_default(estimator)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return WhenNoisyState(
            active=jnp.zeros((), bool),
            estimate=_lookup.init_estimator(estimator, params),
            inner_state=inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        _, estimate = estimator.update(updates, state.estimate, params, **extra_args)
        low, high = _range(estimate, measure)
        active = (low > above) | (state.active & ~(high < below))
        acted, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        updates = jax.tree.map(lambda a, u: jnp.where(active, a, u), acted, updates)
        return updates, WhenNoisyState(
            active=active, estimate=estimate, inner_state=inner_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
