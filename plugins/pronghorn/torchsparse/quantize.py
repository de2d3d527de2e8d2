"""From points to the voxels that hold them, each once."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Coords = TypeVar("Coords", np.ndarray, Tensor)

MAX_COLUMNS = 4
INT32 = torch.iinfo(torch.int32)


def sparse_quantize(
    coords: Coords,
    voxel_size: float | Sequence[float] = 1,
    *,
    return_index: bool = False,
    return_inverse: bool = False,
) -> Coords | tuple[Coords, ...]:
    """The voxels of points, sorted with the first column slowest.

    Args:
        coords: [points, columns] of finite numbers, 1 to 4 columns; a NumPy array or a tensor on any device.
        voxel_size: edge of a voxel in the unit of `coords`, one number for all columns or one for each. Where the
            first column is a batch index, its edge is 1.
        return_index: also return each voxel's first point.
        return_inverse: also return each point's voxel.

    Returns:
        Voxels [voxels, columns] int32, then [voxels] int64 points and [points] int64 voxels where they were asked
        for; of the kind that `coords` is, on its device. The division is in float64, as the official library's is.

    Raises:
        TypeError: `coords` is no array or tensor of real numbers, `voxel_size` is no number.
        ValueError: a shape is wrong, a size is not positive, a coordinate is not finite or leaves int32.

    Source: TorchSparse v2.1 (`sparse_quantize`), which takes NumPy arrays of three columns.
    """
    voxels = _floored(_as_float64(coords), voxel_size)
    keys = _ravel(voxels)
    unique, inverse = torch.unique(keys, sorted=True, return_inverse=True)
    points = torch.arange(keys.shape[0], device=keys.device)
    first = torch.full_like(unique, keys.shape[0]).scatter_reduce_(0, inverse, points, "amin")
    found = [voxels[first].int()]
    found += [first] if return_index else []
    found += [inverse] if return_inverse else []
    given: Any = found if isinstance(coords, Tensor) else [tensor.numpy() for tensor in found]
    return given[0] if len(given) == 1 else tuple(given)


def make_ntuple(x: int | Sequence[int] | np.ndarray | Tensor, ndim: int, *, name: str = "x") -> tuple[int, ...]:
    """One integer for each dimension.

    Args:
        x: an integer for all, or `ndim` of them in a list, tuple, array or tensor.
        ndim: number of dimensions.
        name: what errors call it.

    Raises:
        TypeError: `x` holds anything but integers.
        ValueError: `x` holds more or fewer than `ndim`.
    """
    given: Any = x.tolist() if isinstance(x, (np.ndarray, Tensor)) else x
    values = list(given) if isinstance(given, (list, tuple)) else [given] * ndim
    if any(isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__") for value in values):
        raise TypeError(f"{name}: got {x!r}, wanted an integer or {ndim} of them")
    if len(values) != ndim:
        raise ValueError(f"{name}: got {len(values)} numbers, {x!r}, wanted one or {ndim}")
    return tuple(operator.index(value) for value in values)


def _as_float64(coords: np.ndarray | Tensor) -> Tensor:
    """Points [points, columns] in float64."""
    if isinstance(coords, Tensor):
        real = not coords.is_complex() and coords.dtype != torch.bool
    elif isinstance(coords, np.ndarray):
        real = coords.dtype.kind in "iuf"
    else:
        raise TypeError(f"coords: got {type(coords).__name__}, wanted a NumPy array or a tensor")
    if not real:
        raise TypeError(f"coords: got {coords.dtype}, wanted real numbers")
    if coords.ndim != 2 or not 1 <= coords.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"coords: got shape {tuple(coords.shape)}, wanted [points, 1 to {MAX_COLUMNS}]")
    if isinstance(coords, Tensor):
        return coords.double()
    return torch.from_numpy(np.array(coords, dtype=np.float64, order="C"))  # a copy: the array may be read-only


def _floored(points: Tensor, voxel_size: float | Sequence[float]) -> Tensor:
    """Voxels of points, [points, columns] int64 with values of int32."""
    if not points.isfinite().all():
        row = int((~points.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"coords: got {points[row].tolist()} in row {row}, wanted finite numbers")
    sizes = torch.tensor(_voxel_sizes(voxel_size, points.shape[1]), dtype=torch.float64, device=points.device)
    floored = (points / sizes).floor()
    if floored.numel():
        low, high = torch.stack(floored.aminmax()).tolist()
        if low < INT32.min or high > INT32.max:
            raise ValueError(
                f"voxel_size: got {voxel_size}, with which voxels are numbered {low:.0f} to {high:.0f}, "
                f"wanted {INT32.min} to {INT32.max}"
            )
    return floored.long()


def _voxel_sizes(voxel_size: float | Sequence[float], columns: int) -> list[float]:
    given: Any = voxel_size.tolist() if isinstance(voxel_size, np.ndarray) else voxel_size
    sizes = list(given) if isinstance(given, (list, tuple)) else [given] * columns
    if any(isinstance(size, bool) or not isinstance(size, (int, float, np.integer, np.floating)) for size in sizes):
        raise TypeError(f"voxel_size: got {voxel_size!r}, wanted a number or {columns} of them")
    if len(sizes) != columns:
        raise ValueError(f"voxel_size: got {len(sizes)} numbers, wanted one or {columns}, as coords has columns")
    if not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"voxel_size: got {voxel_size}, wanted positive numbers")
    return [float(size) for size in sizes]


def _ravel(voxels: Tensor) -> Tensor:
    """One int64 for each voxel that sorts as its columns do, the first one slowest."""
    keys = torch.zeros(voxels.shape[0], dtype=torch.int64, device=voxels.device)
    if not voxels.shape[0]:
        return keys
    lowest = voxels.amin(0)
    extents = (voxels.amax(0) - lowest + 1).tolist()
    size = 1
    for column, extent in zip((voxels - lowest).unbind(1), extents, strict=True):
        if size * extent >= 2**63:  # ranks sort alike and are fewer than 2³¹, so that they and a column fit
            keys = torch.unique(keys, return_inverse=True)[1]
            size = voxels.shape[0]
        keys, size = keys * extent + column, size * extent
    return keys
