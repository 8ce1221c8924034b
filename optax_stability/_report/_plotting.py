"""Draws a run: what it did, and where the findings of the diagnosis begin.

*Problem*: what went wrong is seen when curves stand above one another, on the same
steps.

*Where*: on the host, after the run or its crash. Needs matplotlib, which is imported
when it is needed.

*Cost*: a second or two for the picture, whatever the length, as curves are thinned to
what a page can show; and that of :func:`diagnose`, which grows with it.
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
    """Raises ImportError, with the remedy, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            f"{function} draws with matplotlib, which is not installed; "
            'pip install "optax_stability[plot]".'
        )


def check_path(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Path:
    """The path, if its suffix is one of those; raises otherwise."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"path must be a str or os.PathLike, got {path!r}; give the name of a file."
        )
    if Path(path).suffix.lower() not in suffixes:
        raise ValueError(
            f"path={os.fspath(path)!r} must end with one of {', '.join(suffixes)}; "
            "the suffix sets the format."
        )
    return Path(path)


def plot_history(history: dict[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Draws a history as one picture, with a panel for whatever was recorded.

    Loss, gradient norm, gradient norm by layer, noise scale, updates and learning rate,
    one above the other on the same steps. Dotted lines with a number stand at the first
    step of each finding of :func:`diagnose`, in its order.

    **Guarantees**

    * Whatever the numbers are, a picture is written: NaN, Inf, 0 and no rows at all.
    * No event is lost to thinning: of the steps that share a pixel the extremes are
      shown, and what is not finite before all else.
    * The file is whole, or is not there.
    * Nothing of matplotlib's settings or of pyplot is used or changed for good.

    **Edge cases**: what is not finite is marked at the upper edge, and a norm of 0 at
    the lower. NaN counts as not finite after three rows in which it was measured, and
    as not measured otherwise.

    Args:
      history: what :func:`history` returns, or any log of the form that
        :func:`diagnose` reads. ``eval/loss`` is the loss on held-out data, NaN where
        there is none; rows that hold nothing else are of no step of training.
      path: ends with ``.png``, ``.svg`` or ``.pdf``. Folders are made.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: ``history`` is no dict of numbers, or ``path`` no path.
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
