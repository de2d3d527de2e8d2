"""Triton kernels for batch norm over the first rows: parts of the rows are summed up, then all rows are computed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._triton import blocks, power_of_2

ROWS, MOST_COLUMNS = 64, 64  # of a tile
PARTS = 128  # at most; a power of two
WARPS = 4


@Launcher
@triton.jit(do_not_specialize=["stretch", "rows"])
def _moments(
    x, count, means, squares, stretch, rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared distances from it, of each part: tile after tile by Chan's formula, which is stable."""
    part, c = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.minimum(tl.load(count), rows)
    start = part * stretch
    mean, square = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for first in range(start, tl.minimum(start + stretch, total), ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < total) & (row < start + stretch)
        value = tl.load(
            x + row.to(tl.int64)[:, None] * CHANNELS + c[None, :], mask=inside[:, None] & (c < CHANNELS)[None, :],
            other=0.0,
        ).to(tl.float32)  # fmt: skip
        there = tl.sum(inside.to(tl.float32), axis=0)
        here = tl.sum(value, axis=0) / there
        away = tl.where(inside[:, None], value - here[None, :], 0.0)
        before = (first - start).to(tl.float32)
        apart = here - mean
        square += tl.sum(away * away, axis=0) + apart * apart * (before * there / (before + there))
        mean += apart * (there / (before + there))
    tl.store(means + part * CHANNELS + c, mean, mask=c < CHANNELS)
    tl.store(squares + part * CHANNELS + c, square, mask=c < CHANNELS)


@Launcher
@triton.jit(do_not_specialize=["stretch", "parts", "rows"])
def _join_moments(
    means, squares, count, mean, variance, stretch, parts, rows,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    part, c = tl.arange(0, PARTS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.minimum(tl.load(count), rows)
    of_each = tl.minimum(tl.maximum(total - part * stretch, 0), stretch).to(tl.float32)
    at, inside = part[:, None] * CHANNELS + c[None, :], (part < parts)[:, None] & (c < CHANNELS)[None, :]
    of_part = tl.load(means + at, mask=inside, other=0.0)
    overall = tl.sum(of_part * of_each[:, None], axis=0) / total
    apart = of_part - overall[None, :]
    square = tl.sum(tl.load(squares + at, mask=inside, other=0.0) + apart * apart * of_each[:, None], axis=0)
    tl.store(mean + c, overall, mask=c < CHANNELS)
    tl.store(variance + c, square / total, mask=c < CHANNELS)


@Launcher
@triton.jit(do_not_specialize=["rows"])
def _normalise(
    x, count, weight, bias, mean, variance, y, rows,
    EPS: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < CHANNELS
    scale = tl.rsqrt(tl.load(variance + c, mask=real, other=1.0) + EPS)
    if WEIGHTED:
        scale *= tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    at = row.to(tl.int64)[:, None] * CHANNELS + c[None, :]
    there = (row < tl.load(count))[:, None] & real[None, :]
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    value = (value - tl.load(mean + c, mask=real, other=0.0)[None, :]) * scale[None, :]
    if BIASED:
        value += tl.load(bias + c, mask=real, other=0.0).to(tl.float32)[None, :]
    value = tl.where(there, value, 0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=(row < rows)[:, None] & real[None, :])


@Launcher
@triton.jit(do_not_specialize=["stretch", "rows"])
def _sums(
    x, grad, count, mean, variance, of_weight, of_bias, stretch, rows,
    EPS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    part, c = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < CHANNELS
    total = tl.minimum(tl.load(count), rows)
    middle = tl.load(mean + c, mask=real, other=0.0)
    scale = tl.rsqrt(tl.load(variance + c, mask=real, other=1.0) + EPS)
    start = part * stretch
    weight, bias = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for first in range(start, tl.minimum(start + stretch, total), ROWS):
        row = first + tl.arange(0, ROWS)
        there = ((row < total) & (row < start + stretch))[:, None] & real[None, :]
        at = row.to(tl.int64)[:, None] * CHANNELS + c[None, :]
        g = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
        normal = (tl.load(x + at, mask=there, other=0.0).to(tl.float32) - middle[None, :]) * scale[None, :]
        weight += tl.sum(g * normal, axis=0)
        bias += tl.sum(g, axis=0)
    tl.store(of_weight + part * CHANNELS + c, weight, mask=real)
    tl.store(of_bias + part * CHANNELS + c, bias, mask=real)


@Launcher
@triton.jit(do_not_specialize=["parts"])
def _join_sums(
    weights, biases, of_weight, of_bias, parts,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    part, c = tl.arange(0, PARTS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = part[:, None] * CHANNELS + c[None, :], (part < parts)[:, None] & (c < CHANNELS)[None, :]
    tl.store(of_weight + c, tl.sum(tl.load(weights + at, mask=inside, other=0.0), axis=0), mask=c < CHANNELS)
    tl.store(of_bias + c, tl.sum(tl.load(biases + at, mask=inside, other=0.0), axis=0), mask=c < CHANNELS)


@Launcher
@triton.jit(do_not_specialize=["rows"])
def _gradient(
    x, grad, count, weight, mean, variance, of_weight, of_bias, of_x, rows,
    EPS: tl.constexpr, WEIGHTED: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < CHANNELS
    total = tl.minimum(tl.load(count), rows)
    scale = tl.rsqrt(tl.load(variance + c, mask=real, other=1.0) + EPS)
    at = row.to(tl.int64)[:, None] * CHANNELS + c[None, :]
    there = (row < total)[:, None] & real[None, :]
    normal = tl.load(x + at, mask=there, other=0.0).to(tl.float32) - tl.load(mean + c, mask=real, other=0.0)[None, :]
    normal *= scale[None, :]
    share = tl.load(of_weight + c, mask=real, other=0.0) / total
    level = tl.load(of_bias + c, mask=real, other=0.0) / total
    if WEIGHTED:
        scale *= tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    value = tl.where(there, (g - level[None, :] - normal * share[None, :]) * scale[None, :], 0.0)
    tl.store(of_x + at, value.to(of_x.dtype.element_ty), mask=(row < rows)[:, None] & real[None, :])


def batch_norm(
    x: Tensor, count: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, mean, biased variance."""
    x = x.contiguous()
    rows, channels = x.shape
    parts, stretch, columns = _parts(rows, channels)
    means, squares = torch.empty(2, parts, channels, dtype=torch.float32, device=x.device)
    mean, variance = (torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(2))
    y = torch.empty_like(x)
    across = blocks(channels, columns)
    tile = channels, ROWS, columns
    _moments((parts, across, 1), (x, count, means, squares), (stretch, rows), tile, num_warps=WARPS)
    _join_moments(
        (across, 1, 1), (means, squares, count, mean, variance), (stretch, parts, rows), (channels, PARTS, columns),
        num_warps=WARPS,
    )  # fmt: skip
    given = [x if tensor is None else tensor.contiguous() for tensor in (weight, bias)]  # what is not read is `x`
    _normalise(
        (blocks(rows, ROWS), across, 1), (x, count, *given, mean, variance, y), (rows,),
        (eps, weight is not None, bias is not None, *tile), num_warps=WARPS,
    )  # fmt: skip
    return y, mean, variance


def gradients(
    x: Tensor, grad: Tensor, count: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias."""
    x, grad = x.contiguous(), grad.contiguous()
    rows, channels = x.shape
    parts, stretch, columns = _parts(rows, channels)
    weights, biases = torch.empty(2, parts, channels, dtype=torch.float32, device=x.device)
    of_weight, of_bias = (torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(2))
    of_x = torch.empty_like(x)
    across = blocks(channels, columns)
    tile = channels, ROWS, columns
    _sums(
        (parts, across, 1), (x, grad, count, mean, variance, weights, biases), (stretch, rows), (eps, *tile),
        num_warps=WARPS,
    )  # fmt: skip
    _join_sums(
        (across, 1, 1), (weights, biases, of_weight, of_bias), (parts,), (channels, PARTS, columns), num_warps=WARPS
    )
    _gradient(
        (blocks(rows, ROWS), across, 1),
        (x, grad, count, x if weight is None else weight.contiguous(), mean, variance, of_weight, of_bias, of_x),
        (rows,), (eps, weight is not None, *tile), num_warps=WARPS,
    )  # fmt: skip
    return of_x, of_weight, of_bias


def _parts(rows: int, channels: int) -> tuple[int, int, int]:
    """Parts of the rows, rows of each, and columns of a tile."""
    stretch = blocks(blocks(rows, PARTS), ROWS) * ROWS
    return blocks(rows, stretch), stretch, min(MOST_COLUMNS, power_of_2(channels))
