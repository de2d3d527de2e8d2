"""Triton kernels for the matmul with a packed weight: two for a single row, one for a few dozen.

The first reads words whose codes follow each other along K ("natural" and "exllama"), each once. The others take any
layout and unpack a tile of the weight to float32 in registers. Either way only the packed bytes are read. The K axis is
split over programs where the output alone has too few tiles to fill the device; the partial sums are added in a fixed
order, so results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast
from pronghorn.kernels._triton import dot_type, shared_memory
from pronghorn.kernels.dequantize_weight.triton import (
    contiguous_zeros,
    dequantize_weight,
    scale_and_shift_at,
    weight_tile,
)

WORDS_BLOCK_N, WORDS_BLOCK_K, WORDS_WARPS = 64, 128, 4
WORDS_LAYOUTS = ("natural", "exllama")
ROW_BLOCK_N, ROW_BLOCK_K = 64, 128
BLOCK_M_SIZES, BLOCK_N, BLOCK_K = (16, 32, 64), 64, 64
ROOM = 144 << 10  # of shared memory, for three stages of the largest block in float32; two fit into 99 KiB
PROGRAMS_WANTED = 2112  # sixteen for each of an H100's 132 multiprocessors
LARGEST_SPLIT = 8
DEQUANTIZE_FROM_ROWS = 128  # from here on arithmetic is what counts: write the weight out once and leave it to cuBLAS


@triton.jit
def _multiply_row_of_words(
    x,
    qweight,
    scales,
    qzeros,
    partial,
    N,
    K,
    k_per_split,
    group_size,
    stored_groups,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A block of K lies within one group, so with W = code * scale + shift its share of the sum is
    # scale * sum(code * x) + shift * sum(x).
    per_word: tl.constexpr = 32 // BITS
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    start = tl.program_id(1).to(tl.int64) * k_per_split
    total = tl.zeros((BLOCK_K // per_word, BLOCK_N), dtype=tl.float32)
    shifts = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    for offset in range(0, k_per_split, BLOCK_K):
        word = ((start + offset) // per_word + tl.arange(0, BLOCK_K // per_word))[:, None]
        inside = word < K // per_word
        words = tl.load(qweight + word * N + n, mask=inside & (n < N), other=0)
        products = tl.zeros((BLOCK_K // per_word, BLOCK_N), dtype=tl.float32)
        inputs = tl.zeros((BLOCK_K // per_word, 1), dtype=tl.float32)
        for index in tl.static_range(per_word):
            value = tl.load(x + word * per_word + index, mask=inside, other=0.0).to(tl.float32)
            products += ((words >> (index * BITS)) & ((1 << BITS) - 1)).to(tl.float32) * value
            inputs += value
        groups = K // group_size
        group = tl.minimum((start + offset) // group_size, groups - 1)  # beyond the end the products are zero
        scale, shift = scale_and_shift_at(scales, qzeros, n, group, N, groups, stored_groups, n < N, LAYOUT)
        total += products * scale
        shifts += shift * tl.sum(inputs)
    row = tl.sum(total, axis=0)[None, :] + shifts
    tl.store(partial + tl.program_id(1).to(tl.int64) * N + n, row, mask=n < N)


@triton.jit
def _multiply_row(
    x,
    qweight,
    scales,
    qzeros,
    partial,
    N,
    K,
    k_per_split,
    group_size,
    stored_groups,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    start = tl.program_id(1).to(tl.int64) * k_per_split
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for offset in range(0, k_per_split, BLOCK_K):
        k = (start + offset + tl.arange(0, BLOCK_K))[:, None]
        weight = weight_tile(qweight, scales, qzeros, n, k, N, K, group_size, stored_groups, LAYOUT, BITS)
        total += weight * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    row = tl.sum(total, axis=0)[None, :]
    tl.store(partial + tl.program_id(1).to(tl.int64) * N + n, row, mask=n < N)


@triton.jit
def _multiply(
    x,
    qweight,
    scales,
    qzeros,
    partial,
    M,
    N,
    K,
    k_per_split,
    group_size,
    stored_groups,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = (tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    start = tl.program_id(2).to(tl.int64) * k_per_split
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for offset in range(0, k_per_split, BLOCK_K):
        k = start + offset + tl.arange(0, BLOCK_K)
        weight = weight_tile(qweight, scales, qzeros, n, k[:, None], N, K, group_size, stored_groups, LAYOUT, BITS)
        rows = tl.load(x + m * K + k[None, :], mask=(m < M) & (k[None, :] < K), other=0.0)
        total = tl.dot(rows.to(DOT_TYPE), weight.to(DOT_TYPE), total, input_precision="ieee")
    at = (tl.program_id(2).to(tl.int64) * M + m) * N + n
    tl.store(partial + at, total.to(partial.dtype.element_ty), mask=(m < M) & (n < N))


def w4a16_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    layout: str,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """x [M, K], contiguous, times the transposed weight, [M, N]."""
    rows, columns = x.shape
    if not rows or not out_features:
        return x.new_empty(rows, out_features)
    if rows >= DEQUANTIZE_FROM_ROWS:
        full = dequantize_weight(qweight, scales, qzeros, layout, bits, group_size, out_features, columns, x.dtype)
        return without_autocast(torch.matmul)(x, full.T)
    weight = (qweight.contiguous(), scales.contiguous(), contiguous_zeros(scales, qzeros))
    words_block_k = _words_block_k(layout, bits, group_size)
    if rows == 1:
        block_n, block_k = (WORDS_BLOCK_N, words_block_k) if words_block_k else (ROW_BLOCK_N, ROW_BLOCK_K)
        tiles = triton.cdiv(out_features, block_n)
    else:
        block_m = next((size for size in BLOCK_M_SIZES if rows <= size), BLOCK_M_SIZES[-1])
        tiles, block_k = triton.cdiv(rows, block_m) * triton.cdiv(out_features, BLOCK_N), BLOCK_K
    splits = _splits(tiles, columns, block_k)
    k_per_split = triton.cdiv(triton.cdiv(columns, splits), block_k) * block_k
    # A single split writes the result itself; partial sums stay in float32.
    dtype = x.dtype if splits == 1 else torch.float32
    partial = torch.empty(splits, rows, out_features, dtype=dtype, device=x.device)
    shape = (out_features, columns, k_per_split, group_size, scales.shape[1])
    if rows == 1:
        kernel = _multiply_row_of_words if words_block_k else _multiply_row
        kernel[(tiles, splits)](x, *weight, partial, *shape, layout, bits, block_n, block_k, num_warps=WORDS_WARPS)
    else:
        grid = (triton.cdiv(rows, block_m), triton.cdiv(out_features, BLOCK_N), splits)
        _multiply[grid](
            x, *weight, partial, rows, *shape, layout, bits, dot_type(x.dtype), block_m, BLOCK_N, BLOCK_K,
            num_stages=3 if shared_memory(x.device) >= ROOM else 2,
        )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0).to(x.dtype)


def _words_block_k(layout: str, bits: int, group_size: int) -> int:
    """Block of K for the kernel that reads words, 0 where it does not apply: codes that straddle words, odd groups."""
    if layout not in WORDS_LAYOUTS or 32 % bits or group_size % 32:
        return 0
    return min(WORDS_BLOCK_K, group_size & -group_size)


def _splits(tiles: int, columns: int, block_k: int) -> int:
    wanted: int = min(PROGRAMS_WANTED // tiles, triton.cdiv(columns, block_k), LARGEST_SPLIT)
    return 1 << max(0, wanted.bit_length() - 1)
