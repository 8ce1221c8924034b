"""Faults on purpose: a rehearsal, before a long run, of what must not end it.

Imports no other package.
"""

from optax_stability.faults._fault import Fault, parse_faults
from optax_stability.faults._gradient import scale_by_surge, with_gradient_factor
from optax_stability.faults._injection import FaultInjector

__all__ = [
    "Fault",
    "FaultInjector",
    "parse_faults",
    "scale_by_surge",
    "with_gradient_factor",
]
