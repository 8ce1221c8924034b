"""Figures of a history, for :func:`plot_history` and :func:`write_report`.

Importing a module of this package, other than ``_curves``, imports matplotlib.
"""
