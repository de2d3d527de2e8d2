"""Triton kernels for the matmul with a packed weight: one for a single row, one for a few dozen.

Both unpack a tile of the weight to float32 in registers from whatever layout it is in, so that only the packed bytes
are read. The K axis is split over programs where the output alone has too few tiles to fill the device; the partial
sums are added in a fixed order, so results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._dispatch import interpreting
from pronghorn.kernels.dequantize_weight.triton import contiguous_zeros, dequantize_weight, weight_tile

ROW_BLOCK_N, ROW_BLOCK_K = 64, 128
BLOCK_M_SIZES, BLOCK_N, BLOCK_K = (16, 32, 64), 64, 64
PROGRAMS_WANTED = 528  # four for each of an H100's 132 multiprocessors
LARGEST_SPLIT = 16
DEQUANTIZE_FROM_ROWS = 128  # from here on arithmetic is what counts: write the weight out once and leave it to cuBLAS


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
        return x @ full.T
    weight = (qweight.contiguous(), scales.contiguous(), contiguous_zeros(scales, qzeros))
    if rows == 1:
        tiles, block_k = triton.cdiv(out_features, ROW_BLOCK_N), ROW_BLOCK_K
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
        _multiply_row[(tiles, splits)](x, *weight, partial, *shape, layout, bits, ROW_BLOCK_N, ROW_BLOCK_K)
    else:
        grid = (triton.cdiv(rows, block_m), triton.cdiv(out_features, BLOCK_N), splits)
        _multiply[grid](x, *weight, partial, rows, *shape, layout, bits, _dot_type(x.dtype), block_m, BLOCK_N, BLOCK_K)
    return partial[0] if splits == 1 else partial.sum(0).to(x.dtype)


def _splits(tiles: int, columns: int, block_k: int) -> int:
    wanted: int = min(PROGRAMS_WANTED // tiles, triton.cdiv(columns, block_k), LARGEST_SPLIT)
    return 1 << max(0, wanted.bit_length() - 1)


def _dot_type(dtype: torch.dtype) -> tl.dtype:
    # The interpreter multiplies 16-bit operands wrongly.
    if interpreting() or dtype == torch.float32:
        return tl.float32
    return tl.float16 if dtype == torch.float16 else tl.bfloat16
