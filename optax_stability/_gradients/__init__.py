"""Gradient penalty, gradient scaling and per-example gradient norms.

May import: ``_core``.
"""
