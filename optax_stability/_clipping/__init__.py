"""Clipping: scales gradients above a limit down to the limit.

May import: ``_core``, ``thresholds``.
"""
