"""Writes a report on a run as one HTML page: findings, charts and numbers.

*Problem*: a failed run leaves thousands of numbers, and nobody watched it.

*Where*: on the host, after the run or its crash. Needs matplotlib, which is imported
only when a function is called.

*Cost*: one or two seconds for the page, whatever the length of the history, and the
time of :func:`diagnose`, which grows with the length; a file of some hundred kilobytes.
"""

import os

import numpy as np

from optax_stability._core import _atomic_file
from optax_stability._diagnosis._coverage import cannot_be_told, coverage
from optax_stability._diagnosis._diagnose import diagnose
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History
from optax_stability._report import _page as html
from optax_stability._report import _plotting
from optax_stability._report._drawing import _curves
from optax_stability._report._drawing._curves import Run


def _number(value: float) -> str:
    from optax_stability._report._drawing import _axes

    return _axes.short(float(value))


def _steps(history: dict[str, np.ndarray]) -> str:
    """The range of steps of a history, as text."""
    steps = np.asarray(history["step"], float)
    steps = steps[np.isfinite(steps)]
    if not len(steps):
        return "no steps"
    first, last = steps.min(), steps.max()
    return f"step {first:,.0f}" if first == last else f"steps {first:,.0f}–{last:,.0f}"


def _checks(history: dict[str, np.ndarray]) -> str:
    """What was looked at, and what could not be."""
    checked = History(history).without_probes().without_evaluations()
    with np.errstate(all="ignore"):
        checks, unknown = coverage(checked), cannot_be_told(checked)
    lacking: dict[str, list[str]] = {}
    for each in checks:
        if each.lacks:
            lacking.setdefault(each.lacks, []).append(each.kind)
    return html.checks(
        [each.kind for each in checks if not each.lacks], lacking, unknown
    )


def _count(history: dict[str, np.ndarray]) -> str:
    """Metrics and layers of a history: a metric of many layers counts once."""
    layers = _layer_names(history)
    metrics = {
        next(
            (key[: -len(each) - 1] for each in layers if key.endswith("/" + each)), key
        )
        for key in map(str, history)
        if key != "step"
    }
    text = f"{len(metrics):,} metric{'' if len(metrics) == 1 else 's'}"
    number = f"{len(layers):,} layer{'' if len(layers) == 1 else 's'}"
    return f"{text}, {number}" if layers else text


def _layer_names(history: dict[str, np.ndarray]) -> list[str]:
    """The layers of the first metric that has some, the longest names first."""
    names = History(history).layers("grad/norm", "clip/norm", "update/rms").names
    return sorted(names, key=len, reverse=True)


def _figures(run: Run, findings: list[Finding], steps: str) -> str:
    from optax_stability._report._drawing import _figures, _panels

    parts = []
    for panel in _panels.shown(run):
        drawn = _figures.render(
            run, [panel], findings, "svg", titled=False, salt=panel.name
        )
        labels = "; ".join(entry.label for entry in drawn.legend)
        description = f"Over {steps}: {labels}."
        svg = html.with_titles(drawn.content.decode(), _hover_texts(run, panel.name))
        legend = html.legend([entry._asdict() for entry in drawn.legend])
        parts.append(html.figure(panel.title, panel.note, description, svg, legend))
    empty = '<p class="soft">None of the metrics that can be plotted was recorded.</p>'
    return "\n".join(parts) or empty


def _hover_texts(run: Run, panel: str) -> list[str]:
    """What a panel tells of each of its rows on hover."""
    from optax_stability._report._drawing import _heat_map

    return _heat_map.hover_texts(run.train) if panel == "layers" else []


def _last(values: np.ndarray | None) -> str:
    """The last measured value, as text."""
    known = np.array([]) if values is None else values[~np.isnan(values)]
    return _number(known[-1]) if len(known) else "–"


def _tiles(run: Run, findings: list[Finding]) -> str:
    train = run.train
    found = [("Findings", str(len(findings)), "see below" if findings else "none")]
    loss = _curves.loss_of(train)
    if loss is not None:
        level = _curves.last_level(loss)
        shown = "–" if np.isnan(level) else _number(level)
        least = _curves.lowest_level(loss)
        least = "–" if np.isnan(least) else _number(least)
        found.append(("Loss", shown, f"running median; lowest {least}"))
    if np.isfinite(run.held_out).any():
        best = f"last; smallest {_number(np.nanmin(run.held_out))}"
        found.append(("Held-out loss", _last(run.held_out), best))
    for name, flags in (("Clipped", _clipped(run)), ("Skipped", _skipped(run))):
        if flags is not None and len(flags):
            share = f"{flags.mean():.1%} of {len(flags):,} steps"
            found.append((name, f"{flags.sum():,}", share))
    if run.branches is not None:
        rollbacks = run.branches.rolled_back.sum()
        failed = run.branches.failed_probes.sum()
        remark = f"{failed:,} failed {'probe' if failed == 1 else 'probes'}"
        found.append(("Rolled back", f"{rollbacks:,}", remark))
    return html.tiles(found)


def _clipped(run: Run) -> np.ndarray | None:
    norm = _curves.column(run.train, "clip/norm", "grad/norm")
    limit = _curves.column(run.train, "clip/limit")
    if norm is None or limit is None:
        return None
    skipped = _skipped(run)
    above = (norm > limit) & (limit > 0)
    return above if skipped is None else above & ~skipped


def _skipped(run: Run) -> np.ndarray | None:
    skipped = _curves.column(run.train, "skip/skipped")
    return None if skipped is None else skipped == 1


def _table(history: dict[str, np.ndarray]) -> str:
    rows = []
    for key in html.SCALARS:
        values = np.asarray(history.get(key, []), float)
        measured = values[~np.isnan(values)]
        if not len(measured):
            continue
        known = measured[np.isfinite(measured)]
        ends = (known.min(), known.max()) if len(known) else (np.nan, np.nan)
        numbers = [_number(each) for each in (measured[-1], *ends)]
        infinite = len(measured) - len(known)
        rows.append((key, [*numbers, f"{len(measured):,}", f"{infinite or '–'}"]))
    return html.table(rows)


def write_report(
    history: dict[str, np.ndarray],
    path: str | os.PathLike[str],
    *,
    title: str = "Training report",
) -> None:
    """Writes a report on a history as one self-contained HTML file.

    The page begins with the findings of :func:`diagnose`, with evidence, likely causes
    and remedies. Then come the panels of :func:`plot_history`, with the numbers of the
    findings, the checks that ran and what others lacked, the most useful values, and
    the names of all metrics. The page is readable
    on a phone, in dark mode, on paper, and without colour vision.

    **Guarantees**

    * The file loads no other resource and runs no script.
    * Names of layers and the title are escaped, and shown literally.
    * A report is written for any numbers: NaN, Inf, 0, and a history without rows.
    * The write is atomic: an existing report remains until the new one is complete.

    **Edge cases**: if there is no finding, the report says so, and names the steps and
    the number of metrics that were examined.

    Args:
      history: what :func:`history` returns, or any log in the form that
        :func:`diagnose` and :func:`plot_history` read.
      path: ends with ``.html`` or ``.htm``. Missing folders are created.
      title: heading and title of the page.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: ``history`` is not a dict of numbers, or ``path`` is not a path.
      ValueError: ``history`` has no ``step``, lengths differ, or the suffix is unknown.

    Example:
      >>> import pathlib, tempfile
      >>> steps = np.arange(100)
      >>> history = {"step": steps, "loss": 2.0 + np.exp(-steps / 30)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "report.html"
      ...     write_report(history, path, title="A quiet run")
      ...     print("No finding" in path.read_text(encoding="utf-8"))
      True
    """
    target = _plotting.check_path(path, (".html", ".htm"))
    _plotting.check_matplotlib("write_report")
    _atomic_file.write(target, page_of(history, title))


def page_of(
    history: dict[str, np.ndarray],
    title: str,
    findings: list[Finding] | None = None,
) -> bytes:
    """The page of a report; needs matplotlib.

    Findings may be given, for a run of another library: then what helps is also said in
    words.
    """
    words = findings is not None
    run, found = _curves.read(history), findings or diagnose(history)
    steps, rows = _steps(history), len(history["step"])
    counted = _count(history)
    row = "row" if rows == 1 else "rows"
    subtitle = f"{steps} · {rows:,} {row} · {counted}".capitalize()
    parts = (
        _tiles(run, found),
        html.findings(found, steps, counted, words),
        html.section("run", "The run", _figures(run, found, steps)),
        _checks(history),
        html.section("numbers", "Numbers", _table(history)),
        html.section("metrics", "All metrics", html.keys(history)),
    )
    return html.page(title, subtitle, parts).encode("utf-8", "replace")
