"""Shared helpers: norms, trees, argument checks, conditionals, meshes.

Imports no other package.
"""
