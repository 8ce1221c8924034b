"""Applies a transformation only while the gradient is noisy.

*Problem*: clipping biases a gradient that is nearly all signal, but is useful where
noise makes its tails heavy.

*Where in the chain*: in place of the inner transformation and of
``estimate_noise_scale``; it contains both.

*Cost*: that of both. The inner transformation runs at every step; a select chooses the
updates.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _validate
from optax_stability._core._checked import checked
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

    reports_metrics = True  # For ost.metrics.
    number = "active"  # This field is one number.

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``when_noisy/active``."""
        return {"when_noisy/active": self.active}


def _bounds(estimate, measure: Measure):
    """Lower and upper bound of the measure; if it has no interval, equal once known."""
    readings, known = _lookup.global_readings(estimate)
    if measure == "b_simple":
        return readings["low"], readings["high"]
    value = readings[measure]
    return value, jnp.where(known[measure], value, jnp.inf)


def when_noisy(
    inner: optax.GradientTransformation,
    *,
    above: float | jax.Array,
    below: float | jax.Array | None = None,
    measure: Measure = "b_simple",
    estimator: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Applies ``inner``, such as a clip, while the noise scale is above a level.

    **Rule**, for the interval of the noise scale after this step::

      on   if low > above
      off  if high < below
      else unchanged; off at first

    The noise scale is that of now. Its interval acts as hysteresis: random fluctuations
    within it do not switch. A noise scale without an upper end can switch on, but not
    off.

    **Guarantees**

    * While off, updates pass bit for bit.
    * It switches only where the whole interval is beyond the level. While a constant
      noise scale is at the level itself, chance puts the interval above it in 2.5 % of
      the steps, with a confidence of 95 %: in steps that follow each other, so that
      about a third of runs of 400 steps switch on once. At half the level less than
      one run in 30 does.
    * ``inner`` sees every gradient: an adaptive clip has current statistics when it is
      switched on. While off, only its updates are discarded, so that its own metrics,
      such as ``clip/fraction``, report what it would have done.

    **Edge cases**: while off, gradients that ``inner`` would stop pass, NaN and Inf
    included; wrap the chain in ``skip_spikes``. With one microbatch per step it never
    switches, unless the estimator has ``difference=True``.

    Args:
      inner: the transformation to apply while the gradient is noisy.
      above: level of the measure to switch on, ≥ 0; in examples for ``"b_simple"``.
      below: level to switch off, ≤ ``above``; None: the same as ``above``.
      measure: ``"b_simple"``, or ``"noise_to_weight"``, which has no interval: then
        give ``below``.
      estimator: an :func:`estimate_noise_scale` with your own settings; by default one
        with its default settings and global scope.

    Returns:
      A transformation with state :class:`WhenNoisyState`; its ``update`` needs
      ``moments=``. Metrics: ``when_noisy/active``, and those of the estimator and of
      ``inner``.

    Raises:
      TypeError: ``inner`` or ``estimator`` is not a transformation, or a level is not a
        number.
      ValueError: an argument is outside its range; at ``init``, ``estimator`` holds no
        noise scale; at ``update``, ``moments=`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_stability import clip_by_zscore, metrics
      >>> tx = when_noisy(clip_by_zscore(), above=1000.0)
      >>> bool(metrics(tx.init({"w": jnp.ones(2)}))["when_noisy/active"])
      False
    """
    _validate.check_transformation("inner", inner)
    _validate.check_interval("above", above, "[0, inf)", "use a level ≥ 0")
    _validate.check_choice("measure", measure, get_args(Measure))
    if below is None and measure != "b_simple":
        raise ValueError(
            f"measure={measure!r} has no interval to prevent switching on and off at "
            "every step; give below=, a level lower than above."
        )
    below = above if below is None else below
    _validate.check_interval("below", below, "[0, inf)", "use a level ≥ 0")
    if _validate.is_concrete(above) and _validate.is_concrete(below) and below > above:
        raise ValueError(
            f"below={below!r} exceeds above={above!r}; lower below or raise above."
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
        low, high = _bounds(estimate, measure)
        active = (low > above) | (state.active & ~(high < below))
        inner_updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        updates = jax.tree.map(
            lambda new, old: jnp.where(active, new, old), inner_updates, updates
        )
        return updates, WhenNoisyState(
            active=active, estimate=estimate, inner_state=inner_state
        )

    return checked("when_noisy", WhenNoisyState, init_fn, update_fn)
