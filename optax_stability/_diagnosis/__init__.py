"""Findings from a history: what is wrong, since when, where, what to do.

Imports no other room; runs on the host with NumPy alone.
"""
