"""Loss spikes: detect an abnormal step, then skip it or go on as a branch.

May import: ``_core``, ``thresholds``.
"""
