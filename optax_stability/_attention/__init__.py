"""Attention logits: a bound from the weights, its recording, and a brake on them.

May import: ``_core``.
"""
