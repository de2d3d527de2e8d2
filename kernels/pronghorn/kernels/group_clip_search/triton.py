"""Triton kernel for the clip search: a tile of one group tries all maxima with the group's Gram matrix at hand."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast
from pronghorn.kernels._triton import dot_width, shared_memory
from pronghorn.kernels.group_fake_quantize.triton import fake_quantize_tile, smallest_range

ROWS, FEWER_ROWS = 64, 32
NUM_WARPS = 8
SPARE = 8 << 10  # bytes for what else the kernel keeps
LARGEST_GROUP = 128  # its Gram matrix, 64 KiB, must fit into shared memory


@triton.jit
def _search(
    weight,
    gram,
    shrink,
    maxima,
    N,
    K,
    group_size,
    smallest_range,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype = weight.dtype.element_ty
    group = tl.program_id(1).to(tl.int64)
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (n < N) & (column < group_size)
    tile = tl.load(weight + n * K + group * group_size + column, mask=inside, other=0.0).to(tl.float32)
    row = tl.arange(0, COLUMNS)[:, None]
    products = tl.load(
        gram + (group * group_size + row) * group_size + column,
        mask=(row < group_size) & (column < group_size),
        other=0.0,
    )
    largest = tl.max(tl.abs(tile), axis=1, keep_dims=True)
    best = largest
    smallest_error = tl.full((ROWS, 1), float("inf"), tl.float32)
    for step in range(STEPS):
        limit = (largest * tl.load(shrink + step)).to(dtype).to(tl.float32)
        clamped = tl.minimum(tl.maximum(tile, -limit), limit)
        fake, _, _ = fake_quantize_tile(
            clamped, (column < group_size) & (n >= 0), smallest_range, dtype, BITS, SYMMETRIC
        )
        difference = tl.where(inside, (fake - tile).to(dtype).to(tl.float32), 0.0)
        projected = tl.dot(difference, products, input_precision=PRECISION)
        error = tl.sum(projected * difference, axis=1, keep_dims=True)
        better = error < smallest_error
        best = tl.where(better, limit, best)
        smallest_error = tl.where(better, error, smallest_error)
    tl.store(maxima + n * (K // group_size) + group, best.to(dtype), mask=n < N)


@functools.cache
def _shrink(grid: int, steps: int, device: torch.device) -> Tensor:
    return torch.tensor([1 - index / grid for index in range(steps)], dtype=torch.float32, device=device)


def group_clip_search(
    weight: Tensor, inputs: Tensor, bits: int, group_size: int, symmetric: bool, grid: int, steps: int
) -> Tensor:
    """Clip maxima [N, K/group_size] of a contiguous weight."""
    rows, columns = weight.shape
    groups = columns // group_size
    x = inputs.float().unflatten(1, (groups, group_size)).transpose(0, 1)
    gram = (without_autocast(torch.matmul)(x.mT, x) / inputs.shape[0]).contiguous()
    maxima = weight.new_empty(rows, groups)
    if maxima.numel():
        shrink, width = _shrink(grid, steps, weight.device), dot_width(group_size)
        # Three products in TF32 want both factors twice. Without room for them it is one in float32, of fewer rows.
        roomy = shared_memory(weight.device) >= 2 * 4 * width * (width + ROWS) + SPARE
        tile = ROWS if roomy else FEWER_ROWS
        _search[(triton.cdiv(rows, tile), groups)](
            weight,
            gram,
            shrink,
            maxima,
            rows,
            columns,
            group_size,
            smallest_range(weight.dtype),
            steps,
            bits,
            symmetric,
            tile,
            width,
            "tf32x3" if roomy else "ieee",
            num_warps=NUM_WARPS,
        )
    return maxima
