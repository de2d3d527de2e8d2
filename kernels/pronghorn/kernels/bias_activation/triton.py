"""Triton kernels for bias, residual and activation: of rows (a pixel's channels are adjacent), of planes (pixels are).

Of rows, a program has some channels of some pixels, so that it reads their biases once; of planes, pixels of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._memory import dense_format
from pronghorn.kernels._triton import activate, blocks, power_of_2

ELEMENTS = 4096  # of a tile of rows
MOST_CHANNELS = 512  # of a tile of rows
PIXELS = 2048  # of a plane, in a tile
WARPS = 4
UNIT = 16  # Triton makes wide loads only where it knows that the pixels of a plane divide by it


@triton.jit
def _finish(
    x, residual, out, at, inside, bias, ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + bias
    if ADDED:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=inside)


@Launcher
@triton.jit(do_not_specialize=["rows"])
def _rows(
    x, bias, residual, out, rows,
    BIASED: tl.constexpr, ADDED: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * CHANNELS + c[None, :]
    inside = (row < rows)[:, None] & (c < CHANNELS)[None, :]
    level = tl.zeros([COLUMNS], tl.float32)
    if BIASED:
        level = tl.load(bias + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    _finish(x, residual, out, at, inside, level[None, :], ADDED, ACTIVATION)


@Launcher
@triton.jit(do_not_specialize=["pixels"])
def _planes(
    x, bias, residual, out, pixels,
    UNIT: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    pixels = pixels * UNIT
    tiles = tl.cdiv(pixels, PIXELS)
    plane, p = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * PIXELS + tl.arange(0, PIXELS)
    level = 0.0
    if BIASED:
        level = tl.load(bias + plane % CHANNELS).to(tl.float32)
    at = plane.to(tl.int64) * pixels + p
    _finish(x, residual, out, at, p < pixels, level, ADDED, ACTIVATION)


def bias_activation(x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    """In the shape of x."""
    x, layout = dense_format(x)
    out = torch.empty_like(x)
    images, channels, height, width = x.shape
    given = x if residual is None else residual.contiguous(memory_format=layout)
    tensors = x, x if bias is None else bias.contiguous(), given, out
    how = bias is not None, residual is not None, activation, channels
    if layout is torch.channels_last:
        rows, columns = images * height * width, min(power_of_2(channels), MOST_CHANNELS)
        tile = ELEMENTS // columns
        grid = blocks(rows, tile), blocks(channels, columns), 1
        _rows(grid, tensors, (rows,), (*how, tile, columns), num_warps=WARPS)
    else:
        pixels = height * width
        tile, unit = min(PIXELS, power_of_2(pixels)), 1 if pixels % UNIT else UNIT
        grid = images * channels * blocks(pixels, tile), 1, 1
        _planes(grid, tensors, (pixels // unit,), (unit, *how, tile), num_warps=WARPS)
    return out
