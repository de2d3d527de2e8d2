"""Definition of strided sites: every input asks which sites it reaches."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.kernel_map.keys import Box
from pronghorn.kernels.kernel_map.reference import places

MOST_MARKS = 1 << 28  # bytes; of more places, those that are taken are sorted


def strided_coords(coords: Tensor, offsets: Tensor, stride: list[int], box: Box) -> Tensor:
    """int32 [outputs, dimensions], in lexicographic order."""
    steps = torch.tensor(stride, device=coords.device)
    reached = []
    for offset in offsets.long():
        moved = coords.long() - offset
        site = moved.div(steps, rounding_mode="floor")
        place, inside = places(site, box)
        reached.append(place[inside & (moved == site * steps).all(dim=1)])
    return sites(torch.cat(reached).unique() if reached else coords.new_empty(0).long(), box)


def sites(place: Tensor, box: Box) -> Tensor:
    """Coordinates of places, int32 [places, dimensions]."""
    columns = [
        place.div(step, rounding_mode="floor").remainder(size) + low
        for step, size, low in zip(box.steps, box.sizes, box.lower, strict=True)
    ]
    return torch.stack(columns, dim=1).int()
