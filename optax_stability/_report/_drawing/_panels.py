"""The panels of a figure, in their order.

A panel is shown if at least one of its metrics was measured.
"""

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.axes import Axes

from optax_stability._report._drawing import (
    _curve_panels,
    _curves,
    _entry_panels,
    _heat_map,
)
from optax_stability._report._drawing._curves import Run


class Panel(NamedTuple):
    """One panel.

    Attributes:
      name: short name, for anchors.
      title: title on the page.
      note: how to read the panel, in one or two sentences.
      metrics: the panel is shown if one of them was measured.
      height: gives the height in inches for a run.
      head: extra space above the axes, in inches.
      draw: draws the panel.
      names_beside: whether names stand to the right of the axes.
    """

    name: str
    title: str
    note: str
    metrics: tuple[str, ...]
    height: Callable[[Run], float]
    head: float
    draw: Callable[[Axes, Run], None]
    names_beside: bool = False


PANELS = (
    Panel(
        "loss",
        "Loss",
        "Training loss of each step, its running median over a fortieth of the run, "
        "and loss on held-out data.",
        ("loss", "skip/value", "eval/loss"),
        lambda run: 2.4,
        0.0,
        _curve_panels.draw_loss,
    ),
    Panel(
        "gradient",
        "Gradient norm",
        "Before clipping, on a logarithmic scale. A gradient above the clip limit was "
        "scaled down to this limit; a skipped step changed nothing.",
        ("grad/norm", "skip/norm", "clip/norm"),
        lambda run: 1.9,
        0.0,
        _curve_panels.draw_norm,
    ),
    Panel(
        "layers",
        "Gradient norm by layer",
        "The norm of each layer relative to its median over these steps, with layers "
        "in the order of the model. If several values share a pixel, the one furthest "
        "from the median is shown.",
        ("grad/norm/", "clip/norm/"),
        lambda run: _heat_map.height(run.train),
        0.3,
        lambda axes, run: _heat_map.draw(axes, run.train),
        names_beside=True,
    ),
    Panel(
        "noise",
        "Gradient noise scale",
        "Of the model as it is at each step, with its interval. "
        "If the noise scale is far below the batch size, a larger batch is wasted; if "
        "it is far above, a larger batch would pay off. This is a rule of thumb, not a "
        "measurement of the best batch size.",
        ("noise_scale/b_simple", "noise_scale/low"),
        lambda run: 1.7,
        0.0,
        _curve_panels.draw_noise,
    ),
    Panel(
        "adam",
        "Adam's step before the learning rate",
        "1 if successive gradients always agree; below the dashed line if they seem to "
        "point in opposite directions.",
        ("adam/update_rms",),
        lambda run: 1.1,
        0.0,
        _curve_panels.draw_adam,
    ),
    Panel(
        "attention",
        "Attention logits",
        "The highest and the lowest of all heads. Above the dashed line a head may see "
        "one token alone. A bound, from the weights, is several times the largest "
        "logit.",
        tuple(_entry_panels.LEVELS),
        lambda run: 1.3,
        0.0,
        _entry_panels.draw_attention,
    ),
    Panel(
        "update",
        "Update",
        "Root mean square of the update over all parameters.",
        ("update/rms",),
        lambda run: 1.1,
        0.0,
        _curve_panels.draw_update,
    ),
    Panel(
        "rate",
        "Learning rate",
        "",
        ("learning_rate",),
        lambda run: 0.9,
        0.0,
        _curve_panels.draw_rate,
    ),
)


def shown(run: Run) -> list[Panel]:
    """The panels whose metrics were measured, and one for each extra of the user."""
    known = [each for each in PANELS if any(_known(run, key) for key in each.metrics)]
    return known + [_extra_panel(name) for name in _entry_panels.extras(run.train)]


def _extra_panel(name: str) -> Panel:
    """The panel of a metric of ``record_extra``."""
    title = name.removeprefix(_entry_panels.EXTRA)
    draw = _entry_panels.drawer(name)
    return Panel(name, title, "", (name,), lambda run: 1.1, 0.0, draw)


def _known(run: Run, key: str) -> bool:
    if key.endswith("/"):
        return _heat_map.has_layers(run.train)
    if key == "eval/loss":
        return bool(len(run.held_out))
    if key in ("loss", "skip/value"):
        return _curves.loss_of(run.train) is not None
    if key in _entry_panels.LEVELS:
        return bool(_entry_panels.curves_of(run.train, key))
    return run.train.first(key) is not None
