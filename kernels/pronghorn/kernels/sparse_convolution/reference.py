"""Definition of sparse convolution and of its weight's gradient: offset by offset, gather, multiply, add."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast
from pronghorn.kernels.sparse_convolution.epilogue import Epilogue
from pronghorn.kernels.sparse_convolution.tiles import is_sorted


def pairs(tables: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each offset the input rows, and the output rows that they go to."""
    kernel_map, *order = tables if is_sorted(tables) else tables[:1]
    offsets_of_split = order[1].shape[2] if order else 1
    for k, rows in enumerate(kernel_map):
        at = (rows >= 0).nonzero()[:, 0]
        yield rows[at], order[0][k // offsets_of_split][at] if order else at


@without_autocast
def sparse_convolution(x: Tensor, weight: Tensor, tables: Sequence[Tensor], epilogue: Epilogue | None = None) -> Tensor:
    """[outputs, output channels]; in float32 or better, and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(tables[0].shape[1], weight.shape[2], dtype=wide, device=x.device)
    inputs, weight = x.to(wide), weight.to(wide)
    for k, (rows, to) in enumerate(pairs(tables)):
        if len(rows):
            out.index_add_(0, to, inputs[rows] @ weight[k])
    return (out if epilogue is None else epilogue(out)).to(x.dtype)


@without_autocast
def weight_gradient(x: Tensor, grad: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """[kernel volume, input channels, output channels]; in float32 or better, and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    result = [x[rows].to(wide).T @ grad[to].to(wide) for rows, to in pairs(tables)]
    return torch.stack(result).to(x.dtype)
