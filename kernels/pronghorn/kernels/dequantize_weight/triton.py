"""Triton kernel that writes a packed weight out, and the addressing of all layouts for other kernels.

`code_at` and `scale_and_shift_at` mirror the permutations of `layouts.py` as arithmetic on (n, k).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_K = 32, 128


@triton.jit
def code_at(qweight, n, k, N, K, mask, LAYOUT: tl.constexpr, BITS: tl.constexpr):
    """The code of output n and input k, int32; n, k and mask broadcast to the tile's shape, n and k are int64."""
    if LAYOUT == "gemm":
        word = k * (N // 8) + n // 8
        bit = 4 * (n % 2 * 4 + n % 8 // 2)
    elif LAYOUT == "gemv":
        word = n * (K // 8) + k // 8
        bit = 4 * (k % 8)
    elif LAYOUT == "gemv_fast":
        lane = 32 * (k % 64 // 32) + 8 * (k % 8 // 2) + 4 * (k % 2) + k % 32 // 8
        word = n // 4 * K + k // 64 * 64 + n % 4 * 16 + lane // 4
        bit = 4 * (lane % 4)
    elif LAYOUT == "exllama":
        word = k // 8 * N + n
        bit = 4 * (k % 8)
    elif LAYOUT == "marlin":
        block = n % 16 // 8
        position = (n % 8 * 4 + k % 8 // 2) * 32 + n % 64 // 16 * 8 + k % 2 * 4 + block * 2 + k % 16 // 8
        word = k // 16 * (2 * N) + n // 64 * 128 + position // 8
        bit = 4 * (position % 8)
    elif LAYOUT == "fragments":
        # The word and bit of a code among the 16 in the halves of its lane's words; see `_pack_lanes`.
        index = k % 64 // 16 * 4 + k % 16 // 8 * 2 + n % 16 // 8
        lane = n % 8 * 4 + k % 8 // 2
        tile = (n // 16 * (K // 64) + k // 64) * (32 * BITS)
        bit = index % (16 // BITS) * BITS + k % 2 * 16
        word = tile + index // (16 // BITS) * 32 + lane
        if BITS == 4:
            word = tile + lane * 4 + index // 4
        if BITS == 3:
            last = index == 15
            word = tl.where(last, tile + lane, word)
            top = 15 + k % 2 * 16
            first = (tl.load(qweight + word, mask=mask & last, other=0) >> top) & 1
            second = (tl.load(qweight + word + 32, mask=mask & last, other=0) >> top) & 1
            third = (tl.load(qweight + word + 64, mask=mask & last, other=0) >> top) & 1
    else:
        word = k * BITS // 32 * N + n
        bit = k * BITS % 32
    low = tl.load(qweight + word, mask=mask, other=0).to(tl.int64) & 0xFFFFFFFF
    if LAYOUT == "natural" and BITS == 3:
        # A code may reach into the next word of its stream.
        high = tl.load(qweight + word + N, mask=mask & (bit > 29), other=0).to(tl.int64)
        low = low | (high & 0xFFFFFFFF) << 32
    code = ((low >> bit) & ((1 << BITS) - 1)).to(tl.int32)
    if LAYOUT == "fragments" and BITS == 3:
        code = tl.where(last, first | second << 1 | third << 2, code)
    return code


@triton.jit
def scale_and_shift_at(scales, qzeros, n, group, N, groups, stored_groups, mask, LAYOUT: tl.constexpr):
    """(scale, shift) with W = code * scale + shift, both float32."""
    if LAYOUT == "gemv":
        at = n * stored_groups + group
    elif LAYOUT == "marlin":
        grouped = group * N + n // 64 * 64 + n % 8 * 8 + n % 64 // 8
        at = tl.where(groups > 1, grouped, n // 32 * 32 + n % 8 // 2 * 8 + n % 32 // 8 * 2 + n % 2)
    elif LAYOUT == "fragments":
        at = (n // 16 * groups + group) * 16 + n % 8 * 2 + n % 16 // 8
    else:
        at = group * N + n
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    if LAYOUT == "gemv_fast":
        shift = tl.load(qzeros + at, mask=mask, other=0.0).to(tl.float32)
    elif LAYOUT == "marlin":
        shift = -8.0 * scale
    elif LAYOUT == "natural" or LAYOUT == "fragments":
        shift = -scale * tl.load(qzeros + at, mask=mask, other=0).to(tl.float32)
    else:
        if LAYOUT == "gemv":
            word = tl.load(qzeros + n * (stored_groups // 8) + group // 8, mask=mask, other=0)
            bit = 4 * (group % 8)
        else:
            word = tl.load(qzeros + group * (N // 8) + n // 8, mask=mask, other=0)
            bit = 4 * (n % 2 * 4 + n % 8 // 2) if LAYOUT == "gemm" else 4 * (n % 8)
        wide = word.to(tl.int64) & 0xFFFFFFFF
        if LAYOUT == "exllama":
            wide = wide + 0x11111111
        shift = -scale * ((wide >> bit) & 15).to(tl.float32)
    return scale, shift


@triton.jit
def weight_tile(
    qweight,
    scales,
    qzeros,
    n,
    k,
    N,
    K,
    group_size,
    stored_groups,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
):
    """W at the broadcast positions n, k (int64), float32; zero outside."""
    mask = (n < N) & (k < K)
    code = code_at(qweight, n, k, N, K, mask, LAYOUT, BITS)
    groups = K // group_size
    scale, shift = scale_and_shift_at(scales, qzeros, n, k // group_size, N, groups, stored_groups, mask, LAYOUT)
    return code.to(tl.float32) * scale + shift


@triton.jit
def _dequantize(
    qweight,
    scales,
    qzeros,
    output,
    N,
    K,
    group_size,
    stored_groups,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    k = (tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    weight = weight_tile(qweight, scales, qzeros, n, k, N, K, group_size, stored_groups, LAYOUT, BITS)
    tl.store(output + n * K + k, weight.to(output.dtype.element_ty), mask=(n < N) & (k < K))


def dequantize_weight(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    layout: str,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K]."""
    output = torch.empty(out_features, in_features, dtype=dtype, device=qweight.device)
    if output.numel():
        grid = (triton.cdiv(out_features, BLOCK_N), triton.cdiv(in_features, BLOCK_K))
        _dequantize[grid](
            qweight.contiguous(),
            scales.contiguous(),
            contiguous_zeros(scales, qzeros),
            output,
            out_features,
            in_features,
            group_size,
            scales.shape[1],
            layout,
            bits,
            BLOCK_N,
            BLOCK_K,
        )
    return output


def contiguous_zeros(scales: Tensor, qzeros: Tensor | None) -> Tensor:
    """A pointer for kernels whose layout may have no zero points."""
    return scales if qzeros is None else qzeros.contiguous()
