"""The history as rules read it: one curve, or one per layer, by any of its names.

A metric may be missing, may have another name in front (``decayed/adam/…``), and may
hold its last value between measurements.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from optax_stability._diagnosis import _thresholds as limits

# What ``record`` measures every few steps, and repeats in between.
_SELDOM = (
    "max_abs",
    "zero_fraction",
    "bimodality",
    "param_ratio",
    "correlation",
    "spectral_norm",
)
_ADAM = ("update_rms", "correlation", "eps_share", "zero_fraction")
_INDEX = re.compile(r"(?:^|[/_.])(\d+)(?=$|[/_.])")
_EMBEDDING = re.compile(r"(?<!un)embed|token|wte|wpe|position", re.IGNORECASE)
_VECTOR = re.compile(r"(bias|scale|norm)\d*$", re.IGNORECASE)


class Series(NamedTuple):
    """One curve.

    Attributes:
      key: its name in the history.
      values: float64[T].
    """

    key: str
    values: np.ndarray


class Layers(NamedTuple):
    """One curve per layer.

    Attributes:
      keys: their names in the history.
      names: of the layers, in the order of the history.
      values: float64[T, n_layers].
    """

    keys: list[str]
    names: list[str]
    values: np.ndarray

    def only(self, wanted: Callable[[str], bool]) -> "Layers":
        """The layers whose name is wanted."""
        at = [i for i, name in enumerate(self.names) if wanted(name)]
        return Layers(
            [self.keys[i] for i in at], [self.names[i] for i in at], self.values[:, at]
        )


def is_embedding(layer: str) -> bool:
    """Whether rows of a layer are looked up, so that most have no gradient."""
    return bool(_EMBEDDING.search(layer))


def is_vector(layer: str) -> bool:
    """Whether a layer is a bias or a scale, by its name."""
    return bool(_VECTOR.search(layer))


def depth(layer: str) -> float:
    """Place in the model: embeddings −1, blocks their number, others ∞."""
    if is_embedding(layer):
        return -1.0
    index = _INDEX.search(layer)
    return float(index[1]) if index else np.inf


class History:
    """A history that was checked, with every way to look a metric up."""

    def __init__(self, history: dict[str, np.ndarray]):
        """Checks and converts; see :func:`diagnose` for what is raised."""
        self.columns = _checked(history)
        self.steps = np.asarray(history["step"])
        self.length = len(self.steps)

    def without_probes(self) -> "History":
        """Without the rows in which ``branch_on_spike`` asked the kept parameters."""
        probed = np.zeros(self.length, bool)
        for each in self.streams("branch/probed"):
            probed |= each.values == 1
        if not probed.any():
            return self
        return History({key: each[~probed] for key, each in self.columns.items()})

    def keys(self, name: str) -> list[str]:
        """The key of that name, or those that end with it after a prefix."""
        if name in self.columns:
            return [name]
        return [key for key in self.columns if key.endswith("/" + name)]

    def streams(self, *names: str) -> list[Series]:
        """The curves of the first of the names that was ever measured."""
        for name in names:
            found = [Series(key, self.columns[key]) for key in self.keys(name)]
            measured = [each for each in found if not np.isnan(each.values).all()]
            if measured:
                return measured
        return []

    def first(self, *names: str) -> Series | None:
        """The first such curve."""
        return next(iter(self.streams(*names)), None)

    def exactly(self, *names: str) -> Series | None:
        """As :meth:`first`, but nothing may stand before the name."""
        for name in names:
            if name in self.columns and not np.isnan(self.columns[name]).all():
                return Series(name, self.columns[name])
        return None

    def layers(self, *names: str) -> Layers:
        """The curves ``<name>/<layer>`` of the first of the names that has any."""
        for name in names:
            keys = [key for key in self.columns if key.startswith(name + "/")]
            if not keys:
                keys = [key for key in self.columns if f"/{name}/" in key]
            if keys:
                layers = [key.partition(name + "/")[2] for key in keys]
                values = np.stack([self.columns[key] for key in keys], axis=1)
                return Layers(keys, layers, values)
        return Layers([], [], np.zeros((self.length, 0)))

    def measured(self, key: str, name: str) -> np.ndarray:
        """bool[T]: the rows at which the metric ``name`` was measured, not repeated.

        All that is measured together changes together, so that one of them may stay the
        same.
        """
        known = np.isfinite(self.columns[key])
        prefix, _, layer = key.partition(name)
        place, _, metric = name.partition("/")
        group = _ADAM if place == "adam" else _SELDOM
        if metric not in group:
            return known
        together = [f"{prefix}{place}/{each}" for each in group]
        together += [each + layer for each in together]
        columns = [self.columns[each] for each in together if each in self.columns]
        return changed(np.stack(columns, axis=1)) & known

    def held(self, key: str) -> np.ndarray:
        """A metric with its last value in between, as ``record`` has it."""
        values = self.columns[key]
        last = np.where(np.isfinite(values), np.arange(self.length), -1)
        last = np.maximum.accumulate(last) if self.length else last
        return np.where(last >= 0, values[last], np.nan)

    def settled(self) -> int:
        """The first row after the warm-up and the early descent; T if there is none."""
        early = np.flatnonzero(self.steps >= limits.EARLY_STEPS)
        first = int(early[0]) if len(early) else self.length
        return max(first, self.peak_rate() or 0)

    def peak_rate(self) -> int | None:
        """The first row at which the learning rate is at its peak; None if unknown."""
        rate = self.exactly("learning_rate")
        if rate is None:
            return None
        values = np.where(np.isfinite(rate.values), rate.values, -np.inf)
        return int(np.argmax(values >= 0.99 * values.max()))

    def undecayed(self) -> np.ndarray:
        """bool[T]: the learning rate is near its peak, or unknown."""
        rate = self.exactly("learning_rate")
        if rate is None:
            return np.ones(self.length, bool)
        values = np.where(np.isfinite(rate.values), rate.values, -np.inf)
        return values >= limits.RATE_DECAYED * values.max()


def changed(values: np.ndarray) -> np.ndarray:
    """bool[T]: the rows of ``values[T, n]`` that differ from the one before."""
    if not len(values):
        return np.zeros(0, bool)
    before, after = values[:-1], values[1:]
    differs = (before != after) & ~(np.isnan(before) & np.isnan(after))
    return np.concatenate([[True], differs.any(axis=1)])


def _checked(history: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns as float64, by name."""
    if not isinstance(history, dict):
        raise TypeError(
            f"history must be a dict of arrays, got {type(history).__name__}; pass "
            "what history(state) returns."
        )
    if "step" not in history:
        raise ValueError(
            f"history has no 'step' among its {len(history)} keys; add the numbers of "
            "its rows, as history(state) does."
        )
    columns = {}
    for key, values in history.items():
        try:
            columns[key] = np.asarray(values, np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"history[{key!r}] must be an array of numbers, got {values!r}; leave "
                "it out."
            ) from error
    shape = columns["step"].shape
    for key, values in columns.items():
        if values.ndim != 1 or values.shape != shape:
            raise ValueError(
                f"history[{key!r}] has shape {values.shape}, but history['step'] has "
                f"{shape}; every metric needs one number per step."
            )
    if not np.isfinite(columns["step"]).all():
        raise ValueError(
            f"history['step'] = {history['step']!r} holds what is not finite; number "
            "its rows."
        )
    return columns
