"""Triton kernels for attention over a cache: each block reads a stretch of one head of it, once for the whole group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._triton import dot_type, dot_width

# (rows of a block, slots of the cache it takes at once, warps, stages, blocks that keep a large GPU busy); rows are the
# tokens of all heads of a group.
FEW, MANY = (16, 64, 4, 3, 264), (64, 128, 4, 2, 264)
SHORTEST_STRETCH = 128
LOG2_E = 1.4426950408889634
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: the difference of two is a number


@triton.jit
def _attend(
    query,
    key,
    value,
    mask,
    out,
    partial,
    peaks,
    totals,
    scale,
    heads,
    cached,
    tokens,
    capacity,
    splits,
    stretch,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_slot,
    value_batch,
    value_head,
    value_slot,
    mask_batch,
    mask_token,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    ALONE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    head, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = head // cached, head % cached
    row = block * ROWS + tl.arange(0, ROWS)
    token, inside = row // GROUP, row < tokens * GROUP
    own_head = h * GROUP + row % GROUP
    d = tl.arange(0, WIDTH)
    used = d < SIZE
    at = b.to(tl.int64) * query_batch + own_head.to(tl.int64) * query_head + token.to(tl.int64) * query_token
    q = tl.load(query + at[:, None] + d[None, :], mask=inside[:, None] & used[None, :], other=0.0)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum = tl.zeros([ROWS, WIDTH], tl.float32)
    keys = key + b.to(tl.int64) * key_batch + h.to(tl.int64) * key_head
    values = value + b.to(tl.int64) * value_batch + h.to(tl.int64) * value_head
    masks = mask + b.to(tl.int64) * mask_batch + token.to(tl.int64)[:, None] * mask_token
    start = split * stretch
    for first in range(start, tl.minimum(start + stretch, capacity), SLOTS):
        slot = first + tl.arange(0, SLOTS)
        there = slot < capacity
        slot = slot.to(tl.int64)  # times its stride, which 32 bits need not hold
        seen = tl.load(masks + slot[None, :], mask=inside[:, None] & there[None, :], other=0) != 0
        if tl.max(tl.max(seen.to(tl.int32), axis=1), axis=0) > 0:
            k = tl.load(keys + slot[None, :] * key_slot + d[:, None], mask=there[None, :] & used[:, None], other=0.0)
            scores = tl.dot(q.to(DOT_TYPE), k.to(DOT_TYPE), input_precision="ieee") * scale
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(peak - higher)
            total = total * shrink + tl.sum(weights, axis=1)
            v = tl.load(
                values + slot[:, None] * value_slot + d[None, :], mask=there[:, None] & used[None, :], other=0.0
            )
            sum = sum * shrink[:, None]
            sum += tl.dot(weights.to(v.dtype).to(DOT_TYPE), v.to(DOT_TYPE), input_precision="ieee")
            peak = higher
    to = ((b * tokens + token) * heads + own_head).to(tl.int64)
    if ALONE:
        result = sum / tl.maximum(total, 1e-30)[:, None]
        tl.store(
            out + to[:, None] * SIZE + d[None, :], result.to(out.dtype.element_ty), mask=inside[:, None] & used[None, :]
        )
    else:
        to = to * splits + split
        tl.store(partial + to[:, None] * SIZE + d[None, :], sum, mask=inside[:, None] & used[None, :])
        tl.store(peaks + to, peak, mask=inside)
        tl.store(totals + to, total, mask=inside)


@triton.jit
def _join(out, partial, peaks, totals, split, SIZE: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    there, used = part < split, d < SIZE
    at = row * split + part
    peak = tl.load(peaks + at, mask=there, other=LOWEST)
    share = tl.exp2(peak - tl.max(peak, axis=0))
    total = tl.sum(share * tl.load(totals + at, mask=there, other=0.0), axis=0)
    sums = tl.load(partial + at[:, None] * SIZE + d[None, :], mask=there[:, None] & used[None, :], other=0.0)
    result = tl.sum(sums * share[:, None], axis=0) / tl.maximum(total, 1e-30)
    tl.store(out + row * SIZE + d, result.to(out.dtype.element_ty), mask=used)


def cached_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[batch, tokens, heads, size]."""
    query, key, value, mask = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, mask))
    batch, heads, tokens, size = query.shape
    cached, capacity = key.shape[1:3]
    group = heads // cached
    rows, slots, warps, stages, wanted = FEW if tokens * group <= FEW[0] else MANY
    blocks = batch * cached * triton.cdiv(tokens * group, rows)
    split = max(1, min(wanted // blocks, triton.cdiv(capacity, SHORTEST_STRETCH)))
    stretch = triton.cdiv(triton.cdiv(capacity, split), slots) * slots
    split = triton.cdiv(capacity, stretch) or 1
    out = torch.empty(batch, tokens, heads, size, dtype=query.dtype, device=query.device)
    parts = query.numel() // size * split if split > 1 else 0
    partial = torch.empty(parts, size, dtype=torch.float32, device=query.device)
    peaks, totals = torch.empty(2, parts, dtype=torch.float32, device=query.device)
    width = dot_width(size)
    _attend[(batch * cached, split, triton.cdiv(tokens * group, rows))](
        query, key, value, mask, out, partial, peaks, totals, scale * LOG2_E,
        heads, cached, tokens, capacity, split, stretch,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2),
        size, width, group, rows, slots, split == 1, dot_type(query.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if split > 1:
        _join[(query.numel() // size,)](
            out, partial, peaks, totals, split, size, width, triton.next_power_of_2(split), num_warps=4
        )
    return out
