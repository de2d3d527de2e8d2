"""Triton kernels for a gated residual with the adaptive RMS norm of its sum.

A program has all channels of some tokens of one row; the gradient's goes along a part of a row's tokens, and what parts
give the row's modulations is added up in a second step. Distances between rows of modulations are given divided by a
constant, for Triton makes wide loads only where it knows that 16 divides them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._triton import blocks, power_of_2

ELEMENTS, GRADIENT_ELEMENTS = 2048, 1024  # of a tile; the gradient has several
PROGRAMS = 1056  # of so many, a large GPU is busy: rows are cut into as many parts as that takes
WARPS, MOST_WARPS = 4, 8
UNIT = 16


@triton.jit
def _rounded(values, like):
    """As the result of an operation in that dtype."""
    return values.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _vector(pointer, row, stride, c, UNIT: tl.constexpr, CHANNELS: tl.constexpr):
    """A row of a modulation, [1, channels]."""
    return tl.load(pointer + row * (stride * UNIT) + c, mask=c < CHANNELS, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normal(total, CHANNELS: tl.constexpr, EPS: tl.constexpr):
    """What is modulated, and its ratio to the sum."""
    ratio = tl.rsqrt(tl.sum(total * total, axis=1) / CHANNELS + EPS)[:, None]
    return total * ratio, ratio


@Launcher
@triton.jit(do_not_specialize=["tokens", "scale_row", "shift_row", "gate_row"])
def _forward(
    x, scale, shift, update, gate, out, totals, tokens, scale_row, shift_row, gate_row,
    UNIT: tl.constexpr, EPS: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, ROWS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    t, c = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = (row * tokens + t)[:, None] * CHANNELS + c[None, :]
    inside = (t < tokens)[:, None] & (c < CHANNELS)[None, :]
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    # Asked for before the sum over channels, whose end all threads wait for.
    slope = 1 + _vector(scale, row, scale_row, c, UNIT, CHANNELS)
    offset = _vector(shift, row, shift_row, c, UNIT, CHANNELS)
    if ADDED:
        more = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            more = _rounded(more * _rounded(_vector(gate, row, gate_row, c, UNIT, CHANNELS), x), x)
        total = _rounded(total + more, x)
        tl.store(totals + at, total.to(totals.dtype.element_ty), mask=inside)
    normal, _ = _normal(total, CHANNELS, EPS)
    tl.store(out + at, (normal * slope + offset).to(out.dtype.element_ty), mask=inside)


@Launcher
@triton.jit(do_not_specialize=["tokens", "parts", "tiles", "scale_row", "gate_row"])
def _gradients(
    grad, total_grad, totals, scale, update, gate, of_x, of_update, of_scale, of_shift, of_gate,
    tokens, parts, tiles, scale_row, gate_row,
    UNIT: tl.constexpr, EPS: tl.constexpr, USED: tl.constexpr, GATED: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of the tokens of a part of a row, and what they give its modulations."""
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    c = tl.arange(0, COLUMNS)
    slope = 1 + _vector(scale, row, scale_row, c, UNIT, CHANNELS)
    if GATED:
        opening = _rounded(_vector(gate, row, gate_row, c, UNIT, CHANNELS), totals)
    scale_sum, shift_sum = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    gate_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(part * tiles, (part + 1) * tiles):
        t = i * ROWS + tl.arange(0, ROWS)
        at = (row * tokens + t)[:, None] * CHANNELS + c[None, :]
        inside = (t < tokens)[:, None] & (c < CHANNELS)[None, :]
        normal, ratio = _normal(tl.load(totals + at, mask=inside, other=0.0).to(tl.float32), CHANNELS, EPS)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        share = tl.sum(g * slope * normal, axis=1)[:, None] / CHANNELS
        of_total = (g * slope - normal * share) * ratio
        if USED:
            of_total += tl.load(total_grad + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_x + at, of_total.to(of_x.dtype.element_ty), mask=inside)
        scale_sum += g * normal
        shift_sum += g
        if GATED:
            tl.store(of_update + at, (of_total * opening).to(of_update.dtype.element_ty), mask=inside)
            gate_sum += of_total * tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    to = tl.program_id(0).to(tl.int64) * CHANNELS + c
    tl.store(of_scale + to, tl.sum(scale_sum, axis=0), mask=c < CHANNELS)
    tl.store(of_shift + to, tl.sum(shift_sum, axis=0), mask=c < CHANNELS)
    if GATED:
        tl.store(of_gate + to, tl.sum(gate_sum, axis=0), mask=c < CHANNELS)


def adaptive_rms_norm(
    x: Tensor, scale: Tensor, shift: Tensor, update: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The modulated norm and the sum, which is empty without an update; of [rows, tokens, channels]."""
    x = x.contiguous()
    rows, tokens, channels = x.shape
    out = torch.empty_like(x)
    total = x.new_empty(0) if update is None else torch.empty_like(x)
    vectors, strides, unit = _modulations(scale, shift, scale if gate is None else gate)
    added = x if update is None else update.contiguous()  # what a kernel does not read is any tensor
    columns = power_of_2(channels)
    tile = max(1, min(ELEMENTS // columns, power_of_2(tokens)))
    _forward(
        (rows * blocks(tokens, tile), 1, 1), (x, *vectors[:2], added, vectors[2], out, total), (tokens, *strides),
        (unit, eps, update is not None, gate is not None, channels, tile, columns), num_warps=_warps(tile * columns),
        enable_fp_fusion=False,  # the compiler would add the product to x without rounding it
    )  # fmt: skip
    return out, total


def gradients(
    grad: Tensor, total_grad: Tensor | None, total: Tensor, scale: Tensor, update: Tensor | None, gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of x, update, scale, shift and gate, the last three in float32; without a gate its two are empty."""
    total, grad = total.contiguous(), grad.contiguous()
    rows, tokens, channels = total.shape
    gated = update is not None and gate is not None
    of_x = torch.empty_like(total)
    of_update = torch.empty_like(total) if gated else total.new_empty(0)
    (scale, gates), strides, unit = _modulations(scale, scale if gate is None else gate)
    columns = power_of_2(channels)
    tile = max(1, min(GRADIENT_ELEMENTS // columns, power_of_2(tokens)))
    tiles = blocks(blocks(tokens, tile), blocks(PROGRAMS, rows))
    parts = blocks(blocks(tokens, tile), tiles)
    sums = torch.empty(3 if gated else 2, rows, parts, channels, dtype=torch.float32, device=total.device)
    _gradients(
        (rows * parts, 1, 1),
        (grad, total if total_grad is None else total_grad.contiguous(), total, scale,
         total if update is None else update.contiguous(), gates, of_x, of_update, *sums[:2], sums[-1]),
        (tokens, parts, tiles, *strides),
        (unit, eps, total_grad is not None, gated, channels, tile, columns), num_warps=_warps(tile * columns),
    )  # fmt: skip
    of_scale, of_shift, *of_gate = sums.sum(dim=2)
    return of_x, of_update, of_scale, of_shift, of_gate[0] if gated else sums.new_empty(0)


def _modulations(*vectors: Tensor) -> tuple[list[Tensor], list[int], int]:
    """As the kernels read them, from row to row, and what that is divided by."""
    found = [vector if vector.stride(-1) == 1 else vector.contiguous() for vector in vectors]
    strides = [vector.stride(0) for vector in found]
    unit = 1 if any(stride % UNIT for stride in strides) else UNIT
    return found, [stride // unit for stride in strides], unit


def _warps(elements: int) -> int:
    return MOST_WARPS if elements > ELEMENTS else WARPS
