"""Measurements of gradients, updates and parameters, and their history.

May import: ``_core``.
"""
