"""Clipping: a gradient above a limit is scaled down to it.

May import: ``_core``, ``thresholds``.
"""
