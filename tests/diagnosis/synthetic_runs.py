"""Runs as logs show them: healthy ones of many kinds, and faults put into them.

Nothing here is tuned: shapes, noise, lengths and logging intervals are drawn at random.
"""

from typing import NamedTuple

import numpy as np

INTERVALS = (1, 5, 10, 50)


class Made(NamedTuple):
    """A run, by row.

    Attributes:
      history: what ``diagnose`` reads.
      fault: the row from which on the fault shows; the number of rows if there is none.
    """

    history: dict[str, np.ndarray]
    fault: int


def _correlated(rng, count, memory):
    """Noise of variance 1 that forgets by ``1 − memory`` per row."""
    noise = rng.standard_normal(count)
    if not memory:
        return noise
    scale = (1 - memory**2) ** 0.5
    found = np.empty(count)
    last = noise[0]
    for i, each in enumerate(noise):
        last = memory * last + scale * each
        found[i] = last
    return found


def _tails(rng, count):
    """Noise of variance about 1, with the tails of a t distribution with 5 degrees."""
    return rng.standard_t(5, count) / (5 / 3) ** 0.5


def calm(seed):
    """A healthy run without outliers."""
    return healthy(seed, tails=False)


def healthy(seed, rows=None, tails=True):
    """A run in which nothing is wrong; with tails, some values are far out."""
    rng = np.random.default_rng(seed)
    rows = rows or int(rng.choice([20, 35, 60, 150, 400, 1200]))
    every = int(rng.choice(INTERVALS))
    step = every * np.arange(1, rows + 1)
    kind = rng.choice(["pretraining", "fine-tuning", "regression", "sum"])
    end = step[-1]
    if kind == "pretraining":
        top = rng.uniform(4, 11)
        low = rng.uniform(0.15, 0.6) * top
        speed = end * rng.uniform(0.005, 0.2)
        loss = low + (top - low) * (1 + step / speed) ** -rng.uniform(0.4, 1.2)
        noise = rng.uniform(0.005, 0.12)
    elif kind == "fine-tuning":
        top = rng.uniform(0.8, 3.0)
        low = top * rng.uniform(0.4, 0.8)
        loss = low + (top - low) * np.exp(-step / (end * rng.uniform(0.05, 0.4)))
        noise = rng.uniform(0.02, 0.15) * low
    elif kind == "regression":
        top = 10 ** rng.uniform(-1.5, 0.5)
        loss = top * (1 + step / (0.05 * end)) ** -rng.uniform(0.3, 1.5)
        noise = rng.uniform(0.02, 0.15) * loss
    else:
        top = rng.uniform(50, 500)
        loss = top * (0.5 + 0.5 * np.exp(-step / (0.3 * end)))
        noise = rng.uniform(0.005, 0.03) * top
    shape = rng.choice(["normal", "tails", "correlated"])
    if shape == "normal":
        draw = rng.standard_normal(rows)
    elif shape == "tails":
        draw = _tails(rng, rows) if tails else rng.standard_normal(rows)
    else:
        draw = _correlated(rng, rows, rng.uniform(0.2, 0.8))
    # Smaller noise in means over many steps, at times.
    noise = noise * (every**-0.25 if rng.random() < 0.5 else 1.0)
    loss = loss + noise * draw
    level = 10 ** rng.uniform(-1, 1)
    norm = level * (1 + rng.uniform(0, 5) * np.exp(-step / (0.05 * end + 20)))
    norm = norm * (step / end + 0.05) ** rng.uniform(-0.3, 0.3)
    scatter = _tails(rng, rows) if tails else rng.standard_normal(rows)
    norm = norm * np.exp(rng.uniform(0.05, 0.35) * scatter)
    warmup = rng.uniform(0.01, 0.1) * end
    rate = 10 ** rng.uniform(-5, -2) * np.minimum(1, step / warmup)
    if rng.random() < 0.7:
        rate = rate * (0.55 + 0.45 * np.cos(np.pi * step / end))
    history = {"step": step, "loss": loss, "grad/norm": norm}
    if rng.random() < 0.7:
        history["learning_rate"] = rate
    return Made(history, rows)


def _place(rng, rows):
    """A row for a fault: anywhere but in the last sixth, the first rows included."""
    return int(rng.integers(3, max(4, rows - max(6, rows // 6))))


def _in_nats(seed, rows=None):
    """A healthy run whose loss is in nats, so that a nat is a nat."""
    for each in range(seed * 100, seed * 100 + 100):
        made = healthy(each, rows)
        if 0.7 < made.history["loss"][0] < 12:
            return made
    raise AssertionError(seed)


def diverged(seed):
    """From some row on, two nats or more above what it was."""
    rng = np.random.default_rng(seed)
    history, rows = _in_nats(seed)
    at = _place(rng, rows)
    rise = rng.uniform(2, 8) + history["loss"][at - 1] * 0.6
    onset = int(rng.integers(1, 4))
    ramp = np.minimum(np.arange(1, rows - at + 1) / onset, 1)
    after = history["loss"][at - 1] + rise * ramp
    after = after + 0.1 * rng.standard_normal(rows - at)
    after = after - rng.uniform(0, 0.3) * rise * np.linspace(0, 1, rows - at)
    history["loss"][at:] = after
    history["grad/norm"][at:] *= rng.uniform(1, 30)
    return Made(history, at)


def spiked(seed):
    """One to three rows far above."""
    rng = np.random.default_rng(seed)
    history, rows = _in_nats(seed)
    at = int(rng.integers(min(24, rows - 4), rows - 3))
    length = int(rng.integers(1, 4))
    history["loss"][at : at + length] += rng.uniform(3, 6)
    return Made(history, at)


def exploded(seed):
    """The norm grows by and by, a thousandfold or more, until the end."""
    rng = np.random.default_rng(seed)
    history, rows = healthy(seed, int(rng.choice([60, 150, 400, 1200])))
    at = int(rng.integers(rows // 8, rows // 2))
    factor = 10 ** rng.uniform(3, 5)
    history["grad/norm"][at:] *= np.geomspace(1, factor, rows - at)
    return Made({"step": history["step"], "grad/norm": history["grad/norm"]}, at)


def vanished(seed):
    """The norm falls by and by, to a hundred-thousandth, and the loss stands still."""
    rng = np.random.default_rng(seed)
    history, rows = healthy(seed, int(rng.choice([150, 400, 1200])))
    at = int(rng.integers(rows // 2, 2 * rows // 3))
    factor = 10 ** -rng.uniform(5, 8)
    history["grad/norm"][at:] *= np.geomspace(1, factor, rows - at)
    history["loss"][at:] = np.median(
        history["loss"][at - 20 : at]
    ) + 0.01 * rng.standard_normal(rows - at)
    return Made(history, at)


def broken(seed):
    """NaN for good from some row on, the first included, in one series or in both."""
    rng = np.random.default_rng(seed)
    history, rows = healthy(seed)
    at = int(rng.choice([0, 1, 2, 5, rows // 2]))
    at = min(at, rows - 17)
    which = [("loss", "grad/norm"), ("loss",), ("grad/norm",)][rng.integers(3)]
    for key in which:
        history[key][max(at, 0) :] = np.nan
    return Made(history, max(at, 0))


def rateless(seed):
    """A learning rate of 0, so that the loss does not fall."""
    rng = np.random.default_rng(seed)
    history, rows = healthy(seed)
    history["loss"] = 1.5 + 0.1 * rng.standard_normal(rows)
    history["learning_rate"] = np.zeros(rows)
    return Made(history, 0)


def stuck(seed):
    """Exactly the same loss in the second half."""
    rng = np.random.default_rng(seed)
    history, rows = healthy(seed, int(rng.choice([60, 150, 400])))
    history["loss"][rows // 2 :] = rng.choice([0.0, 1.7, history["loss"][rows // 2]])
    return Made(history, rows // 2)


def overfitted(seed):
    """A held-out loss that turns around while the training loss falls."""
    rng = np.random.default_rng(seed)
    rows, evaluations = int(rng.choice([60, 150, 400])), int(rng.choice([5, 8, 20]))
    step = int(rng.choice(INTERVALS)) * np.arange(1, rows + 1)
    loss = 0.1 + 2 * np.exp(-3 * np.arange(rows) / rows)
    loss = loss * np.exp(0.03 * rng.standard_normal(rows))
    held_out = np.full(rows, np.nan)
    at = np.linspace(rows / evaluations, rows, evaluations).astype(int) - 1
    turn = rng.uniform(0.3, 0.6)
    curve = 1.5 + 1.5 * (at / rows - turn) ** 2 / max(turn, 1 - turn) ** 2
    held_out[at] = curve + 0.003 * rng.standard_normal(evaluations)
    return Made({"step": step, "loss": loss, "eval/loss": held_out}, int(turn * rows))


def with_held_out(seed):
    """A healthy run with a held-out loss that follows the training loss."""
    rng = np.random.default_rng(seed)
    history, rows = _in_nats(seed)
    at = np.linspace(rows / 10, rows, 10).astype(int) - 1
    smooth = np.minimum.accumulate(history["loss"])
    history["eval/loss"] = np.full(rows, np.nan)
    history["eval/loss"][at] = (smooth[at] + 0.1) * (
        1 + 0.003 * rng.standard_normal(10)
    )
    return Made(history, rows)


# Fault → kinds of which one at least must be found.
FAULTS = {
    diverged: {"divergence"},
    spiked: {"loss_spike", "divergence"},
    exploded: {"exploding_gradient"},
    vanished: {"vanishing_gradient"},
    broken: {"nonfinite"},
    rateless: {"learning_rate_zero"},
    stuck: {"loss_stuck"},
    overfitted: {"overfitting"},
}
