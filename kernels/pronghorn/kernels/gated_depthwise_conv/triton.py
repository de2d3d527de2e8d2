# Triton adds tuples up, and does not unpack them; as they grow, so does their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"
"""Triton kernel for the gated depthwise convolution: a program goes down the rows of some columns, for some channels.

What takes it longest is the SiLU of its input, so an input is activated as few times as may be: a row, once read,
goes to the sums of the three output rows that it borders on, which are kept; and COLUMNS adjacent outputs share their
inputs, which are separate values of one thread.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._dispatch import interpreting
from pronghorn.kernels._launch import Launcher, planned
from pronghorn.kernels._memory import dense_format
from pronghorn.kernels._triton import blocks, power_of_2
from pronghorn.kernels.gated_depthwise_conv.reference import halved

COLUMNS = 4  # outputs that share inputs
ELEMENTS = 256  # of a tile: groups of columns, by channels
MOST_CHANNELS = {True: 64, False: 8}  # of a tile, where they are adjacent or not
MOST_ROWS, FEWEST_ROWS = 64, 4  # of a program
BUSY = 1000  # programs that keep a GPU busy
WARPS = 4
REGISTERS = 128  # of a thread, so that four programs fit on a multiprocessor; 32 bits want more
# x / (1 + 2^(-x log2(e))) in five instructions; Triton's takes a dozen to keep tiny numbers, which a 1 swallows anyway.
SILU = tl.constexpr("""{
    .reg .f32 t;
    mul.f32 t, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 t, t;
    add.f32 t, t, 0f3F800000;
    rcp.approx.ftz.f32 t, t;
    mul.f32 $0, $1, t;
}""")
# h + h tanh(h) of h = x / 2, with one function of the slow unit instead of two; its error of 2^-11 is a quarter of
# bfloat16's rounding.
TANH_SILU = tl.constexpr("""{
    .reg .f32 h, t;
    mul.f32 h, $1, 0f3F000000;
    tanh.approx.f32 t, h;
    fma.rn.f32 $0, h, t, h;
}""")
# The same of two numbers of bfloat16, which are halved together and are the upper halves of float32's. A sum with -0 is
# the product; only Hopper has one without.
TANH_SILU_OF_PAIRS = tl.constexpr("""{
    .reg .b32 halves, one, nothing;
    .reg .f32 low, high, t;
    mov.b32 one, 0x3F003F00;
    mov.b32 nothing, 0x80008000;
    fma.rn.bf16x2 halves, $2, one, nothing;
    shl.b32 one, halves, 16;
    mov.b32 low, one;
    and.b32 one, halves, 0xFFFF0000;
    mov.b32 high, one;
    tanh.approx.f32 t, low;
    fma.rn.f32 $0, low, t, low;
    tanh.approx.f32 t, high;
    fma.rn.f32 $1, high, t, high;
}""")


@triton.jit
def _silu(x, PTX: tl.constexpr, TANH: tl.constexpr):
    """In float32."""
    if TANH and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(TANH_SILU_OF_PAIRS, "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    x = x.to(tl.float32)
    if TANH:
        return tl.inline_asm_elementwise(TANH_SILU, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    if PTX:
        return tl.inline_asm_elementwise(SILU, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x / (1 + tl.exp(-x))


@triton.jit
def _taps(weight, channel, there):
    """The nine weights of channels, row by row."""
    taps = ()
    for tap in tl.static_range(9):
        taps = taps + (tl.load(weight + channel * 9 + tap, mask=there, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def _advance(
    row_start,
    column,
    step,
    real,
    width,
    taps,
    above,
    below,
    COLUMNS: tl.constexpr,
    PTX: tl.constexpr,
    TANH: tl.constexpr,
):
    """Add an input row to the sums of the output rows above it, at it, and below it: the first of them is done."""
    inputs = ()
    for j in tl.static_range(COLUMNS + 2):
        x = column + (j - 1)
        inside = real[None, :] & ((x >= 0) & (x < width))[:, None]
        given = tl.load(row_start + x[:, None] * step, mask=inside, other=0.0)
        inputs = inputs + (_silu(given, PTX, TANH),)
    done, at, begun = (), (), ()
    for j in tl.static_range(COLUMNS):
        a, b, c = inputs[j], inputs[j + 1], inputs[j + 2]
        done = done + (above[j] + a * taps[6] + b * taps[7] + c * taps[8],)
        at = at + (below[j] + a * taps[3] + b * taps[4] + c * taps[5],)
        begun = begun + (a * taps[0] + b * taps[1] + c * taps[2],)
    return done, at, begun


@Launcher
@triton.jit(do_not_specialize=["height", "width", "rows"])
def _gated(
    x, weight, bias, out, height, width, rows,
    BIASED: tl.constexpr, CHANNELS: tl.constexpr, ADJACENT: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, PTX: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """Rows of GROUPS * COLUMNS columns and TILE of the CHANNELS output channels; ADJACENT: channels are, not pixels."""
    TILES: tl.constexpr = (CHANNELS + TILE - 1) // TILE
    across, down = tl.cdiv(width, GROUPS * COLUMNS), tl.cdiv(height, rows)
    place = tl.program_id(0)
    channel = (place % TILES) * TILE + tl.arange(0, TILE)
    place = place // TILES
    column = (place % across) * (GROUPS * COLUMNS) + tl.arange(0, GROUPS) * COLUMNS
    place = place // across
    first, image = (place % down) * rows, (place // down).to(tl.int64)
    real = channel < CHANNELS
    image_size = height.to(tl.int64) * width
    if ADJACENT:
        step, out_step, plane = 2 * CHANNELS, CHANNELS, 1
    else:
        step, out_step, plane = 1, 1, image_size
    values = x + image * image_size * (2 * CHANNELS) + (channel * plane)[None, :]
    gates = values + CHANNELS * plane
    out += image * image_size * CHANNELS + (channel * plane)[None, :]
    value_taps, gate_taps = _taps(weight, channel, real), _taps(weight, channel + CHANNELS, real)
    zero = tl.zeros([GROUPS, TILE], tl.float32)
    value_above, value_at, gate_above, gate_at = (), (), (), ()
    for _ in tl.static_range(COLUMNS):
        value_above, value_at = value_above + (zero,), value_at + (zero,)
        gate_above, gate_at = gate_above + (zero,), gate_at + (zero,)
    value_level, gate_level = zero, zero
    if BIASED:
        value_level += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
        gate_level += tl.load(bias + CHANNELS + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    for i in range(rows + 2):
        row = first + i - 1
        there = tl.where((row >= 0) & (row < height), width, 0)  # columns that are: outside of the image none
        start = row.to(tl.int64) * width * step
        value_done, value_above, value_at = _advance(
            values + start, column, step, real, there, value_taps, value_above, value_at, COLUMNS, PTX, TANH
        )
        gate_done, gate_above, gate_at = _advance(
            gates + start, column, step, real, there, gate_taps, gate_above, gate_at, COLUMNS, PTX, TANH
        )
        # The two first rows only begin sums.
        there = tl.where((row > first) & (row <= height), width, 0)
        start = (row - 1).to(tl.int64) * width * out_step
        for j in tl.static_range(COLUMNS):
            result = (value_done[j] + value_level) * _silu(gate_done[j] + gate_level, PTX, TANH)
            x_out = column + j
            tl.store(
                out + start + x_out[:, None] * out_step, result.to(out.dtype.element_ty),
                mask=real[None, :] & (x_out < there)[:, None],
            )  # fmt: skip


def gated_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[batch, channels, height, width]."""
    x, layout = dense_format(x)
    out = halved(x)
    adjacent, ptx = layout is torch.channels_last, not interpreting() and torch.version.hip is None
    grid, numbers, constants, options = _plan(x.shape, adjacent, x.dtype, ptx)
    tensors = x, weight.contiguous(), x if bias is None else bias.contiguous(), out
    _gated(grid, tensors, numbers, (bias is not None, *constants), **options)
    return out


@planned
def _plan(shape: torch.Size, adjacent: bool, dtype: torch.dtype, ptx: bool) -> tuple[Any, ...]:
    """Grid, numbers, constants after the first, and options."""
    batch, doubled, height, width = shape
    channels = doubled // 2
    tile = min(MOST_CHANNELS[adjacent], power_of_2(channels))
    groups = min(ELEMENTS // tile, power_of_2(blocks(width, COLUMNS)))
    columns = batch * blocks(channels, tile) * blocks(width, groups * COLUMNS)
    rows = min(MOST_ROWS, power_of_2(height))  # those below the image would be gone through like others
    while rows > FEWEST_ROWS and columns * blocks(height, rows) < BUSY:
        rows //= 2
    return (
        (columns * blocks(height, rows), 1, 1), (height, width, rows),
        (channels, adjacent, groups, tile, COLUMNS, ptx, ptx and dtype == torch.bfloat16),
        {"num_warps": WARPS, **({"maxnreg": REGISTERS} if ptx and dtype.itemsize == 2 else {})},
    )  # fmt: skip
