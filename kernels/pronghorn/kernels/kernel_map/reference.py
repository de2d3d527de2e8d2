"""Definition of kernel maps: every offset's coordinates are looked up among the input's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pronghorn.kernels.kernel_map.keys import GRID, Box


def kernel_map(
    coords: Tensor, out_coords: Tensor, offsets: Tensor, stride: list[int], box: Box, table: str, own: int
) -> Tensor:
    """int32 [kernel volume, outputs]."""
    keys, inside = places(coords, box)
    rows = torch.arange(len(keys), device=keys.device)[inside]
    find = _grid(keys[inside], rows, box) if table == GRID else _sorted(keys[inside], rows)
    scaled = out_coords.long() * torch.tensor(stride, device=coords.device)
    found = []
    for k, offset in enumerate(offsets.long()):
        wanted, there = places(scaled + offset, box)
        row = torch.arange(len(wanted), device=wanted.device) if k == own else find(torch.where(there, wanted, 0))
        found.append(torch.where(there, row, -1))
    return torch.stack(found).int() if found else offsets.new_empty(0, len(out_coords))


def places(coords: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """Number of each row's place, int64 [rows], and whether it is one of the box."""
    shifted = coords.long() - torch.tensor(box.lower, device=coords.device)
    inside = ((shifted >= 0) & (shifted < torch.tensor(box.sizes, device=coords.device))).all(dim=1)
    return (shifted * torch.tensor(box.steps, device=coords.device)).sum(dim=1), inside


def _grid(keys: Tensor, rows: Tensor, box: Box) -> Callable[[Tensor], Tensor]:
    # int32 where rows fit: half the memory to clear.
    grid = torch.full((box.places,), -1, dtype=torch.int32, device=keys.device)
    grid.scatter_reduce_(0, keys, rows.int(), "amax")
    return lambda wanted: grid[wanted].long()


def _sorted(keys: Tensor, rows: Tensor) -> Callable[[Tensor], Tensor]:
    keys, order = keys.sort(stable=True)
    rows = rows[order]

    def find(wanted: Tensor) -> Tensor:
        at = torch.searchsorted(keys, wanted, right=True) - 1  # the last of equal ones
        at = at.clamp_min(0)
        return torch.where(keys[at] == wanted, rows[at], -1) if len(keys) else torch.full_like(wanted, -1)

    return find
