"""A batch that is too small for the noise of its gradient."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._windows import sustained


def noise_too_high(history: History) -> Finding | None:
    """A noise scale whose lower confidence bound is far above the batch size."""
    later = np.arange(history.length) >= history.settled_row()
    for low in history.find_all("noise_scale/low"):
        batch = history.columns.get(low.key.replace("low", "batch_size"))
        if batch is None:
            continue
        ratio = low.values / np.where(batch > 0, batch, np.nan)
        high = (ratio > limits.NOISE_RATIO) & later & np.isfinite(ratio)
        row = sustained(
            high, history.measured(low.key, "noise_scale/low"), limits.NOISE_ROWS
        )
        if row is None:
            continue
        evidence = (
            f"noise scale at least {low.values[row]:.3g}, batch size {batch[row]:.3g}: "
            f"×{ratio[row]:.3g}, limit ×{limits.NOISE_RATIO:.0f} for "
            f"{limits.NOISE_ROWS} steps; a step makes {1 / (1 + ratio[row]):.1%} of "
            "the progress of a step without noise"
        )
        return finding("noise_too_high", history, row, low.key, None, evidence)
    return None
