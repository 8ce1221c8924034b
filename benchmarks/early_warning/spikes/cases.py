"""What a spike is, and which runs are its controls."""

from typing import NamedTuple

import jax
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from optax_stability import thresholds

# A spike has 40 quiet steps before it, and nobody is asked before the thresholds and
# the windows of 32 are full. A control is quiet for another 30 steps.
QUIET, BEFORE, FIRST = 40, 30, 64


@jax.jit
@jax.vmap
def abnormal_steps(loss: jax.Array) -> jax.Array:
    """Whether each loss is far above its trend, bool[steps]."""
    threshold = thresholds.detrended_mad(6.0, floor=0.5, log=False)

    def step(state, x):
        limit, state = threshold.update(x, state)
        return state, ~(x <= limit)

    return jax.lax.scan(step, threshold.init(), loss)[1]


def spiking_steps(abnormal: np.ndarray) -> np.ndarray:
    """The abnormal steps with another one within four steps, bool[..., steps].

    One hard batch is not a spike.
    """
    padded = np.pad(abnormal, [(0, 0)] * (abnormal.ndim - 1) + [(4, 4)])
    return abnormal & (sliding_window_view(padded, 9, axis=-1).sum(axis=-1) > 1)


def onsets(spiking: np.ndarray) -> list[int]:
    """The first step of each spike of one run, from bool[steps]."""
    return [
        int(t)
        for t in np.flatnonzero(spiking)
        if t >= FIRST and not spiking[t - QUIET : t].any()
    ]


def quiet_steps(spiking: np.ndarray) -> np.ndarray:
    """Steps far enough behind one spike and ahead of the next, bool[steps]."""
    near = np.zeros(len(spiking), bool)
    for t in np.flatnonzero(spiking):
        near[max(t - BEFORE, 0) : t + QUIET + 1] = True
    near[:FIRST] = True
    return ~near


class Case(NamedTuple):
    """A spike and its controls.

    Attributes:
      group: which setting.
      run: which of its runs.
      step: at which step.
      controls: other runs of the setting, quiet at this step.
    """

    group: str
    run: int
    step: int
    controls: list[int]


def cases_of(group: str, spiking: np.ndarray) -> list[Case]:
    """The spikes of one setting that have controls, from ``spiking[runs, steps]``."""
    quiet = np.array([quiet_steps(row) for row in spiking])
    return [
        Case(
            group, run, t, [i for i in np.flatnonzero(quiet[:, t]).tolist() if i != run]
        )
        for run, row in enumerate(spiking)
        for t in onsets(row)
        if quiet[:, t].any()
    ]


def is_clean(case: Case, abnormal: np.ndarray) -> bool:
    """Whether not a single loss was abnormal before the spike, in [runs, steps]."""
    return not abnormal[case.run, case.step - QUIET : case.step].any()
