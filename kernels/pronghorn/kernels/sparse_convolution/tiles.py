"""What sorting and the kernels agree on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

TILE = 128  # outputs that pass over an offset together
MOST_BITS = 32  # offsets of a split


def is_sorted(tables: Sequence[Tensor]) -> bool:
    """Whether these are the four parts of a sorted map; they are one of a plain map, and two of a counted one."""
    return len(tables) == 4
