"""Curves and histograms for TensorBoard, whatever happens to the disk or the run.

May import: ``_recording``.
"""

from optax_stability.tensorboard._log import TensorBoardLog

__all__ = ["TensorBoardLog"]
