"""The measurements of ``record`` on a tree, and their memory between steps.

*Cost*: that of :mod:`_norms`, and that of the chosen options.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core import _known_norms, _norms, _numerics
from optax_stability._core._look import is_due
from optax_stability._core._norms import Norms
from optax_stability._recording import _distribution, _histogram, _similarity, _spectrum
from optax_stability._recording._distribution import Parts

# By name, each quantity: of the whole tree, and of each part.
Measured = dict[str, tuple[jax.Array, jax.Array]]


class Options(NamedTuple):
    """The optional measurements of :func:`record`."""

    ratio_to_params: bool
    correlation: bool
    spectral: bool
    histogram: bool


class Memory(NamedTuple):
    """Memory from one measurement to the next.

    Attributes:
      previous: the tree that was measured, or None without ``correlation``.
      spectrum: state of the power iteration, or None without ``spectral``.
    """

    previous: Any
    spectrum: Any


def init_measured(num_parts: int, options: Options, dtype: Any) -> Measured:
    """Zeros for every quantity that will be measured."""
    names = ["norm", "rms", "max_abs", "zero_fraction", "nonfinite", "bimodality"]
    names += ["param_ratio"] * options.ratio_to_params
    names += ["correlation"] * options.correlation
    names += ["spectral_norm"] * options.spectral
    shapes: dict[str, tuple] = dict.fromkeys(names, ())
    if options.histogram:
        shapes["histogram"] = (_histogram.NUM_BINS,)
    return {
        name: (
            jnp.zeros(shape, dtype),
            jnp.zeros((num_parts, *shape), dtype),
        )
        for name, shape in shapes.items()
    }


def _rms(norms: Norms, sizes) -> tuple[jax.Array, jax.Array]:
    sizes = sizes.astype(norms.total.dtype)
    total = norms.total / jnp.sqrt(jnp.maximum(jnp.sum(sizes), 1.0))
    return total, norms.leaves / jnp.sqrt(jnp.maximum(sizes, 1.0))


def _ratio(norms: Norms, others: Norms) -> tuple[jax.Array, jax.Array]:
    """The ratios of the norms; 0 where the second norm is 0."""
    return (
        _numerics.ratio(norms.total, others.total),
        _numerics.ratio(norms.leaves, others.leaves),
    )


def measure_norms(parts: Parts) -> Norms:
    """The norms of the parts; known norms are reused."""
    if not any(parts.layered):
        return _known_norms.measure(parts.leaves, parts.axis_name)
    norms = _norms.leaf_norms(parts.leaves, parts.axis_name, parts.layered)
    return Norms(norms, _norms.join_norms(norms))


def is_costly(parts: Parts, extra_args: Mapping[str, Any]) -> bool:
    """Whether the norms would be measured in a step that is not looked at."""
    known = _known_norms.is_known(parts.leaves, parts.axis_name)
    look = is_due(extra_args, lambda: True)
    return look is False and (any(parts.layered) or not known)


def from_norms(parts: Parts, norms: Norms) -> Measured:
    """The quantities that follow from the norms."""
    return {"norm": (norms.total, norms.leaves), "rms": _rms(norms, parts.sizes())}


def measure_when_due(
    parts: Parts, norms: Norms, params: Parts | None, memory: Memory, options: Options
) -> tuple[Measured, Memory]:
    """The quantities that need passes of their own, and the updated memory."""
    previous, spectrum = memory
    sizes = parts.sizes().astype(norms.total.dtype)
    scale = _distribution.safe_scale(norms.leaves)
    entries = _distribution.measure_entries(parts, scale)
    # On some backends the maximum over devices ignores NaN.
    largest = jnp.where(jnp.isnan(norms.leaves), jnp.nan, entries.largest)
    nonfinite = _distribution.count_nonfinite(parts, norms.leaves)
    measured = {
        "max_abs": (jnp.max(largest, initial=0.0), largest),
        "zero_fraction": _distribution.share(sizes - entries.nonzero, sizes),
        "nonfinite": _distribution.share(nonfinite, sizes),
        "bimodality": _distribution.bimodality(entries, norms.leaves, scale),
    }
    if options.ratio_to_params and params is not None:
        measured["param_ratio"] = _ratio(norms, measure_norms(params))
    if options.correlation:
        measured["correlation"], previous = _similarity.measure(previous, parts, norms)
    if options.spectral:
        found, spectrum = _spectrum.measure(spectrum, parts, norms.leaves)
        measured["spectral_norm"] = found
    if options.histogram:
        measured["histogram"] = _histogram.measure(parts)
    return measured, Memory(previous, spectrum)
