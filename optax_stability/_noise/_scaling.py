"""A learning rate that decreases as the gradient gets noisier.

*Where in the chain*: after Adam, next to the learning rate; before Adam with ε = 0 it
would have no effect. It contains an ``estimate_noise_scale``.

*Cost*: a few scalars, and one multiplication of the updates by a scalar.

*Source*: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018,
arXiv:1812.06162, §2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _numerics, _validate
from optax_stability._core._checked import checked
from optax_stability._noise import _lookup


class ScaleByNoiseScaleState(NamedTuple):
    """State of :func:`scale_by_noise_scale`.

    Attributes:
      scale: float32[] – last factor of the updates.
      estimate: state of the noise scale.
    """

    scale: jax.Array
    estimate: Any

    reports_metrics = True  # For ost.metrics.
    number = "scale"  # This field is one number.

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``scale_by_noise_scale/scale``."""
        return {"scale_by_noise_scale/scale": self.scale}


def scale_by_noise_scale(
    batch_size: float | jax.Array | None,
    *,
    max_scale: float | jax.Array = 1.0,
    min_scale: float | jax.Array = 0.1,
    estimator: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the updates by a factor that decreases with the noise scale.

    **Rule**, for a batch of size B and the noise scale of now, after this step::

      scale = max_scale/(1 + B_simple/B), but at least min_scale
      while B_simple is not valid, the last scale; max_scale at first

    With ``max_scale=1`` the learning rate must suit a gradient without noise; with 2, a
    batch of size B_simple.

    **Guarantees**

    * The scale is between ``min_scale`` and ``max_scale``: training does not stop.
    * The updates keep their direction and dtype.

    **Edge cases**: the rule is for SGD, with a learning rate that is limited by
    curvature. For Adam, whose step does not grow with the gradient, it is a heuristic,
    and measurements found it not very reliable: see :func:`batch_efficiency`. Tune the
    learning rate first.

    Args:
      batch_size: B, in the unit of the moments; None: the weight of each step.
      max_scale: scale for a gradient without noise, > 0.
      min_scale: lowest scale, in (0, ``max_scale``].
      estimator: an :func:`estimate_noise_scale` with your own settings; by default one
        with its default settings and global scope.

    Returns:
      A transformation with state :class:`ScaleByNoiseScaleState`; its ``update`` needs
      ``moments=``. Metrics: ``scale_by_noise_scale/scale``, and those of the estimator.

    Raises:
      TypeError: ``estimator`` is not a transformation, or an argument is not a number.
      ValueError: an argument is outside its range; at ``init``, ``estimator`` holds no
        noise scale; at ``update``, ``moments=`` is missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_stability import safe_adamw
      >>> tx = optax.chain(safe_adamw(1e-3), scale_by_noise_scale(batch_size=64))
      >>> print(tx.init({"w": jnp.ones(2)})[-1].scale)
      1.0

    References:
      McCandlish et al., 2018, arXiv:1812.06162, §2: ε_opt = ε_max/(1 + B_noise/B).
      Deviations: B_simple in place of B_noise; the lower limit ``min_scale``.
    """
    if batch_size is not None:
        _validate.check_interval("batch_size", batch_size, "(0, inf)", "use a size > 0")
    _validate.check_interval("max_scale", max_scale, "(0, inf)", "1 is the default")
    _validate.check_interval("min_scale", min_scale, "(0, inf)", "0.1 is the default")
    scales = min_scale, max_scale
    if all(map(_validate.is_concrete, scales)) and min_scale > max_scale:
        raise ValueError(
            f"min_scale={min_scale!r} is above max_scale={max_scale!r}; "
            "lower min_scale."
        )
    estimator = _lookup.estimator_or_default(estimator)

    def init_fn(params):
        return ScaleByNoiseScaleState(
            scale=jnp.asarray(max_scale, jnp.float32),
            estimate=_lookup.init_estimator(estimator, params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        _, estimate = estimator.update(updates, state.estimate, params, **extra_args)
        readings, _ = _lookup.global_readings(estimate)
        size = extra_args["moments"].weight if batch_size is None else batch_size
        size = jnp.maximum(jnp.asarray(size, jnp.float32), _numerics.TINY)
        noise = jnp.where(readings["valid"], readings["b_simple"], 0.0)
        scale = jnp.maximum(max_scale / (1 + noise / size), min_scale)
        scale = jnp.where(readings["valid"], scale, state.scale).astype(jnp.float32)
        scaled = jax.tree.map(lambda leaf: _numerics.scale(leaf, scale), updates)
        return scaled, ScaleByNoiseScaleState(scale=scale, estimate=estimate)

    return checked(
        "scale_by_noise_scale",
        ScaleByNoiseScaleState,
        init_fn,
        update_fn,
        inexact=True,
    )
