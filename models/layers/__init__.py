"""Layers that the families share, and the stack of them.

Letters for shapes: B batch, L length, E model width, H heads, D head size, F feed-forward width, V vocabulary,
N layers.
"""
