"""All that ``record`` measures on a tree, and what it needs of the time before.

*Cost*: that of :mod:`_norms`, and of what the options ask for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core import _known_norms, _norms, _numerics
from optax_stability._core._norms import Norms
from optax_stability._recording import _distribution, _histogram, _similarity, _spectrum
from optax_stability._recording._distribution import Parts

# What is known of a quantity: of the whole, and of each part.
Measured = dict[str, tuple[jax.Array, jax.Array]]


class Options(NamedTuple):
    """What :func:`record` measures beside the norms."""

    ratio_to_params: bool
    correlation: bool
    spectral: bool
    histogram: bool


class Memory(NamedTuple):
    """What a measurement needs of the one before.

    Attributes:
      previous: what passed, or None without ``correlation``.
      spectrum: where power iteration ended, or None without ``spectral``.
    """

    previous: Any
    spectrum: Any


def init_measured(num_parts: int, options: Options) -> Measured:
    """Zeros, for every quantity that will be there."""
    names = ["norm", "rms", "max_abs", "zero_fraction", "nonfinite", "bimodality"]
    names += ["param_ratio"] * options.ratio_to_params
    names += ["correlation"] * options.correlation
    names += ["spectral_norm"] * options.spectral
    shapes: dict[str, tuple] = dict.fromkeys(names, ())
    if options.histogram:
        shapes["histogram"] = (_histogram.NUM_BINS,)
    return {
        name: (
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((num_parts, *shape), jnp.float32),
        )
        for name, shape in shapes.items()
    }


def _rms(norms: Norms, sizes) -> tuple[jax.Array, jax.Array]:
    whole = norms.whole / jnp.sqrt(jnp.maximum(jnp.sum(sizes), 1.0))
    return whole, norms.leaves / jnp.sqrt(jnp.maximum(sizes, 1.0))


def _ratio(norms: Norms, others: Norms) -> tuple[jax.Array, jax.Array]:
    """Norm over norm; 0 where there is nothing to compare with."""
    return (
        _numerics.ratio(norms.whole, others.whole),
        _numerics.ratio(norms.leaves, others.leaves),
    )


def measure_norms(parts: Parts) -> Norms:
    """The norms of the parts; not measured again where they are known."""
    if not any(parts.layered):
        return _known_norms.measure(parts.leaves, parts.axis_name)
    norms = _norms.leaf_norms(parts.leaves, parts.axis_name, parts.layered)
    return Norms(norms, _norms.join_norms(norms))


def measure_every_step(parts: Parts, norms: Norms) -> Measured:
    """What follows from the norms."""
    return {"norm": (norms.whole, norms.leaves), "rms": _rms(norms, parts.sizes())}


def measure_when_due(
    parts: Parts, norms: Norms, params: Parts | None, memory: Memory, options: Options
) -> tuple[Measured, Memory]:
    """What takes passes of its own, and what is remembered for the next time."""
    previous, spectrum = memory
    sizes, scale = parts.sizes(), _distribution.scale_of(norms.leaves)
    entries = _distribution.measure_entries(parts, scale)
    # The maximum over devices of numbers and NaN is a number, on some backends.
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
