"""Adam without ε: the update, its state, and the restart of its moments.

May import: ``_core``, ``thresholds``, ``_moments``.
"""
