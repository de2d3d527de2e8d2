"""Triton kernels for attention over a cached prefix and the new tokens: keys are split between blocks, then joined.

There are few rows (tokens of the heads of a group), so that each block has one tile of them and, where that fills the
GPU, one tile of keys: of the prefix or of the new tokens, which are read where they lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._triton import blocks, dot_type, dot_width, power_of_2
from pronghorn.kernels.shared_observation_attention.triton import (
    EXACT,
    LOG2_E,
    LOWEST,
    Tile,
    attend_tile,
    check_size,
    load_rows,
    pick,
    processors,
    store_rows,
)

# For heads up to 64, 128 and 256 wide in 16 bits, on GPUs with much shared memory and on others.
ROOMY = {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 64, 4, 2)}
TIGHT = {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 2)}


@Launcher
@triton.jit(do_not_specialize=["tokens", "length", "state", "splits", "share", "apart"])
def _attend(
    query, prefix_key, prefix_value, key, value, prefix_mask, out, partial, peaks, totals,
    tokens, length, state, splits, share, apart,
    FACTOR: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ALONE: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = HEADS // GROUP
    split, group, b = tl.program_id(0) % splits, tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    there = token < tokens
    number = token * HEADS + group * GROUP + row % GROUP
    q = load_rows(query + b * tokens * HEADS * SIZE, number, there, SIZE, WIDTH).to(DOT_TYPE)
    peak, total = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    sum = tl.zeros([ROWS, WIDTH], tl.float32)
    # Tiles of the prefix, then of the new tokens, of which a split has its share.
    before, begin, end = tl.cdiv(length, KEYS), split * share, (split + 1) * share
    keys, values = prefix_key + b * length * GROUPS * SIZE, prefix_value + b * length * GROUPS * SIZE
    for i in range(begin, tl.minimum(end, before)):
        at = i * KEYS + tl.arange(0, KEYS)
        seen = tl.load(prefix_mask + b * length + at, mask=at < length, other=0) != 0
        k = load_rows(keys, at * GROUPS + group, at < length, SIZE, WIDTH)
        v = load_rows(values, at * GROUPS + group, at < length, SIZE, WIDTH)
        peak, total, sum = attend_tile(q, k, v, seen[None, :], peak, total, sum, FACTOR, DOT_TYPE)
    keys, values = key + b * tokens * GROUPS * SIZE, value + b * tokens * apart * SIZE
    for i in range(tl.maximum(begin - before, 0), tl.minimum(end - before, tl.cdiv(tokens, KEYS))):
        at = i * KEYS + tl.arange(0, KEYS)
        k = load_rows(keys, at * GROUPS + group, at < tokens, SIZE, WIDTH)
        v = load_rows(values, at * apart + group, at < tokens, SIZE, WIDTH)
        seen = (at < tokens)[None, :] & ((token >= state)[:, None] | (at < state)[None, :])
        peak, total, sum = attend_tile(q, k, v, seen, peak, total, sum, FACTOR, DOT_TYPE)
    if ALONE:
        store_rows(out + b * tokens * HEADS * SIZE, number, there, sum / total[:, None], SIZE, WIDTH)
    else:
        start, to = b * tokens * HEADS * splits, number * splits + split
        store_rows(partial + start * SIZE, to, there, sum, SIZE, WIDTH)
        tl.store(peaks + start + to, peak, mask=there)
        tl.store(totals + start + to, total, mask=there)


@Launcher
@triton.jit(do_not_specialize=["splits"])
def _join(out, partial, peaks, totals, splits, SIZE: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One row of splits; one that sees nothing of a row has a total of 0 there."""
    row = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    at, there = row * splits + split, split < splits
    peak = tl.load(peaks + at, mask=there, other=LOWEST)
    total = tl.load(totals + at, mask=there, other=0.0)
    share = tl.where(total > 0, tl.exp2(peak - tl.max(peak, axis=0)), 0.0)
    sums = tl.load(partial + at[:, None] * SIZE + d[None, :], mask=there[:, None] & (d < SIZE)[None, :], other=0.0)
    result = tl.sum(sums * share[:, None], axis=0) / tl.sum(share * total, axis=0)
    tl.store(out + row * SIZE + d, result.to(out.dtype.element_ty), mask=d < SIZE)


def suffix_attention(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, key: Tensor, value: Tensor, prefix_mask: Tensor,
    state_tokens: int, scale: float,
) -> Tensor:  # fmt: skip
    """In the shape of the query."""
    for name, tensor in (("query", query), ("prefix_key", prefix_key)):
        check_size(name, tensor)
    tensors = [tensor.contiguous() for tensor in (query, prefix_key, prefix_value, key)]
    value, apart = _evenly(value)
    batch, tokens, heads, size = query.shape
    length, groups = prefix_key.shape[1:3]
    out = torch.empty_like(tensors[0])
    tile, width = pick("query", query, ROOMY, TIGHT, EXACT), dot_width(size)
    rows, tiles = blocks(tokens * (heads // groups), tile.rows), blocks(length, tile.keys) + blocks(tokens, tile.keys)
    share = blocks(tiles, max(1, processors(query.device) // (rows * groups * batch)))
    splits = blocks(tiles, share)
    parts = out.numel() // size * splits if splits > 1 else 0
    partial = torch.empty(parts, size, dtype=torch.float32, device=query.device)
    peaks, totals = torch.empty(2, parts, dtype=torch.float32, device=query.device)
    _attend(
        (rows * splits, groups, batch),
        (*tensors, value, prefix_mask.contiguous().view(torch.uint8), out, partial, peaks, totals),
        (tokens, length, state_tokens, splits, share, apart),
        (scale * LOG2_E.value, heads, heads // groups, size, width, tile.rows, tile.keys, splits == 1,
         dot_type(query.dtype)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        _join(
            (out.numel() // size, 1, 1), (out, partial, peaks, totals), (splits,), (size, width, power_of_2(splits)),
            num_warps=4,
        )  # fmt: skip
    return out


def _evenly(value: Tensor) -> tuple[Tensor, int]:
    """Values, and how many heads there is room for from one token to the next, as where a product gives queries too."""
    _, tokens, groups, size = value.shape
    apart, rest = divmod(value.stride(1), size)
    if rest or value.stride() != (tokens * apart * size, apart * size, size, 1):
        return value.contiguous(), groups
    return value, apart
