"""Gradients before the optimizer: penalty, scaling, norms of single examples.

May import: ``_core``.
"""
