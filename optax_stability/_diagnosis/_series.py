"""Access to the curves of a history, global or per layer, by any of their names.

A metric may be missing, may have a prefix (``decayed/adam/…``), and may repeat its last
value between measurements.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._normal import Normal, normal

# Metrics that ``record`` measures every few steps, and repeats in between.
_SPARSE = (
    "max_abs",
    "zero_fraction",
    "bimodality",
    "param_ratio",
    "correlation",
    "spectral_norm",
    "logit_bound",
)
_ADAM = ("update_rms", "correlation", "eps_share", "zero_fraction")
_INDEX = re.compile(r"(?:^|[/_.])(\d+)(?=$|[/_.])")
_EMBEDDING = re.compile(r"(?<!un)embed|token|wte|wpe|position", re.IGNORECASE)
_VECTOR = re.compile(r"(bias|scale|norm)\d*$", re.IGNORECASE)


class Series(NamedTuple):
    """One curve.

    Attributes:
      key: name in the history.
      values: float64[T].
    """

    key: str
    values: np.ndarray


class Layers(NamedTuple):
    """One curve per layer.

    Attributes:
      keys: names in the history.
      names: names of the layers, in the order of the history.
      values: float64[T, n_layers].
    """

    keys: list[str]
    names: list[str]
    values: np.ndarray

    def only(self, wanted: Callable[[str], bool]) -> "Layers":
        """The layers for whose names ``wanted`` is true."""
        at = [i for i, name in enumerate(self.names) if wanted(name)]
        return Layers(
            [self.keys[i] for i in at], [self.names[i] for i in at], self.values[:, at]
        )


def log_of(values: np.ndarray) -> np.ndarray:
    """Logarithm of norms; NaN where the norm is not positive."""
    return np.log(np.where(values > 0, values, np.nan))


def resolution(values: np.ndarray) -> float:
    """The unit of the last decimal place that is used; 0 for more than six places."""
    for places in range(7):
        if np.allclose(values, np.round(values, places), rtol=0, atol=1e-9):
            return 10.0**-places
    return 0.0


def is_embedding(layer: str) -> bool:
    """Whether a layer is an embedding, by its name: most rows have no gradient."""
    return bool(_EMBEDDING.search(layer))


def is_vector(layer: str) -> bool:
    """Whether a layer is a bias or a scale, by its name."""
    return bool(_VECTOR.search(layer))


def depth(layer: str) -> float:
    """Position in the model: embeddings −1, blocks their number, others ∞."""
    if is_embedding(layer):
        return -1.0
    index = _INDEX.search(layer)
    return float(index[1]) if index else np.inf


class History:
    """A checked history, with methods that look up metrics."""

    def __init__(self, history: dict[str, np.ndarray]):
        """Checks and converts ``history``; :func:`diagnose` lists the errors."""
        self.columns = _checked(history)
        self.steps = np.asarray(history["step"])
        self.length = len(self.steps)
        self._normal: dict[tuple[str, bool], Normal] = {}

    def without_probes(self) -> "History":
        """Without the rows in which ``branch_on_spike`` probed its snapshot."""
        probed = np.zeros(self.length, bool)
        for each in self.find_all("branch/probed"):
            probed |= each.values == 1
        if not probed.any():
            return self
        return History({key: each[~probed] for key, each in self.columns.items()})

    def without_evaluations(self) -> "History":
        """Without rows that hold an evaluation alone, which goes to the row before."""
        held_out = self.columns.get("eval/loss")
        if held_out is None:
            return self
        measured = [
            ~np.isnan(self.columns[key])
            for name in ("loss", "skip/value", "grad/norm", "skip/norm", "clip/norm")
            for key in self.keys(name)
        ]
        training = np.any(measured, axis=0) | np.isnan(held_out)
        if not measured or training.all() or not training.any():
            return self
        rows = np.flatnonzero(training)
        apart = np.flatnonzero(~training)
        before = np.maximum(np.searchsorted(rows, apart) - 1, 0)
        columns = {key: each[rows] for key, each in self.columns.items()}
        columns["eval/loss"][before] = held_out[apart]
        return History(columns)

    def part(self, start: int, stop: int) -> "History":
        """The rows from ``start`` to ``stop``."""
        if (start, stop) == (0, self.length):
            return self
        return History({key: each[start:stop] for key, each in self.columns.items()})

    def keys(self, name: str) -> list[str]:
        """The key ``name``; if it is missing, all keys ``<prefix>/<name>``."""
        if name in self.columns:
            return [name]
        return [key for key in self.columns if key.endswith("/" + name)]

    def find_all(self, *names: str) -> list[Series]:
        """All curves of the first of the names that was ever measured."""
        for name in names:
            found = [Series(key, self.columns[key]) for key in self.keys(name)]
            measured = [each for each in found if not np.isnan(each.values).all()]
            if measured:
                return measured
        return []

    def first(self, *names: str) -> Series | None:
        """The first curve of :meth:`find_all`."""
        return next(iter(self.find_all(*names)), None)

    def first_unprefixed(self, *names: str) -> Series | None:
        """As :meth:`first`, but only for names without a prefix."""
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

        Metrics of one group are measured in the same rows: a row counts as measured if
        any of them changed.
        """
        known = np.isfinite(self.columns[key])
        prefix, _, layer = key.partition(name)
        place, _, metric = name.partition("/")
        group = _ADAM if place == "adam" else _SPARSE
        if metric not in group:
            return known
        together = [f"{prefix}{place}/{each}" for each in group]
        together += [each + layer for each in together]
        columns = [self.columns[each] for each in together if each in self.columns]
        return changed(np.stack(columns, axis=1)) & known

    def normal(self, key: str, *, log: bool = False) -> Normal:
        """What is normal for a curve, or for its logarithm where it is positive."""
        if (key, log) not in self._normal:
            values = self.columns[key]
            values = log_of(values) if log else values
            self._normal[key, log] = normal(values)
        return self._normal[key, log]

    def forward_filled(self, key: str) -> np.ndarray:
        """A metric with missing values replaced by the last known one."""
        values = self.columns[key]
        last = np.where(np.isfinite(values), np.arange(self.length), -1)
        last = np.maximum.accumulate(last) if self.length else last
        return np.where(last >= 0, values[last], np.nan)

    def settled_row(self) -> int:
        """The first row after the warm-up and the early descent; T if there is none."""
        early = np.flatnonzero(self.steps >= limits.EARLY_STEPS)
        first = int(early[0]) if len(early) else self.length
        return max(first, self.peak_rate_row() or 0)

    def peak_rate_row(self) -> int | None:
        """The first row at which the learning rate is at its peak; None if unknown."""
        rate = self.first_unprefixed("learning_rate")
        if rate is None:
            return None
        values = np.where(np.isfinite(rate.values), rate.values, -np.inf)
        return int(np.argmax(values >= 0.99 * values.max()))

    def near_peak_rate(self) -> np.ndarray:
        """bool[T]: the learning rate is near its peak, or unknown."""
        rate = self.first_unprefixed("learning_rate")
        if rate is None:
            return np.ones(self.length, bool)
        values = np.where(np.isfinite(rate.values), rate.values, -np.inf)
        return values >= limits.RATE_DECAYED * values.max()


def changed(values: np.ndarray) -> np.ndarray:
    """bool[T]: the rows of ``values[T, n]`` that differ from the previous row."""
    if not len(values):
        return np.zeros(0, bool)
    before, after = values[:-1], values[1:]
    differs = (before != after) & ~(np.isnan(before) & np.isnan(after))
    return np.concatenate([[True], differs.any(axis=1)])


def _checked(history: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns as float64, by name; raises for malformed ones."""
    if not isinstance(history, dict):
        raise TypeError(
            f"history must be a dict of arrays, got {type(history).__name__}; pass "
            "what history(state) returns."
        )
    if "step" not in history:
        raise ValueError(
            f"history has no 'step' among its {len(history)} keys; add the step of "
            "each row, as history(state) does."
        )
    columns = {}
    for key, values in history.items():
        if not isinstance(key, str):
            raise TypeError(
                f"history has the key {key!r} of type {type(key).__name__}; name each "
                "metric by a str, or remove this key."
            )
        try:
            columns[key] = np.asarray(values, np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"history[{key!r}] must be an array of numbers, got {values!r}; remove "
                "this key."
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
            f"history['step'] = {history['step']!r} contains NaN or Inf; pass a finite "
            "step number for each row."
        )
    forward = np.sign(np.diff(columns["step"]))
    if len(forward) > limits.MIN_MEASUREMENTS and forward.sum() < 0:
        raise ValueError(
            f"history['step'] runs backwards, from {columns['step'][0]:g} to "
            f"{columns['step'][-1]:g}; sort the rows by step, the oldest first."
        )
    return columns
