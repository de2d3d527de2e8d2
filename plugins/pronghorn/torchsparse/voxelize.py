"""From points to voxels by the mean, and from voxels to points by trilinear interpolation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pronghorn.torchsparse.hashing import check_device, check_rows, present_or

CORNERS = 8
EPSILON = 1e-8  # added to the sum of weights, so that a point without any corner gets zeros
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def spvoxelize(feats: Tensor, idx: Tensor, counts: Tensor) -> Tensor:
    """Each voxel's mean of its points. Gradients flow to `feats`.

    Args:
        feats: [points, channels] float16, bfloat16, float32 or float64.
        idx: [points] int32 or int64, each point's voxel; points with -1 are left out.
        counts: [voxels] int32 or int64, what sums are divided by, as `spcount` gives it.

    Returns:
        [voxels, channels] in the dtype of `feats`; sums are in float32 or better. Voxels with a count of 0 are zeros.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or device is wrong, or `idx` holds rows that are no voxels.
    """
    _check_feats(feats)
    if idx.shape != feats.shape[:1]:
        raise ValueError(f"idx: got shape {tuple(idx.shape)}, wanted [{feats.shape[0]}], one for each row of feats")
    if counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"counts: got {counts.dtype}, wanted int32 or int64")
    if counts.ndim != 1:
        raise ValueError(f"counts: got shape {tuple(counts.shape)}, wanted [voxels]")
    check_device("idx", idx, "feats", feats)
    check_device("counts", counts, "feats", feats)
    voxels = counts.shape[0]
    check_rows("idx", idx, voxels)
    added = feats.to(_accumulator(feats))
    sums = added.new_zeros(voxels + 1, feats.shape[1]).index_add(0, present_or(voxels, idx), added)[:voxels]
    means = sums / counts.clamp(min=1)[:, None]
    return means.masked_fill((counts <= 0)[:, None], 0).to(feats.dtype)


def spdevoxelize(feats: Tensor, idx_query: Tensor, weights: Tensor) -> Tensor:
    """Each point's weighted sum of eight voxels. Gradients flow to `feats` and `weights`.

    Args:
        feats: [voxels, channels] float16, bfloat16, float32 or float64.
        idx_query: [points, 8] int32 or int64, the voxel at each corner, -1 for none.
        weights: [points, 8] floating point, as `calc_ti_weights` gives it.

    Returns:
        [points, channels] in the dtype of `feats`; sums are in float32 or better.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or device is wrong, or `idx_query` holds rows that are no voxels.
    """
    _check_feats(feats)
    _check_corners(idx_query)
    if weights.dtype not in FLOATS:
        raise TypeError(f"weights: got {weights.dtype}, wanted float16, bfloat16, float32 or float64")
    if weights.shape != idx_query.shape:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, wanted {tuple(idx_query.shape)} of idx_query")
    check_device("idx_query", idx_query, "feats", feats)
    check_device("weights", weights, "feats", feats)
    voxels = feats.shape[0]
    check_rows("idx_query", idx_query, voxels)
    # A row of zeros stands for missing corners: a weight of zero would let NaNs of another voxel through.
    table = torch.nn.functional.pad(feats.to(_accumulator(feats)), (0, 0, 0, 1))
    rows, shares = present_or(voxels, idx_query), weights.to(table.dtype)
    total = table.new_zeros(idx_query.shape[0], feats.shape[1])
    for corner in range(CORNERS):  # one at a time: all at once would take eight times the memory
        total = total + shares[:, corner, None] * table.index_select(0, rows[:, corner])
    return total.to(feats.dtype)


def calc_ti_weights(coords: Tensor, idx_query: Tensor, scale: float = 1) -> Tensor:
    """Trilinear weights of the eight voxels around each point. Gradients flow to `coords`.

    Corner i is the voxel at floor(coords / scale) plus the bits of i: x is the highest bit, z the lowest. Weights of
    missing corners are zero and the others are scaled to a sum of one.

    Args:
        coords: [points, 3] floating point: x, y, z without the batch index.
        idx_query: [points, 8] int32 or int64, the voxel at each corner, -1 for none.
        scale: edge of a voxel in the unit of `coords`.

    Returns:
        [points, 8] in the dtype of `coords`, computed in float32 or better; zeros for points without any corner.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or device is wrong, or `scale` is not positive.
    """
    if coords.dtype not in FLOATS:
        raise TypeError(f"coords: got {coords.dtype}, wanted float16, bfloat16, float32 or float64")
    if coords.ndim != 2 or coords.shape[1] != 3:
        raise ValueError(f"coords: got shape {tuple(coords.shape)}, wanted [points, 3] without the batch index")
    _check_corners(idx_query, coords.shape[0])
    check_device("idx_query", idx_query, "coords", coords)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {scale!r}, wanted a number")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}, wanted a positive number")
    position = coords.to(_accumulator(coords)) / scale
    upper = position - position.floor()
    sides = torch.stack([1 - upper, upper], dim=-1)  # [points, 3, 2]
    x, y, z = sides.unbind(1)
    shares = (x[:, :, None, None] * y[:, None, :, None] * z[:, None, None, :]).flatten(1)
    shares = shares.masked_fill(idx_query < 0, 0)
    return (shares / (shares.sum(1, keepdim=True) + EPSILON)).to(coords.dtype)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _check_feats(feats: Tensor) -> None:
    if feats.dtype not in FLOATS:
        raise TypeError(f"feats: got {feats.dtype}, wanted float16, bfloat16, float32 or float64")
    if feats.ndim != 2:
        raise ValueError(f"feats: got shape {tuple(feats.shape)}, wanted [rows, channels]")


def _check_corners(idx_query: Tensor, points: int | None = None) -> None:
    if idx_query.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"idx_query: got {idx_query.dtype}, wanted int32 or int64")
    wanted = (idx_query.shape[0] if idx_query.ndim else 0) if points is None else points
    if idx_query.shape != (wanted, CORNERS):
        shown = "points" if points is None else points
        raise ValueError(f"idx_query: got shape {tuple(idx_query.shape)}, wanted [{shown}, {CORNERS}]; transpose it?")
