"""The noise scale in the L1 norm, where a microbatch is not small beside it.

*Problem*: the sign of a microbatch gradient of n examples agrees with the gradient G in
Σ|Gᵢ|·erf(|Gᵢ|·√(n/2)/σᵢ). While n is far below the noise scale, this is in proportion
to ΣGᵢ²/σᵢ; beyond, it stops growing, and the ratio of the means is too large.

*Rule*: the ratio is corrected as for one common r = |Gᵢ|/σᵢ of all entries, where
B_l1 = 1/r² and all three are known: with u = n·r² and the uncorrected ratio B::

  n/B = √(π·u/2)·erf(√(u/2))        B_l1 = n/u

*Cost*: element-wise over the streams.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import erf

from optax_stability._core._numerics import ratio
from optax_stability._noise._drift import Present

_ROOT = math.sqrt(math.pi / 2)
# From the side where Newton's method converges; the error is then below 1e-6.
_STEPS = 6


def _root_of_share(share) -> jax.Array:
    """√u, from n/B ≥ 0."""
    start = jnp.maximum(jnp.sqrt(share), share / _ROOT)

    def newton(_, t):
        inside = erf(t / math.sqrt(2))
        slope = _ROOT * inside + t * jnp.exp(-jnp.square(t) / 2)
        return t - ratio(_ROOT * t * inside - share, slope)

    return jax.lax.fori_loop(0, _STEPS, newton, start)


def _of_common_ratio(scale, microbatch) -> jax.Array:
    """B_l1 from the ratio of the means; 0 stays 0 and ∞ stays ∞."""
    known = (scale > 0) & jnp.isfinite(scale) & (microbatch > 0)
    share = ratio(microbatch, jnp.where(known, scale, 1.0))
    root = _root_of_share(jnp.where(known, share, 1.0))
    return jnp.where(known, microbatch / jnp.square(root), scale)


def unsaturated(found: Present, microbatch) -> Present:
    """The noise scale and its interval, for microbatches of any size.

    Args:
      found: from the ratio of the means of Σσᵢ and ΣGᵢ²/σᵢ.
      microbatch: float32[] – n, the weight of a microbatch.
    """
    ratio, low, high = (
        _of_common_ratio(x, microbatch) for x in (found.ratio, found.low, found.high)
    )
    signal = found.signal * jnp.where(
        found.valid & (ratio > 0), found.ratio / jnp.where(ratio > 0, ratio, 1.0), 1.0
    )
    return found._replace(ratio=ratio, low=low, high=high, signal=signal)
