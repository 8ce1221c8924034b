"""Reads the noise scale on the host, and derives batch sizes from it.

*Where*: on the host, after the step. *Cost*: a few dozen scalars are fetched.

*Source*: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018,
arXiv:1812.06162, §2.
"""

import dataclasses
import math
from typing import Any, overload

import jax
import numpy as np

from optax_stability._core import _tree, _validate
from optax_stability._noise._lookup import find_estimate
from optax_stability._noise._state import readings, which_known


def _digits(value: float) -> str:
    """Three significant digits and a suffix: 1,234,567 is 1.23M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if 0.9995 * size <= value < math.inf:
            return f"{value / size:#.3g}".rstrip(".") + letter
    return f"{value:.3g}"


@dataclasses.dataclass(frozen=True, repr=False)
class NoiseScale:
    """The gradient noise scale of now, as :func:`noise_scale` reads it.

    Attributes:
      b_simple: tr Σ/‖G‖² of the model as it is at the last step, in ``unit``; NaN where
        it is not ``valid``.
      low: lower end of its interval; a lower bound where it is not ``valid``.
      high: upper end, ∞ where it is not ``valid``.
      valid: whether the gradient can be distinguished from the noise.
      trace: tr Σ of now, a mean of S; NaN before the first estimate.
      grad_sq: ‖G‖² of now; may be negative; NaN likewise.
      noise_to_weight: √(var_g/var_p), noise of a microbatch relative to the parameters;
        NaN where either is not known.
      steps: how many steps of equal weight would say as much; not how old it is.
      confidence: of the interval.
      biased: whether the estimate is from pairs of successive gradients.
      unit: what the weights of the microbatches count.
      norm: "l2" or "l1"; with "l1", ``b_simple`` is B_l1, ``trace`` Σσᵢ and ``grad_sq``
        ΣGᵢ²/σᵢ, see :func:`estimate_noise_scale`.
      per_leaf: the same for every leaf, or every label, by name.
    """

    b_simple: float
    low: float
    high: float
    valid: bool
    trace: float
    grad_sq: float
    noise_to_weight: float
    steps: float
    confidence: float
    biased: bool
    unit: str = "examples"
    norm: str = "l2"
    per_leaf: dict[str, "NoiseScale"] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: the estimate, its interval, and how many steps it is worth."""
        confidence = f"{100 * self.confidence:g} %"
        name = {"l2": "B_simple", "l1": "B_l1"}[self.norm]
        if self.valid:
            low, high = _digits(self.low), _digits(self.high)
            text = f"{name} now = {_digits(self.b_simple)} {self.unit} "
            text += f"({confidence}: {low}–{high})"
        elif self.low > 0:
            text = f"{name} now ≥ {_digits(self.low)} {self.unit} ({confidence})"
        else:
            text = f"{name} unknown"
        text += f", worth {self.steps:.0f} steps"
        return text + (", biased: from successive steps" if self.biased else "")


def noise_scale(state: Any, *, unit: str = "examples") -> NoiseScale:
    """Reads the noise scale from an optimizer state.

    **Guarantees**: finds the estimate at any depth of the state, as :func:`metrics`
    does.

    **Edge cases**: outside ``jit`` only; inside, use the keys ``noise_scale/…`` of
    :func:`metrics`.

    Args:
      state: an optimizer state, ``TrainState`` or ``nnx.Optimizer`` that contains one
        :func:`estimate_noise_scale`.
      unit: what the weights of the microbatches count, for printing: "examples", or
        "tokens" where ``weight_fn`` counts tokens.

    Returns:
      The estimate of the whole gradient, with those of leaves or labels in
      ``per_leaf``.

    Raises:
      ValueError: the state contains no estimate, or more than one.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_stability import estimate_noise_scale
      >>> params = {"w": jnp.ones(2)}
      >>> noise_scale(estimate_noise_scale().init(params))
      B_simple unknown, worth 0 steps
    """
    found = find_estimate(state)
    by_name = readings(found)
    values, known = jax.device_get((by_name, which_known(found, by_name)))
    for key, each in known.items():
        values[key] = np.where(each, values[key], np.nan)
    shared = {
        "confidence": float(found.confidence),
        "biased": bool(found.biased),
        "unit": unit,
        "norm": "l2" if found.signs is None else "l1",
    }

    def read(stream: int) -> dict[str, Any]:
        return {key: value[stream].item() for key, value in values.items()} | shared

    marks = found.leaves if found.labels is None else found.labels
    names = [] if marks is None else _tree.names_of_marks(marks)
    leaves = {name: NoiseScale(**read(1 + i)) for i, name in enumerate(names)}
    return NoiseScale(**read(0), per_leaf=leaves)


@overload
def batch_efficiency(b_simple: float, batch_size: float) -> float: ...


@overload
def batch_efficiency(b_simple: Any, batch_size: Any) -> Any: ...


def batch_efficiency(b_simple: Any, batch_size: Any) -> Any:
    """The fraction of its examples that a batch of a given size does not waste.

    **Rule**: 1/(1 + B/B_simple). An example in a batch of size B_simple makes half the
    progress of an example in a tiny batch.

    **Edge cases**: B_simple = 0 gives 0, ∞ gives 1, NaN gives NaN.

    Limits: the rule holds for SGD with the learning rate tuned for every batch size,
    and for isotropic noise. The noise scale depends on the learning rate and grows
    along a run; for Adam it is a proxy. Merrill et al. (2025) measured the critical
    batch size directly and found that the noise scale is not a reliable substitute.

    Args:
      b_simple: noise scale, in any unit; a number or an array.
      batch_size: B > 0, in the same unit.

    Returns:
      A fraction from 0 to 1.

    Raises:
      TypeError: an argument is not a number.
      ValueError: ``batch_size`` is not above 0, or ``b_simple`` is below 0.

    Example:
      >>> batch_efficiency(400.0, 400)
      0.5

    References:
      McCandlish et al., 2018, arXiv:1812.06162, §2. Against it: Merrill et al.,
      "Critical Batch Size Revisited", 2025, arXiv:2505.23971.
    """
    _validate.check_numbers("batch_size", batch_size)
    if _validate.is_concrete(batch_size):
        _validate.check_interval("batch_size", batch_size, "(0, inf)", "use a size > 0")
    if not _validate.is_concrete(b_simple):
        _validate.check_numbers("b_simple", b_simple)
        return 1 / (1 + batch_size / b_simple)
    if math.isnan(b_simple):
        return math.nan
    _validate.check_interval("b_simple", b_simple, "[0, inf]", "it is a ratio ≥ 0")
    return 1.0 if math.isinf(b_simple) else b_simple / (b_simple + batch_size)


def critical_batch_range(estimate: NoiseScale) -> tuple[float, float]:
    """The range of the critical batch size, according to the noise scale.

    **Rule**: the interval of B_simple of the model as it is now. The upper end is
    ∞ where the interval has none.

    Limits, in addition to those of :func:`batch_efficiency`: the critical batch size
    weights the noise by the curvature, which B_simple leaves out. Zhang et al. (2024)
    find that the critical batch size grows with the amount of data. Treat the range as
    an order of magnitude, and test it.

    Args:
      estimate: the result of :func:`noise_scale`.

    Returns:
      (low, high), in the unit of the estimate.

    Raises:
      TypeError: ``estimate`` is not a :class:`NoiseScale`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_stability import estimate_noise_scale
      >>> state = estimate_noise_scale().init({"w": jnp.ones(2)})
      >>> critical_batch_range(noise_scale(state))
      (0.0, inf)

    References:
      McCandlish et al., 2018, arXiv:1812.06162, §2. Against it: Merrill et al., 2025,
      arXiv:2505.23971; Zhang et al., "How Does Critical Batch Size Scale in
      Pre-training?", 2024, arXiv:2410.21676.
    """
    if not isinstance(estimate, NoiseScale):
        raise TypeError(
            f"estimate must be a NoiseScale, got {type(estimate).__name__}; pass "
            "noise_scale(state)."
        )
    return estimate.low, estimate.high
