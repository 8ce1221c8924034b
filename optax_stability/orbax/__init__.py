"""Checkpoints through Orbax that damage, full disks and kills cannot take away.

May import: ``_core``, ``_recovery``.
"""

from optax_stability.orbax._checkpoints import Checkpoints
from optax_stability.orbax._selection import select_checkpoints

__all__ = ["Checkpoints", "select_checkpoints"]
