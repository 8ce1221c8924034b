"""Panels of curves, drawn from the history alone.

Curves and marks differ in shape or dash as well as in colour; the colours are from the
palette of Okabe and Ito. Each ``draw_…`` takes the axes and the run, and draws nothing
if nothing was measured.
"""

import numpy as np
from matplotlib.axes import Axes

from optax_stability._report._drawing import _axes, _curves
from optax_stability._report._drawing._axes import BLUE, GREY, INK, ORANGE
from optax_stability._report._drawing._curves import Run, column, finite


def _last_value(values: np.ndarray) -> str:
    """The last finite value of a curve, as text for a legend."""
    known = values[np.isfinite(values)]
    return f", last {_axes.short(known[-1])}" if len(known) else ""


def _measured(run: Run, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the measured rows; NaN for non-finite values."""
    known = np.flatnonzero(~np.isnan(values) | _curves.is_nonfinite(values))
    return run.train.columns["step"][known], finite(values[known])


def draw_curve(axes: Axes, run: Run, values: np.ndarray, **style) -> None:
    """Draws a line through the measured values, with gaps at non-finite ones."""
    steps, shown = _measured(run, values)
    if np.isfinite(shown).any():
        rows = _curves.extreme_rows(shown)
        axes.plot(steps[rows], shown[rows], **style)
        isolated = _curves.isolated_rows(shown)
        dots = {"color": style["color"], "ms": 2.5, "mew": 0}
        axes.plot(steps[isolated], shown[isolated], "o", **dots)


def _curve_with_median(axes: Axes, run: Run, values: np.ndarray, name: str) -> None:
    """Draws each step as a thin line, and the running median over it.

    In a short run the median would be the curve itself, and hide it.
    """
    if len(_measured(run, values)[1]) < 2 * _curves.SMOOTH:
        label = f"{name}, each step{_last_value(values)}"
        draw_curve(axes, run, values, color=BLUE, lw=1.4, marker="o", ms=3, label=label)
        return
    draw_curve(
        axes, run, values, color=BLUE, alpha=0.4, lw=0.7, label=f"{name}, each step"
    )
    steps, shown = _measured(run, values)
    rows, level = _curves.running_median(shown)
    if np.isfinite(level).any():
        label = f"running median{_last_value(level)}"
        axes.plot(steps[rows], level, color=BLUE, lw=1.6, label=label)


def draw_loss(axes: Axes, run: Run) -> None:
    """Draws the training loss and the loss on held-out data."""
    loss = _curves.loss_of(run.train)
    every = run.held_out
    if loss is not None:
        _curve_with_median(axes, run, loss, "training")
        every = finite(loss)
    if np.isfinite(run.held_out).any():
        rows = _curves.marker_rows(np.isfinite(run.held_out), run.held_out)
        steps, values = run.held_out_steps[rows], run.held_out[rows]
        label = f"held out{_last_value(run.held_out)}"
        style = {"color": ORANGE, "mec": "white", "ms": 6, "label": label}
        axes.plot(steps, values, "o", zorder=3, **style)
    _axes.set_linear_scale(axes, _loss_range(every, run.held_out))
    if loss is not None:
        _axes.mark_off_scale(axes, run.train.columns["step"], finite(loss))
        _axes.mark_nonfinite(axes, run.train.columns["step"], loss)
    _draw_branches(axes, run)


def _loss_range(loss: np.ndarray, held_out: np.ndarray) -> tuple[float, float] | None:
    """The range of the axis: all but outliers, and every evaluation but the first."""
    shown = _curves.inner_range(loss)
    later = held_out[1:] if len(held_out) > 1 else held_out
    later = later[np.isfinite(later)]
    if shown is None or not len(later):
        return shown
    return min(shown[0], float(later.min())), max(shown[1], float(later.max()))


def _draw_branches(axes: Axes, run: Run) -> None:
    """Shades the steps of branches; marks rollbacks and failed probes."""
    branches = run.branches
    if branches is None or not branches.is_open.any():
        return
    steps, across = branches.steps, axes.get_xaxis_transform()
    count = branches.is_open.sum()
    axes.fill_between(
        *(steps, 0, 1),
        where=branches.is_open,
        step="post",
        transform=across,
        color=GREY,
        alpha=0.25,
        lw=0,
        label=f"branch, {count:,} {_axes.plural(count, 'step')}",
    )
    for name, flags, shape, fill in (
        ("failed probe", branches.failed_probes, "v", "white"),
        ("rollback", branches.rolled_back, "<", INK),
    ):
        count = flags.sum()
        if count:
            label = f"{count:,} {_axes.plural(count, name)}"
            height = np.full(count, 0.04)
            style = {"color": INK, "mfc": fill, "ms": 6, "label": label}
            axes.plot(steps[flags], height, shape, transform=across, **style)


def _limit(run: Run, *names: str) -> np.ndarray | None:
    """A limit, NaN where none is set (0 or ∞); None if it was never set."""
    limit = column(run.train, *names)
    if limit is None:
        return None
    limit = np.where(limit > 0, finite(limit), np.nan)
    return limit if np.isfinite(limit).any() else None


def draw_norm(axes: Axes, run: Run) -> None:
    """Draws the gradient norm, its limits, and clipped and skipped steps."""
    steps, norm = run.train.columns["step"], _curves.norm_of(run.train)
    limit = _limit(run, "clip/limit")
    skip_limit = _limit(run, "skip/norm_limit")
    norm = np.full(len(steps), np.nan) if norm is None else norm
    draw_curve(axes, run, norm, color=BLUE, lw=0.8, label=f"norm{_last_value(norm)}")
    if limit is not None:
        draw_curve(axes, run, limit, color=INK, lw=1.0, label="clip limit")
    if skip_limit is not None:
        style = {"color": INK, "lw": 0.9, "ls": (0, (4, 2))}
        draw_curve(axes, run, skip_limit, label="skip limit", **style)
    skipped = column(run.train, "skip/skipped")
    skipped = np.zeros(len(steps), bool) if skipped is None else skipped == 1
    lines = [each for each in (norm, limit, skip_limit) if each is not None]
    _axes.set_log_scale(axes, np.concatenate(lines))
    if limit is not None:
        _draw_clipped(axes, steps, norm, (norm > limit) & ~skipped)
    _draw_skipped(axes, steps, norm, skipped)
    _axes.mark_nonfinite(axes, steps, norm)
    _axes.mark_zeros(axes, steps, norm)


def _draw_clipped(
    axes: Axes, steps: np.ndarray, norm: np.ndarray, clipped: np.ndarray
) -> None:
    if not clipped.any():
        return
    rows = _curves.marker_rows(clipped, norm)
    label = f"clipped, {clipped.sum():,} {_axes.plural(clipped.sum(), 'step')}"
    size = 3.5 if len(rows) < 150 else 2.2
    style = {"color": ORANGE, "ms": size, "mec": INK, "mew": size / 10}
    axes.plot(steps[rows], finite(norm)[rows], "o", label=label, **style)


def _draw_skipped(
    axes: Axes, steps: np.ndarray, norm: np.ndarray, skipped: np.ndarray
) -> None:
    if not skipped.any():
        return
    rows = _curves.marker_rows(skipped, norm)
    top = axes.get_ylim()[1]
    height = np.where(np.isfinite(norm) & (norm > 0), norm, top)[rows]
    label = f"skipped, {skipped.sum():,} {_axes.plural(skipped.sum(), 'step')}"
    style = {"color": INK, "ms": 6, "mew": 1.3, "clip_on": False, "zorder": 4}
    axes.plot(steps[rows], height, "x", label=label, **style)


def draw_noise(axes: Axes, run: Run) -> None:
    """Draws the noise scale with its confidence interval, and the batch size."""
    steps = run.train.columns["step"]
    none = np.full(len(steps), np.nan)
    found = [
        column(run.train, f"noise_scale/{name}")
        for name in ("b_simple", "low", "high", "batch_size")
    ]
    scale, low, high, batch = (none if each is None else each for each in found)
    known = scale > 0  # 0 or NaN is not known.
    bounded = ~(known & np.isfinite(scale)) & (low > 0)
    # Inf makes a gap in a line, for the steps of the other line; NaN makes no gap.
    bound = np.where(bounded, low, np.where(known, np.inf, np.nan))
    scale = np.where(bounded, np.inf, np.where(known, scale, np.nan))
    batch = np.where(batch > 0, batch, np.nan)
    _axes.set_log_scale(axes, np.concatenate([scale, bound, batch, low]))
    _draw_interval(axes, steps, scale, low, high)
    label = f"noise scale{_last_value(scale)}"
    draw_curve(axes, run, scale, color=BLUE, lw=1.4, label=label)
    if np.isfinite(bound).any():
        style = {"color": BLUE, "lw": 1.6, "ls": (0, (1, 1.2))}
        draw_curve(axes, run, bound, label="noise scale, at least", **style)
    if np.isfinite(batch).any():
        label = f"batch size{_last_value(batch)}"
        draw_curve(axes, run, batch, color=INK, lw=1.0, ls=(0, (4, 2)), label=label)


def _draw_interval(
    axes: Axes, steps: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray
) -> None:
    known = np.flatnonzero(np.isfinite(scale) & (low >= 0) & (high > 0))
    rows = known[_curves.extreme_rows(finite(scale[known]))]
    bottom, top = axes.get_ylim()
    if len(rows):
        lower, upper = np.maximum(low[rows], bottom), np.minimum(high[rows], top)
        style = {"color": BLUE, "alpha": 0.18, "lw": 0, "label": "confidence interval"}
        axes.fill_between(steps[rows], lower, upper, **style)


def draw_update(axes: Axes, run: Run) -> None:
    """Draws the RMS of the update."""
    rms = column(run.train, "update/rms")
    if rms is not None:
        shown = np.where(rms > 0, rms, np.nan)
        draw_curve(axes, run, shown, color=BLUE, lw=1.3, label=f"RMS{_last_value(rms)}")
        _axes.set_log_scale(axes, rms)
        _axes.mark_nonfinite(axes, run.train.columns["step"], rms)


def draw_adam(axes: Axes, run: Run) -> None:
    """Draws the RMS of Adam's step before the learning rate."""
    rms = column(run.train, "adam/update_rms")
    if rms is not None:
        rms = np.where(rms > 0, rms, np.nan)
        draw_curve(axes, run, rms, color=BLUE, lw=1.3, label=f"RMS{_last_value(rms)}")
        independent = (1 - 0.9) / (1 + 0.9)
        level = np.full(len(rms), np.sqrt(independent))
        label = "independent gradients\n(0.229, at b1 = 0.9)"
        draw_curve(axes, run, level, color=INK, lw=0.9, ls=(0, (4, 2)), label=label)
        _axes.set_log_scale(axes, np.append(rms, level))


def draw_rate(axes: Axes, run: Run) -> None:
    """Draws the learning rate."""
    rate = column(run.train, "learning_rate")
    if rate is None:
        return
    steps, shown = _measured(run, rate)
    rows = _curves.extreme_rows(shown)
    axes.fill_between(steps[rows], shown[rows], color=GREY, alpha=0.3, lw=0)
    draw_curve(
        axes, run, rate, color=INK, lw=1.0, label=f"learning rate{_last_value(rate)}"
    )
    known = shown[np.isfinite(shown)]
    _axes.set_linear_scale(
        axes, (min(0.0, known.min()), known.max()) if len(known) else None
    )
