"""Definition of fetch-on-demand and of its weight's gradient: offset by offset, gather, multiply, scale, add."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast


def offsets(starts: Tensor) -> Iterator[tuple[int, slice]]:
    """Each offset that has pairs, and where they stand."""
    for k, (start, end) in enumerate(pairwise(starts.tolist())):
        if end > start:
            yield k, slice(start, end)


@without_autocast
def fetch_on_demand(
    x: Tensor, weight: Tensor, sources: Tensor, targets: Tensor, starts: Tensor, scale: Tensor | None, outputs: int
) -> Tensor:
    """[outputs, output channels]; in float32 or better, and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(outputs, weight.shape[2], dtype=wide, device=x.device)
    for k, at in offsets(starts):
        product = x[sources[at]].to(wide) @ weight[k].to(wide)
        out.index_add_(0, targets[at], product if scale is None else product * scale[at, None])
    return out.to(x.dtype)


@without_autocast
def weight_gradient(
    x: Tensor, grad: Tensor, sources: Tensor, targets: Tensor, starts: Tensor, scale: Tensor | None
) -> Tensor:
    """[offsets, input channels, output channels]; in float32 or better, and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(len(starts) - 1, x.shape[1], grad.shape[1], dtype=wide, device=x.device)
    for k, at in offsets(starts):
        rows = x[sources[at]].to(wide)
        out[k] = (rows if scale is None else rows * scale[at, None]).T @ grad[targets[at]].to(wide)
    return out.to(x.dtype)
