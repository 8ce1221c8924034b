"""Statistics of microbatch gradients, and the function that computes them.

May import: ``_core``.
"""
