"""The panels of a picture of a run, in their order.

A panel is shown where one of its metrics was measured.
"""

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.axes import Axes

from optax_stability._report._drawing import _curve_panels, _curves, _heat_map
from optax_stability._report._drawing._curves import Run


class Panel(NamedTuple):
    """One panel.

    Attributes:
      name: short, for anchors.
      title: for people.
      note: how to read it, one or two sentences.
      metrics: it is shown where one of them was measured.
      height: inches, from the run.
      head: inches above the axes that it needs for itself.
      draw: draws it.
    """

    name: str
    title: str
    note: str
    metrics: tuple[str, ...]
    height: Callable[[Run], float]
    head: float
    draw: Callable[[Axes, Run], None]


PANELS = (
    Panel(
        "loss",
        "Loss",
        "Each step, the running median over a fortieth of the run, and held-out data.",
        ("loss", "skip/value", "eval/loss"),
        lambda run: 2.4,
        0.0,
        _curve_panels.draw_loss,
    ),
    Panel(
        "gradient",
        "Gradient norm",
        "Before clipping, on a logarithmic scale. What lies above the clip limit was "
        "shortened to it; a skipped step changed nothing.",
        ("grad/norm", "skip/norm", "clip/norm"),
        lambda run: 1.9,
        0.0,
        _curve_panels.draw_norm,
    ),
    Panel(
        "layers",
        "Gradient norm by layer",
        "Each layer against its own median over these steps, layers in the order of "
        "the model. Where several share a pixel, it shows the one furthest off.",
        ("grad/norm/", "clip/norm/"),
        lambda run: _heat_map.height(run.train),
        0.3,
        lambda axes, run: _heat_map.draw(axes, run.train),
    ),
    Panel(
        "noise",
        "Gradient noise scale",
        "Far below the batch size, a larger batch is wasted; far above it, a larger "
        "one would pay. A rule of thumb, not a measurement of the best batch.",
        ("noise_scale/b_simple", "noise_scale/low"),
        lambda run: 1.7,
        0.0,
        _curve_panels.draw_noise,
    ),
    Panel(
        "adam",
        "Adam's step before the learning rate",
        "1 where successive gradients always agree; below the dashed line where they "
        "seem to oppose one another.",
        ("adam/update_rms",),
        lambda run: 1.1,
        0.0,
        _curve_panels.draw_adam,
    ),
    Panel(
        "update",
        "Update",
        "Root mean square over all parameters of what is added to them.",
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
    """The panels whose metrics were measured."""
    return [each for each in PANELS if any(_known(run, key) for key in each.metrics)]


def _known(run: Run, key: str) -> bool:
    if key.endswith("/"):
        return _heat_map.measured(run.train)
    if key == "eval/loss":
        return bool(len(run.held_out))
    if key in ("loss", "skip/value"):
        return _curves.loss_of(run.train) is not None
    return run.train.first(key) is not None
