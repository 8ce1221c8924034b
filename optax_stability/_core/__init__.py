"""What every room uses: norms, trees, checks of arguments, conditionals, meshes.

Imports no other room.
"""
