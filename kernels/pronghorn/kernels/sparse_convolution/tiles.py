"""Sizes that sorting and the kernels agree on."""

TILE = 128  # outputs that pass over an offset together
MOST_BITS = 32  # offsets of a split
