"""Sites within a box."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pronghorn.torchsparse.samples import check_sparse
from pronghorn.torchsparse.tensor import SparseTensor

Bound = Sequence[int | None] | None


def spcrop(input: SparseTensor, coords_min: Bound = None, coords_max: Bound = None) -> SparseTensor:
    """Keep the sites with `coords_min` <= coordinates < `coords_max`; waits for the GPU.

    Coordinates are those of the tensor's own grid, and stay as they are; so does the spatial range.

    Args:
        input: features [N, C].
        coords_min: the least coordinate of each dimension, without the batch index; None is unbounded, in a dimension
            or in all.
        coords_max: the first coordinate of each dimension that is out again, likewise.

    Returns:
        The sites in the same order, with a cache of their own.

    Raises:
        TypeError: `input` is no SparseTensor, or a bound is no integer.
        ValueError: a bound has another number of dimensions, or nothing lies between the two.

    Source: TorchSparse v2.1, which takes the first three columns for x, y and z, though the first is the batch index.
    """
    check_sparse(input)
    _check_box(coords_min, coords_max)
    inside = torch.ones(len(input.coords), dtype=torch.bool, device=input.coords.device)
    columns = input.coords[:, 1:].unbind(1)
    for column, low in zip(columns, _of_each(coords_min, "coords_min", len(columns)), strict=True):
        inside = inside if low is None else inside & (column >= low)
    for column, high in zip(columns, _of_each(coords_max, "coords_max", len(columns)), strict=True):
        inside = inside if high is None else inside & (column < high)
    rows = inside.nonzero().squeeze(1)
    return SparseTensor(input.feats[rows], input.coords[rows], input.stride, input.spatial_range)


class SparseCrop(nn.Module):
    """`spcrop` as a layer.

    Args:
        coords_min: the least coordinate of each dimension, without the batch index; None is unbounded.
        coords_max: the first that is out again, likewise.

    Raises:
        TypeError: a bound is no integer.
        ValueError: nothing lies between the two.
    """

    def __init__(self, coords_min: Bound = None, coords_max: Bound = None) -> None:
        super().__init__()
        _check_box(coords_min, coords_max)
        self.coords_min, self.coords_max = coords_min, coords_max

    def forward(self, input: SparseTensor) -> SparseTensor:
        """The sites within."""
        return spcrop(input, self.coords_min, self.coords_max)

    def extra_repr(self) -> str:
        """What tells layers apart."""
        return f"coords_min={self.coords_min}, coords_max={self.coords_max}"


def _check_box(coords_min: Bound, coords_max: Bound) -> None:
    for name, bound in (("coords_min", coords_min), ("coords_max", coords_max)):
        if bound is None:
            continue
        if not isinstance(bound, list | tuple) or any(item is not None and type(item) is not int for item in bound):
            raise TypeError(f"{name}: got {bound!r}, wanted an integer or None for each dimension")
    pairs = zip(coords_min or (), coords_max or (), strict=False)  # their lengths are compared with the input's
    if any(low is not None and high is not None and low >= high for low, high in pairs):
        raise ValueError(f"coords_max: got {coords_max}, wanted more than coords_min {coords_min} in each dimension")


def _of_each(bound: Bound, name: str, dimensions: int) -> Sequence[int | None]:
    if bound is None:
        return [None] * dimensions
    if len(bound) != dimensions:
        raise ValueError(f"{name}: got {bound}, wanted {dimensions} numbers, none for the batch index")
    return bound
