"""Reads a history as a physician would: what is wrong, since when, where, what helps.

*Problem*: hundreds of curves are recorded, and the one that shows the cause is not the
one that somebody looks at.

*Where*: on the host, after a crash or every few hundred steps. NumPy only.

*Cost*: milliseconds for the global curves, seconds for a thousand leaves.

One file holds one group of rules; every number they compare with is in ``_thresholds``.
"""

from optax_stability._diagnosis._diagnose import diagnose as diagnose
from optax_stability._diagnosis._finding import Finding as Finding
