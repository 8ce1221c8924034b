"""Loss spikes: detect an abnormal step, then skip it or continue on a branch.

May import: ``_core``, ``thresholds``.
"""
