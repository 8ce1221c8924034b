"""Findings from a history: what is wrong, since when, where, what to do.

Imports no other package; runs on the host with NumPy only.
"""
