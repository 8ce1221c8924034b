"""The gradient noise scale: estimation, reading, and transformations that use it.

May import: ``_core``, ``_moments``.
"""
