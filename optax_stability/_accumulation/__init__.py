"""Gradient accumulation across calls, and the learning rate that goes with it.

May import: ``_core``, ``_moments``.
"""
