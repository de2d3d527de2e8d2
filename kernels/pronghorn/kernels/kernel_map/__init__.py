"""Kernel maps of sparse convolution: which input row each output site multiplies with each weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.kernel_map import reference
from pronghorn.kernels.kernel_map.keys import GRID, HASH, MOST_DIMENSIONS, Box, choose_table

__all__ = ["GRID", "HASH", "kernel_map"]


def kernel_map(
    coords: Tensor, out_coords: Tensor, offsets: Tensor, *, stride: Sequence[int], bounds: Tensor, table: str = "",
    own: int = -1,
) -> Tensor:  # fmt: skip
    """Row of the input that output site o finds at offset k: coords[row] = out_coords[o] * stride + offsets[k].

    Of rows with equal coordinates the last one is found.

    Args:
        coords: int32 [inputs, dimensions], the batch index first; up to 5 dimensions.
        out_coords: int32 [outputs, dimensions].
        offsets: int32 [kernel volume, dimensions]; zero for the batch index.
        stride: of each dimension; 1 for the batch index.
        bounds: int64 [2, dimensions] on the CPU, the least and the largest `coords` there may be; what lies outside is
            not found.
        table: what coordinates are looked up in: "grid", one entry for each place within the bounds, or "hash"; by
            default what is faster.
        own: the offset at which an output within the bounds finds the input of its own row, whatever is there; -1 for
            none.

    Returns:
        int32 [kernel volume, outputs], -1 where there is no such row.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or the bounds hold more than 2^62
            places, or a grid of more than 2^31.

    Source: Tang et al. (MICRO 2023), section 2; Choy et al. (arXiv 1904.08755).
    """
    check_tensor("coords", coords, dim=2)
    _check_integers("coords", coords)
    dimensions = coords.shape[1]
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"coords: got {dimensions} columns, accepted are 1 to {MOST_DIMENSIONS}")
    for name, tensor in (("out_coords", out_coords), ("offsets", offsets)):
        check_tensor(name, tensor, dim=2, like=coords)
        _check_integers(name, tensor)
        check_shape(name, tensor, (tensor.shape[0], dimensions))
    check_tensor("bounds", bounds)
    check_shape("bounds", bounds, (2, dimensions))
    if bounds.dtype != torch.int64 or bounds.device.type != "cpu":
        raise TypeError(f"bounds: got {bounds.dtype} on {bounds.device}, wanted torch.int64 on the CPU")
    if len(stride) != dimensions or min(stride) < 1:
        raise ValueError(f"stride: got {list(stride)}, wanted {dimensions} positive numbers")
    if table not in ("", GRID, HASH):
        raise ValueError(f"table: got {table!r}, accepted are {GRID!r} and {HASH!r}")
    result: Tensor = _operation(coords, out_coords, offsets, list(stride), bounds, table, own)
    return result


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name}: got {tensor.dtype}, wanted torch.int32")


def _kernel_map(
    coords: Tensor, out_coords: Tensor, offsets: Tensor, stride: list[int], bounds: Tensor, table: str, own: int
) -> Tensor:
    if not coords.shape[0] or not out_coords.shape[0]:
        return offsets.new_full((offsets.shape[0], out_coords.shape[0]), -1)
    box = Box.of(bounds)
    table = choose_table(box, coords, table)
    if use_triton("kernel_map", coords):
        from pronghorn.kernels.kernel_map import triton

        return triton.kernel_map(coords, out_coords, offsets, stride, box, table, own)
    return reference.kernel_map(coords, out_coords, offsets, stride, box, table, own)


_operation = define(
    "kernel_map", _kernel_map,
    lambda coords, out_coords, offsets, *_: offsets.new_empty((offsets.shape[0], out_coords.shape[0])),
)  # fmt: skip
