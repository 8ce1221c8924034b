"""Checking: reads a chain on the host, and says what stands where it cannot work.

Imports no other package.
"""
