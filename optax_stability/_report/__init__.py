"""Plots of a history, and a report as one HTML page.

May import: ``_core``, ``_diagnosis``; matplotlib only when it draws.
"""
