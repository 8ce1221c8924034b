"""Gradient accumulation across calls, and the matching learning rate.

May import: ``_core``, ``_moments``.
"""
