"""Output sites of a strided sparse convolution, and bounds of coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.kernel_map.keys import Box
from pronghorn.kernels.strided_coords import reference

__all__ = ["coords_bounds", "strided_coords", "strided_coords_within"]


def coords_bounds(coords: Tensor) -> Tensor:
    """Least and largest coordinates; waits for the GPU.

    Args:
        coords: int32 [rows, dimensions].

    Returns:
        int64 [2, dimensions] on the CPU; of no rows, bounds that hold nothing: 0 and -1.

    Raises:
        ValueError, TypeError: not such a tensor.
    """
    check_tensor("coords", coords, dim=2)
    if coords.dtype != torch.int32:
        raise TypeError(f"coords: got {coords.dtype}, wanted torch.int32")
    result: Tensor = _coords_bounds_operation(coords)
    return result


def strided_coords(coords: Tensor, offsets: Tensor, *, stride: Sequence[int], bounds: Tensor) -> Tensor:
    """Every site q within bounds for which q * stride + offsets[k] is one of `coords`, for any k.

    Args:
        coords: int32 [inputs, dimensions], the batch index first.
        offsets: int32 [kernel volume, dimensions]; zero for the batch index.
        stride: of each dimension; 1 for the batch index.
        bounds: int64 [2, dimensions] on the CPU, the least and the largest site there may be.

    Returns:
        int32 [outputs, dimensions], each once, in lexicographic order. How many they are is waited for.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or the bounds hold more than 2^62
            places.

    Source: Yan et al., SECOND (Sensors 2018), section 3.2.
    """
    _check(coords, offsets, stride, bounds)
    result: Tensor = _strided_coords_operation(coords, offsets, list(stride), bounds)
    return result


def strided_coords_within(
    coords: Tensor, offsets: Tensor, *, stride: Sequence[int], bounds: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """`strided_coords` without waiting, for CUDA graphs: of as many rows as there may be.

    Args:
        coords: as there; rows outside of what the bounds allow, such as -1, reach nothing.
        offsets: as there.
        stride: as there.
        bounds: as there.
        capacity: rows of the result.

    Returns:
        int32 [capacity, dimensions], -1 behind the sites there are; and their number, int32 [1]. Where it is larger
        than the capacity, the last sites are left out.

    Raises:
        ValueError, TypeError: as there; or there are more places within the bounds than are marked (2^28).
    """
    _check(coords, offsets, stride, bounds)
    places = Box.of(bounds).places
    if places > reference.MOST_MARKS:
        raise ValueError(f"bounds: hold {places} places, a fixed capacity takes up to {reference.MOST_MARKS}")
    result: tuple[Tensor, Tensor] = _strided_coords_within_operation(coords, offsets, list(stride), bounds, capacity)
    return result


def _check(coords: Tensor, offsets: Tensor, stride: Sequence[int], bounds: Tensor) -> None:
    check_tensor("coords", coords, dim=2)
    check_tensor("offsets", offsets, dim=2, like=coords)
    check_shape("offsets", offsets, (offsets.shape[0], coords.shape[1]))
    check_tensor("bounds", bounds)
    check_shape("bounds", bounds, (2, coords.shape[1]))
    if bounds.dtype != torch.int64 or bounds.device.type != "cpu":
        raise TypeError(f"bounds: got {bounds.dtype} on {bounds.device}, wanted torch.int64 on the CPU")
    for name, tensor in (("coords", coords), ("offsets", offsets)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted torch.int32")
    if len(stride) != coords.shape[1] or min(stride) < 1:
        raise ValueError(f"stride: got {list(stride)}, wanted {coords.shape[1]} positive numbers")


def _coords_bounds(coords: Tensor) -> Tensor:
    if not coords.shape[0]:
        return torch.tensor([[0], [-1]]).repeat(1, coords.shape[1])
    return torch.stack(coords.aminmax(dim=0)).long().cpu()


def _strided_coords(coords: Tensor, offsets: Tensor, stride: list[int], bounds: Tensor) -> Tensor:
    box = Box.of(bounds)
    if not box.places or not coords.shape[0]:
        return coords.new_empty((0, coords.shape[1]))
    if box.places <= reference.MOST_MARKS and use_triton("strided_coords", coords):
        from pronghorn.kernels.strided_coords import triton

        return triton.strided_coords(coords, offsets, stride, box)
    return reference.strided_coords(coords, offsets, stride, box)


def _strided_coords_within(
    coords: Tensor, offsets: Tensor, stride: list[int], bounds: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    box = Box.of(bounds)
    if not box.places or not coords.shape[0]:
        return coords.new_full((capacity, coords.shape[1]), -1), coords.new_zeros(1)
    if use_triton("strided_coords", coords):
        from pronghorn.kernels.strided_coords import triton

        return triton.strided_coords_within(coords, offsets, stride, box, capacity)
    found = reference.strided_coords(coords, offsets, stride, box)
    rows = torch.nn.functional.pad(found[:capacity], (0, 0, 0, max(0, capacity - len(found))), value=-1)
    return rows, coords.new_tensor([len(found)])


def _of_any_number(coords: Tensor, *_: Any) -> Tensor:
    return coords.new_empty((torch.library.get_ctx().new_dynamic_size(), coords.shape[1]))


_coords_bounds_operation = define(
    "coords_bounds", _coords_bounds, lambda coords: torch.empty(2, coords.shape[1], dtype=torch.int64)
)
_strided_coords_operation = define("strided_coords", _strided_coords, _of_any_number)
_strided_coords_within_operation = define(
    "strided_coords_within", _strided_coords_within,
    lambda coords, offsets, stride, bounds, capacity: (
        coords.new_empty((capacity, coords.shape[1])), coords.new_empty(1)
    ),
)  # fmt: skip
