"""Triton kernel for group fake quantization: one read and one write of the weight, bit-equal to the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.group_fake_quantize.reference import SMALLEST_RANGE

ELEMENTS = 4096  # of a tile


@triton.jit
def round_half_even(x):
    """torch.round for what will be clamped to a few bits anyway: beyond 2^22 the value does not matter."""
    magic = 12582912.0  # 1.5 * 2^23: adding it leaves no bits behind the point
    return (tl.minimum(tl.maximum(x, -4194304.0), 4194304.0) + magic) - magic


@triton.jit
def fake_quantize_tile(weight, inside, smallest_range, dtype, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """(fake, scale [rows, 1], zero [rows, 1]) of a tile [rows, group], float32 rounded to `dtype` after every step."""
    if SYMMETRIC:
        largest: tl.constexpr = 2 ** (BITS - 1) - 1
        reach = tl.max(tl.where(inside, tl.abs(weight), 0.0), axis=1, keep_dims=True)
        scale = tl.div_rn(tl.maximum(reach, smallest_range), tl.full(reach.shape, largest, tl.float32))
        scale = scale.to(dtype).to(tl.float32)
        zero = tl.zeros_like(scale)
        low = -largest - 1.0
        high = largest + 0.0
    else:
        levels: tl.constexpr = 2**BITS - 1
        top = tl.max(tl.where(inside, weight, float("-inf")), axis=1, keep_dims=True)
        bottom = tl.min(tl.where(inside, weight, float("inf")), axis=1, keep_dims=True)
        reach = tl.maximum((top - bottom).to(dtype).to(tl.float32), smallest_range)
        scale = tl.div_rn(reach, tl.full(reach.shape, levels, tl.float32)).to(dtype).to(tl.float32)
        zero = -round_half_even(tl.div_rn(bottom, scale).to(dtype).to(tl.float32))
        zero = tl.minimum(tl.maximum(zero, 0.0), levels + 0.0)
        low = 0.0
        high = levels + 0.0
    quotient = tl.div_rn(weight, tl.broadcast_to(scale, weight.shape)).to(dtype).to(tl.float32)
    code = tl.minimum(tl.maximum(round_half_even(quotient) + zero, low), high)
    fake = ((code - zero) * scale).to(dtype).to(tl.float32)
    return fake, scale, zero


@triton.jit
def _fake_quantize(
    weight,
    fake,
    scales,
    zeros,
    groups,
    group_size,
    smallest_range,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype = weight.dtype.element_ty
    group = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (group < groups) & (column < group_size)
    at = group * group_size + column
    tile = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    rounded, scale, zero = fake_quantize_tile(
        tile, (column < group_size) & (group >= 0), smallest_range, dtype, BITS, SYMMETRIC
    )
    tl.store(fake + at, rounded.to(dtype), mask=inside)
    tl.store(scales + group, scale.to(dtype), mask=group < groups)
    tl.store(zeros + group, zero.to(dtype), mask=group < groups)


def group_fake_quantize(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Fake weight [N, K], scales and zeros [N, K/group_size] of a contiguous weight."""
    groups = weight.numel() // group_size
    fake = torch.empty_like(weight)
    scales = weight.new_empty(weight.shape[0], weight.shape[1] // group_size)
    zeros = torch.empty_like(scales)
    if groups:
        columns = triton.next_power_of_2(group_size)
        rows = max(1, ELEMENTS // columns)
        grid = (triton.cdiv(groups, rows),)
        smallest = smallest_range(weight.dtype)
        _fake_quantize[grid](weight, fake, scales, zeros, groups, group_size, smallest, bits, symmetric, rows, columns)
    return fake, scales, zeros


def smallest_range(dtype: torch.dtype) -> float:
    """The smallest range of a group as `dtype` holds it."""
    return torch.tensor(SMALLEST_RANGE, dtype=dtype).item()
