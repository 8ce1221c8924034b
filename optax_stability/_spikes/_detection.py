"""Decides whether a step is abnormal, by the gradient norm and the loss together.

*Problem*: the norm alone gives false alarms in the early descent, and the loss alone
shows an exploded gradient only after it was applied.

*Cost*: a few scalars; the norm is measured by the caller.

*Source*: ours; "norm or loss far above its recent past" is the rule of OLMo-core and
its ports.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability import thresholds
from optax_stability.thresholds import Threshold
from optax_stability.thresholds._threshold import learn, state_for

# The kinds of abnormal steps, in the order of `Reading.kinds`.
KINDS = ("nan", "inf", "norm", "value")

# Recommended limits: on the norm five times its trend; on the loss half a nat above its
# trend; and, to confirm a norm, a loss above the usual scatter.
FAR_ABOVE_THE_TREND = thresholds.detrended_mad(5.0, floor=5.0)
HALF_A_NAT_ABOVE = thresholds.detrended_mad(7.0, floor=0.5, log=False)
ABOVE_THE_SCATTER = thresholds.detrended_mad(4.0, floor=0.3, log=False)

_NO_LIMIT = thresholds.constant(float("inf"))
# A limit below every loss: each norm above its limit is confirmed.
_ALWAYS_CONFIRMED = Threshold(
    init=lambda: (),
    update=lambda x, state: (jnp.float32(-jnp.inf), state),
    rebase=lambda x, state: state,
)


class DetectorState(NamedTuple):
    """State of the detector.

    Attributes:
      grad_norm: state of the threshold on the gradient norm.
      value: state of the threshold on the loss.
      confirm: state of the lower threshold on the loss.
    """

    grad_norm: Any
    value: Any
    confirm: Any


class Reading(NamedTuple):
    """Measurements and findings of the detector at one step.

    Attributes:
      norm: real[] – L2 norm of the gradient; "real" is float64 if one of its leaves is
        float64 or complex128, else float32.
      value: float32[] – the loss, 0 if none was given.
      norm_limit: real[] – greatest normal norm.
      value_limit: float32[] – greatest normal loss.
      kinds: bool[4] – which kinds were found, in the order of ``KINDS``.
    """

    norm: jax.Array
    value: jax.Array
    norm_limit: jax.Array
    value_limit: jax.Array
    kinds: jax.Array

    @property
    def nonfinite(self) -> jax.Array:
        """Whether norm or loss is NaN or Inf."""
        return self.kinds[0] | self.kinds[1]

    @property
    def spike(self) -> jax.Array:
        """Whether the step is finite and abnormal."""
        return self.kinds[2] | self.kinds[3]


class Detector(NamedTuple):
    """Thresholds on the gradient norm and the loss; None sets no limit.

    Attributes:
      grad_norm: threshold on the L2 norm of the gradient.
      value: threshold on the loss.
      confirm: threshold on the loss, above which a norm counts as a spike.
    """

    grad_norm: Threshold | None
    value: Threshold | None
    confirm: Threshold | None

    @property
    def needs_loss(self) -> bool:
        """Whether a step without a loss cannot be judged."""
        return self.value is not None or self.confirm is not None

    def _thresholds(self) -> tuple[Threshold, Threshold, Threshold]:
        return (
            self.grad_norm or _NO_LIMIT,
            self.value or _NO_LIMIT,
            self.confirm or _ALWAYS_CONFIRMED,
        )

    def init(self, norm_dtype: Any) -> DetectorState:
        """The state before the first step, for norms of this dtype."""
        grad_norm, value, confirm = self._thresholds()
        return DetectorState(
            state_for(grad_norm, norm_dtype), value.init(), confirm.init()
        )

    def judge(self, norm, value, state) -> tuple[Reading, DetectorState]:
        """Compares a step with its limits; also returns the state that learned it."""
        grad_norm, by_value, confirm = self._thresholds()
        norm_limit, norm_state = learn(grad_norm, norm, state.grad_norm)
        value_limit, value_state = learn(by_value, value, state.value)
        confirm_limit, confirm_state = learn(confirm, value, state.confirm)
        learned = DetectorState(norm_state, value_state, confirm_state)
        nan = jnp.isnan(norm) | jnp.isnan(value)
        inf = ~nan & (jnp.isinf(norm) | jnp.isinf(value))
        finite = ~(nan | inf)
        kinds = [
            nan,
            inf,
            finite & (norm > norm_limit) & (value > confirm_limit),
            finite & (value > value_limit),
        ]
        return Reading(norm, value, norm_limit, value_limit, jnp.stack(kinds)), learned

    def is_normal_loss(self, value, state) -> jax.Array:
        """Whether a loss is within the limit of ``state``."""
        _, by_value, _ = self._thresholds()
        return value <= by_value.update(value, state.value)[0]

    def rebase(self, norm, value, state) -> DetectorState:
        """Restarts the thresholds from the present norm and loss."""
        streams = zip(self._thresholds(), (norm, value, value), state, strict=True)
        return DetectorState(
            *(
                optax.tree.cast_like(each.rebase(x, old), old)
                for each, x, old in streams
            )
        )
