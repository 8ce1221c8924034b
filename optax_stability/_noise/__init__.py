"""The gradient noise scale: estimated, read, and acted upon.

May import: ``_core``, ``_moments``.
"""
