"""Restarts a run: from a checkpoint before a divergence, or from another state.

May import: ``_core``.
"""
