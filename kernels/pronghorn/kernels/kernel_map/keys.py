"""Places within a box, and whether a table of all of them is smaller than one of those that are taken."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

GRID, HASH = "grid", "hash"
MOST_DIMENSIONS = 5
MOST_PLACES = 1 << 62  # what an int64 counts
MOST_IN_GRID = 1 << 31
# A grid is cleared before it is filled, a hash table probed more than once. So many places are cleared as fast.
ALWAYS_GRID, GRID_FOR_EACH_ROW = 1 << 20, 64


@dataclass(frozen=True)
class Box:
    """Bounds of coordinates, both inclusive.

    Attributes:
        lower: the least of each dimension.
        upper: the largest.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]

    @classmethod
    def of(cls, bounds: Tensor) -> Box:
        """From int64 [2, dimensions].

        Raises:
            ValueError: there are more places than an int64 counts.
        """
        lower, upper = bounds.tolist()
        box = _box(tuple(lower), tuple(upper))
        if box.places > MOST_PLACES:
            raise ValueError(f"bounds: {box.lower} to {box.upper} hold more than 2^62 places; coordinates overflow")
        return box

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Places of each dimension."""
        return tuple(max(0, high - low + 1) for low, high in zip(self.lower, self.upper, strict=True))

    @functools.cached_property
    def places(self) -> int:
        """Places in all."""
        return math.prod(self.sizes)

    @functools.cached_property
    def steps(self) -> tuple[int, ...]:
        """How many places are between neighbours of each dimension; the last dimension's lie side by side."""
        sizes = self.sizes
        return tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))

    @functools.cached_property
    def numbers(self) -> tuple[int, ...]:
        """Lower ends, sizes and steps, as many of each as there may be dimensions."""
        return (*padded(self.lower, 0), *padded(self.sizes, 1), *padded(self.steps, 0))


@functools.lru_cache(maxsize=1024)
def _box(lower: tuple[int, ...], upper: tuple[int, ...]) -> Box:
    return Box(lower, upper)


def padded(numbers: Sequence[int], fill: int) -> list[int]:
    """As many as there may be dimensions."""
    return [*numbers, *[fill] * (MOST_DIMENSIONS - len(numbers))]


def choose_table(box: Box, coords: Tensor, asked: str) -> str:
    """What coordinates are looked up in."""
    if asked == GRID and box.places > MOST_IN_GRID:
        raise ValueError(f"table: a grid of {box.places} places was asked for, the largest is {MOST_IN_GRID}")
    fits = box.places <= max(ALWAYS_GRID, min(MOST_IN_GRID, GRID_FOR_EACH_ROW * coords.shape[0]))
    return asked or (GRID if fits else HASH)
