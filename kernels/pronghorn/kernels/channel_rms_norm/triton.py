"""Triton kernels for RMS norm over channels: of rows (a pixel's channels are adjacent), of planes (a channel's pixels).

Of rows, a program has all channels of some pixels in one tile. Of planes it has some pixels, and goes over the channels
in tiles: once for the sums, and once more, out of a cache, for the result. The number of pixels of a plane is given
divided by a constant, for Triton makes wide loads only where it knows that 16 divides it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._memory import dense_format
from pronghorn.kernels._triton import activate, blocks, power_of_2

ELEMENTS, GRADIENT_ELEMENTS = 4096, 2048  # of a tile of rows, of which the gradient has several
PIXELS = 64  # of planes, in a tile
CHANNELS_AT_ONCE, GRADIENT_CHANNELS = 128, 32  # of planes: of so many, one tile is read once
PARTS = 1024  # of rows, at most, that sum up a part of the weight's gradient
WARPS, MOST_WARPS = 4, 8
UNIT = 16


@triton.jit
def _shift(y, bias, residual, at, inside, BIASED: tl.constexpr, ADDED: tl.constexpr):
    if BIASED:
        y += bias
    if ADDED:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def _slope(y, ACTIVATION: tl.constexpr):
    slope = tl.where(y > 0, 1.0, 0.0)
    if ACTIVATION == "silu":
        gate = 1 / (1 + tl.exp(-y))
        slope = gate * (1 + y * (1 - gate))
    return slope


@triton.jit
def _vector(pointer, c, CHANNELS: tl.constexpr, THERE: tl.constexpr):
    """Channels of a weight or bias, or nothing to read."""
    if THERE:
        return tl.load(pointer + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    return tl.zeros(c.shape, tl.float32)


@Launcher
@triton.jit(do_not_specialize=["rows"])
def _rows(
    x, weight, bias, residual, out, rows,
    EPS: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * CHANNELS + c[None, :]
    inside = (row < rows)[:, None] & (c < CHANNELS)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / CHANNELS + EPS)
    y = value * scale[:, None] * _vector(weight, c, CHANNELS, True)[None, :]
    y = _shift(y, _vector(bias, c, CHANNELS, BIASED)[None, :], residual, at, inside, BIASED, ADDED)
    tl.store(out + at, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=inside)


@Launcher
@triton.jit(do_not_specialize=["rows", "tiles"])
def _rows_gradient(
    x, grad, weight, bias, residual, of_x, of_residual, of_weight, of_bias, rows, tiles,
    EPS: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of some tiles of rows, and what they give the weight and the bias."""
    part, c = tl.program_id(0), tl.arange(0, COLUMNS)
    w, b = _vector(weight, c, CHANNELS, True)[None, :], _vector(bias, c, CHANNELS, BIASED)[None, :]
    sum, level = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(tiles):
        row = (part * tiles + i) * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * CHANNELS + c[None, :]
        inside = (row < rows)[:, None] & (c < CHANNELS)[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / CHANNELS + EPS)[:, None]
        normal = value * scale
        if ACTIVATION is not None:
            g *= _slope(_shift(normal * w, b, residual, at, inside, BIASED, ADDED), ACTIVATION)
            if ADDED:
                tl.store(of_residual + at, g.to(of_residual.dtype.element_ty), mask=inside)
        share = tl.sum(g * w * normal, axis=1)[:, None] / CHANNELS
        tl.store(of_x + at, ((g * w - normal * share) * scale).to(of_x.dtype.element_ty), mask=inside)
        sum += g * normal
        level += g
    to = part.to(tl.int64) * CHANNELS + c
    tl.store(of_weight + to, tl.sum(sum, axis=0), mask=c < CHANNELS)
    tl.store(of_bias + to, tl.sum(level, axis=0), mask=c < CHANNELS)


@triton.jit
def _plane_tile(start, first, p, pixels, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    """Channels from `first` on, their places in an image, and whether they are there."""
    c = first + tl.arange(0, COLUMNS)
    at = start + c.to(tl.int64)[:, None] * pixels + p[None, :]
    return c, at, (c < CHANNELS)[:, None] & (p < pixels)[None, :]


@Launcher
@triton.jit(do_not_specialize=["pixels"])
def _planes(
    x, weight, bias, residual, out, pixels,
    UNIT: tl.constexpr, EPS: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    pixels = pixels * UNIT
    tiles = tl.cdiv(pixels, PIXELS)
    start = (tl.program_id(0) // tiles).to(tl.int64) * CHANNELS * pixels
    p = (tl.program_id(0) % tiles) * PIXELS + tl.arange(0, PIXELS)
    square = tl.zeros([PIXELS], tl.float32)
    for first in range(0, CHANNELS, COLUMNS):
        c, at, inside = _plane_tile(start, first, p, pixels, CHANNELS, COLUMNS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(value * value, axis=0)
    scale = tl.rsqrt(square / CHANNELS + EPS)
    for first in range(0, CHANNELS, COLUMNS):
        c, at, inside = _plane_tile(start, first, p, pixels, CHANNELS, COLUMNS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        y = value * scale[None, :] * _vector(weight, c, CHANNELS, True)[:, None]
        y = _shift(y, _vector(bias, c, CHANNELS, BIASED)[:, None], residual, at, inside, BIASED, ADDED)
        tl.store(out + at, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _plane_gradient(
    x, grad, weight, bias, residual, c, at, inside, scale,
    BIASED: tl.constexpr, ADDED: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile's normalised values, its gradients before the activation, and its weights."""
    normal = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale[None, :]
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    w = _vector(weight, c, CHANNELS, True)[:, None]
    if ACTIVATION is not None:
        b = _vector(bias, c, CHANNELS, BIASED)[:, None]
        g *= _slope(_shift(normal * w, b, residual, at, inside, BIASED, ADDED), ACTIVATION)
    return normal, g, w


@Launcher
@triton.jit(do_not_specialize=["pixels"])
def _planes_gradient(
    x, grad, weight, bias, residual, of_x, of_residual, of_weight, of_bias, pixels,
    UNIT: tl.constexpr, EPS: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Gradients of some pixels, and what they give the weight and the bias."""
    pixels = pixels * UNIT
    tiles = tl.cdiv(pixels, PIXELS)
    start = (tl.program_id(0) // tiles).to(tl.int64) * CHANNELS * pixels
    p = (tl.program_id(0) % tiles) * PIXELS + tl.arange(0, PIXELS)
    square, share = tl.zeros([PIXELS], tl.float32), tl.zeros([PIXELS], tl.float32)
    for first in range(0, CHANNELS, COLUMNS):
        c, at, inside = _plane_tile(start, first, p, pixels, CHANNELS, COLUMNS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(value * value, axis=0)
        if ACTIVATION is None:
            g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            share += tl.sum(g * value * _vector(weight, c, CHANNELS, True)[:, None], axis=0)
    scale = tl.rsqrt(square / CHANNELS + EPS)
    if ACTIVATION is None:
        share *= scale
    else:  # whose slope is known only now
        for first in range(0, CHANNELS, COLUMNS):
            c, at, inside = _plane_tile(start, first, p, pixels, CHANNELS, COLUMNS)
            normal, g, w = _plane_gradient(
                x, grad, weight, bias, residual, c, at, inside, scale, BIASED, ADDED, ACTIVATION, CHANNELS
            )
            share += tl.sum(g * w * normal, axis=0)
    share = share / CHANNELS
    for first in range(0, CHANNELS, COLUMNS):
        c, at, inside = _plane_tile(start, first, p, pixels, CHANNELS, COLUMNS)
        normal, g, w = _plane_gradient(
            x, grad, weight, bias, residual, c, at, inside, scale, BIASED, ADDED, ACTIVATION, CHANNELS
        )
        if ACTIVATION is not None and ADDED:
            tl.store(of_residual + at, g.to(of_residual.dtype.element_ty), mask=inside)
        gradient = (g * w - normal * share[None, :]) * scale[None, :]
        tl.store(of_x + at, gradient.to(of_x.dtype.element_ty), mask=inside)
        to = tl.program_id(0).to(tl.int64) * CHANNELS + c
        tl.store(of_weight + to, tl.sum(g * normal, axis=1), mask=c < CHANNELS)
        tl.store(of_bias + to, tl.sum(g, axis=1), mask=c < CHANNELS)


def channel_rms_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, activation: str | None
) -> Tensor:
    """In the shape of x."""
    x, layout = dense_format(x)
    out = torch.empty_like(x)
    images, channels, height, width = x.shape
    tensors = x, *_given(x, layout, weight, bias, residual), out
    how = eps, bias is not None, residual is not None, activation, channels
    if layout is torch.channels_last:
        rows, columns = images * height * width, power_of_2(channels)
        tile = max(1, ELEMENTS // columns)
        _rows((blocks(rows, tile), 1, 1), tensors, (rows,), (*how, tile, columns), num_warps=_warps(tile * columns))
    else:
        pixels, unit, programs = _pixels(x)
        columns = min(CHANNELS_AT_ONCE, power_of_2(channels))
        _planes((programs, 1, 1), tensors, (pixels,), (unit, *how, columns, PIXELS), num_warps=_warps(columns * PIXELS))
    return out


def gradients(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of x, weight, bias and residual; the last is empty where there is none."""
    x, layout = dense_format(x)
    images, channels, height, width = x.shape
    of_x = torch.empty_like(x)
    of_residual = x.new_empty(0) if residual is None else torch.empty_like(x)
    grad = grad.contiguous(memory_format=layout)
    tensors = x, grad, *_given(x, layout, weight, bias, residual), of_x, of_residual
    how = eps, bias is not None, residual is not None, activation, channels
    if layout is torch.channels_last:
        rows, columns = images * height * width, power_of_2(channels)
        tile = max(1, GRADIENT_ELEMENTS // columns)
        tiles = blocks(blocks(rows, tile), PARTS)
        parts = blocks(rows, tile * tiles)
        sums = torch.empty(2, parts, channels, dtype=torch.float32, device=x.device)
        _rows_gradient(
            (parts, 1, 1), (*tensors, *sums), (rows, tiles), (*how, tile, columns), num_warps=_warps(tile * columns)
        )
    else:
        pixels, unit, programs = _pixels(x)
        columns = min(GRADIENT_CHANNELS, power_of_2(channels))
        sums = torch.empty(2, programs, channels, dtype=torch.float32, device=x.device)
        _planes_gradient((programs, 1, 1), (*tensors, *sums), (pixels,), (unit, *how, columns, PIXELS), num_warps=WARPS)
    return of_x, *sums.sum(dim=1), of_residual


def _given(
    x: Tensor, layout: torch.memory_format, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All three as the kernels read them; what they do not read is `x`."""
    bias = x if bias is None else bias.contiguous()
    return weight.contiguous(), bias, x if residual is None else residual.contiguous(memory_format=layout)


def _pixels(x: Tensor) -> tuple[int, int, int]:
    """Pixels of a plane divided by a unit, the unit, and programs."""
    images, _, height, width = x.shape
    pixels = height * width
    unit = 1 if pixels % UNIT else UNIT
    return pixels // unit, unit, images * blocks(pixels, PIXELS)


def _warps(elements: int) -> int:
    return MOST_WARPS if elements > ELEMENTS else WARPS
