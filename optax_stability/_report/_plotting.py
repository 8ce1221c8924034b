"""Plots a history, and marks the first step of each finding.

*Problem*: a cause is found by comparing several curves at the same steps.

*Where*: on the host, after the run or its crash. Needs matplotlib, which is imported
only when a function is called.

*Cost*: one or two seconds for the plot, whatever the length of the history, because
curves are thinned to the resolution of a page; and the time of :func:`diagnose`, which
grows with the length.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np

from optax_stability._core import _atomic_file
from optax_stability._diagnosis._diagnose import diagnose
from optax_stability._report._drawing import _curves

KINDS = {".png": "png", ".svg": "svg", ".pdf": "pdf"}


def check_matplotlib(function: str) -> None:
    """Raises ImportError, with the remedy, if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            f"{function} needs matplotlib, which is not installed; "
            'pip install "optax_stability[plot]".'
        )


def check_path(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Path:
    """The path, if its suffix is one of ``suffixes``; raises otherwise."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"path must be a str or os.PathLike, got {path!r}; pass the name of a file."
        )
    if Path(path).suffix.lower() not in suffixes:
        raise ValueError(
            f"path={os.fspath(path)!r} must end with one of {', '.join(suffixes)}; "
            "the suffix selects the format."
        )
    return Path(path)


def plot_history(history: dict[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Plots a history as one figure, with a panel for each recorded group of metrics.

    The panels show loss, gradient norm, gradient norm by layer, noise scale, updates
    and learning rate, one above the other, on the same steps. A numbered dotted line
    marks the first step of each finding of :func:`diagnose`, in the order of findings.

    **Guarantees**

    * A figure is written for any numbers: NaN, Inf, 0, and a history without rows.
    * Thinning hides no event: of the steps that share a pixel, the extremes are shown,
      and non-finite values take precedence.
    * The write is atomic: the file is complete, or is not written.
    * The settings of matplotlib are neither used nor changed, and pyplot is not used.

    **Edge cases**: non-finite values are marked at the upper edge, and a norm of 0 at
    the lower edge. NaN counts as non-finite after three rows in which the metric was
    measured, and as "not measured" otherwise.

    Args:
      history: what :func:`history` returns, or any log in the form that
        :func:`diagnose` reads. ``eval/loss`` is the loss on held-out data, NaN in rows
        without an evaluation. Rows with ``eval/loss``, but without training loss and
        gradient norm, are not training steps.
      path: ends with ``.png``, ``.svg`` or ``.pdf``. Missing folders are created.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: ``history`` is not a dict of numbers, or ``path`` is not a path.
      ValueError: ``history`` has no ``step``, lengths differ, or the suffix is unknown.

    Example:
      >>> import tempfile
      >>> steps = np.arange(100)
      >>> history = {"step": steps, "loss": 2.0 + np.exp(-steps / 30)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     plot_history(history, Path(folder) / "run.png")
      ...     print([file.name for file in Path(folder).iterdir()])
      ['run.png']
    """
    target = check_path(path, tuple(KINDS))
    check_matplotlib("plot_history")
    run, findings = _curves.read(history), diagnose(history)
    from optax_stability._report._drawing import _figures, _panels

    kind = KINDS[target.suffix.lower()]
    picture = _figures.render(run, _panels.shown(run), findings, kind)
    _atomic_file.write(target, picture.content)
