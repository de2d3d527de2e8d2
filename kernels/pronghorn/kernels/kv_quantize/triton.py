"""Triton kernels for codes of keys and values: one read and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.kv_quantize.reference import SMALLEST_SCALE

ELEMENTS = 4096  # of a tile


@triton.jit
def _codes(x, low, scale, LEVELS: tl.constexpr):
    quotient = tl.div_rn(x - low[:, None], tl.broadcast_to(scale[:, None], x.shape))
    return tl.minimum(tl.maximum(tl.floor(quotient + 0.5), 0.0), LEVELS).to(tl.int32)


@triton.jit
def _quantize(
    x, codes, scales, zeros, groups, smallest,
    BITS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A row is a group; its even and its odd channels are loaded apart, since two of them share a byte."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, HALF)
    inside = (row < groups)[:, None] & (2 * pair < SIZE)[None, :]
    at = row[:, None] * SIZE + 2 * pair[None, :]
    even = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(x + at + 1, mask=inside, other=0.0).to(tl.float32)
    low = tl.min(tl.where(inside, tl.minimum(even, odd), float("inf")), axis=1)
    high = tl.max(tl.where(inside, tl.maximum(even, odd), float("-inf")), axis=1)
    levels: tl.constexpr = 2**BITS - 1
    scale = tl.div_rn(high - low, tl.full(low.shape, levels, tl.float32)) + smallest
    even, odd = _codes(even, low, scale, levels), _codes(odd, low, scale, levels)
    if BITS == 4:
        to = row[:, None] * (SIZE // 2) + pair[None, :]
        tl.store(codes + to, (even * 16 + odd).to(tl.uint8), mask=inside)
    else:
        tl.store(codes + at, even.to(tl.uint8), mask=inside)
        tl.store(codes + at + 1, odd.to(tl.uint8), mask=inside)
    tl.store(scales + row, scale.to(tl.float16), mask=row < groups)
    tl.store(zeros + row, low.to(tl.float16), mask=row < groups)


@triton.jit
def _value(code, scale, zero, EXACT: tl.constexpr):
    product = code.to(tl.float32) * scale[:, None].to(tl.float32)
    if EXACT:  # rounded before the zero is added, as fp16 arithmetic does
        product = product.to(tl.float16).to(tl.float32)
    return product + zero[:, None].to(tl.float32)


@triton.jit
def _dequantize(
    codes, scales, zeros, out, groups,
    BITS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, HALF)
    inside = (row < groups)[:, None] & (2 * pair < SIZE)[None, :]
    scale, zero = tl.load(scales + row, mask=row < groups), tl.load(zeros + row, mask=row < groups)
    at = row[:, None] * SIZE + 2 * pair[None, :]
    if BITS == 4:
        both = tl.load(codes + row[:, None] * (SIZE // 2) + pair[None, :], mask=inside, other=0).to(tl.int32)
        even, odd = both >> 4, both & 15
    else:
        even, odd = tl.load(codes + at, mask=inside, other=0), tl.load(codes + at + 1, mask=inside, other=0)
    tl.store(out + at, _value(even, scale, zero, EXACT).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + 1, _value(odd, scale, zero, EXACT).to(out.dtype.element_ty), mask=inside)


def kv_quantize(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero of [..., head_dim]."""
    x = x.contiguous()
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] * bits // 8), dtype=torch.uint8)
    scale = x.new_empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.float16)
    zero = torch.empty_like(scale)
    half, rows = _tile(group_size)
    _quantize[(triton.cdiv(scale.numel(), rows),)](
        x, codes, scale, zero, scale.numel(), SMALLEST_SCALE, bits, group_size, half, rows
    )
    return codes, scale, zero


def kv_dequantize(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """[..., head_dim]."""
    codes, scale, zero = (tensor.contiguous() for tensor in (codes, scale, zero))
    out = codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 8 // bits), dtype=dtype)
    size = out.shape[-1] // scale.shape[-1]
    half, rows = _tile(size)
    _dequantize[(triton.cdiv(scale.numel(), rows),)](
        codes, scale, zero, out, scale.numel(), bits, size, half, rows, dtype == torch.float16
    )
    return out


def _tile(size: int) -> tuple[int, int]:
    half = triton.next_power_of_2((size + 1) // 2)
    return half, max(1, ELEMENTS // (2 * half))
