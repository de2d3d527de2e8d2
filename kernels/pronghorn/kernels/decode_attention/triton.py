"""Triton kernels for decoding: a block reads a stretch of one head's cache, once for all query heads of its group."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._triton import dot_type, dot_width
from pronghorn.kernels.decode_attention.call import Call
from pronghorn.kernels.decode_attention.launch import SHORTEST_STRETCH, Launch, prepare

ROWS = 16  # least query heads of a tile: what tensor cores take
SLOTS = 64  # of the cache, that a block takes at once
BLOCKS = 528  # that keep a large GPU busy
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: the difference of two is a number
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scaled(scores, scale, softcap, CAPPED: tl.constexpr):
    """Scores as exponents of 2."""
    scores = scores * scale
    if CAPPED:
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E) / softcap) + 1.0))
    return scores * LOG2_E


@triton.jit
def _halves(codes, DOT_TYPE: tl.constexpr):
    """The codes of even and of odd channels."""
    return (codes >> 4).to(DOT_TYPE), (codes & 15).to(DOT_TYPE)


@triton.jit
def _attend(
    query, full_key, full_value, streaming_key, streaming_value,
    full_key_scale, full_key_zero, full_value_scale, full_value_zero,
    streaming_key_scale, streaming_key_zero, streaming_value_scale, streaming_value_zero,
    full_lengths, streaming_lengths, full_start, streaming_start, full_table, streaming_table, head_index,
    extra_key, extra_value,
    out, partial, peaks, totals, scale, softcap, kinds, splits,
    query_batch, query_head,
    full_batch, full_head, full_slot, full_scales_batch, full_scales_head,
    streaming_batch, streaming_head, streaming_slot, streaming_scales_batch, streaming_scales_head,
    full_pages, full_page_size, streaming_pages, streaming_page_size,
    full_sink, full_recent, streaming_sink, streaming_recent,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    BITS: tl.constexpr, PAGED: tl.constexpr, STARTS: tl.constexpr, EXTRA: tl.constexpr, CAPPED: tl.constexpr,
    ALONE: tl.constexpr, SHORTEST: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    split, b, h = tl.program_id(1), (tl.program_id(0) // kinds).to(tl.int64), tl.program_id(0) % kinds
    index = tl.load(head_index + h)
    if index >= 0:
        rank = index.to(tl.int64)
        keys, values = full_key + rank * full_head, full_value + rank * full_head
        to_batch, to_slot, to_scales = full_batch, full_slot, full_scales_batch
        key_scales, key_zeros = full_key_scale + rank * full_scales_head, full_key_zero + rank * full_scales_head
        value_scales = full_value_scale + rank * full_scales_head
        value_zeros = full_value_zero + rank * full_scales_head
        table, pages, page_size = full_table + b * full_pages, full_pages, full_page_size
        lengths, start = full_lengths + b, full_start + b
        sink, recent = full_sink, full_recent
    else:
        rank = (-1 - index).to(tl.int64)
        keys, values = streaming_key + rank * streaming_head, streaming_value + rank * streaming_head
        to_batch, to_slot, to_scales = streaming_batch, streaming_slot, streaming_scales_batch
        key_scales = streaming_key_scale + rank * streaming_scales_head
        key_zeros = streaming_key_zero + rank * streaming_scales_head
        value_scales = streaming_value_scale + rank * streaming_scales_head
        value_zeros = streaming_value_zero + rank * streaming_scales_head
        table, pages, page_size = streaming_table + b * streaming_pages, streaming_pages, streaming_page_size
        lengths, start = streaming_lengths + b, streaming_start + b
        sink, recent = streaming_sink, streaming_recent
    end = tl.minimum(tl.load(lengths), pages * page_size)
    # Places count the slots that are not passed over, between sink and recent ones.
    passed_over = tl.where(recent < 0, 0, tl.maximum(end - sink - recent, 0))
    end -= passed_over
    begin = 0
    least = 0
    if STARTS:
        least = tl.load(start)
        begin = tl.where(least < sink, least, tl.maximum(least - passed_over, tl.minimum(sink, least)))
    # Every split takes as much, but not less than pays; splits beyond those needed have nothing.
    stretch = tl.maximum(tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), SLOTS) * SLOTS, SHORTEST)
    begin += split * stretch
    end = tl.minimum(begin + stretch, end)

    row, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)  # of 4 bits, WIDTH counts pairs of channels
    inside, used = row < GROUP, d < (SIZE // 2 if BITS == 4 else SIZE)
    at = query + b * query_batch + (h * GROUP + row)[:, None] * query_head
    if BITS == 4:
        q = tl.load(at + 2 * d[None, :], mask=inside[:, None] & used[None, :], other=0.0)
        q_odd = tl.load(at + 2 * d[None, :] + 1, mask=inside[:, None] & used[None, :], other=0.0)
        q_sum = tl.sum(q.to(tl.float32), axis=1) + tl.sum(q_odd.to(tl.float32), axis=1)
        q_odd = q_odd.to(DOT_TYPE)
        sum_odd = tl.zeros([ROWS, WIDTH], tl.float32)
    else:
        q = tl.load(at + d[None, :], mask=inside[:, None] & used[None, :], other=0.0)
        q_sum = tl.sum(q.to(tl.float32), axis=1)
    q = q.to(DOT_TYPE)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    zeros = tl.zeros([ROWS], tl.float32)
    sum = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(begin, end, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        there = slot < end
        slot += tl.where(slot >= sink, passed_over, 0)
        if STARTS:
            there = there & (slot >= least)
        if PAGED:
            place = tl.load(table + slot // page_size, mask=there, other=0).to(tl.int64)
            inner = (slot % page_size).to(tl.int64)
        else:
            place = tl.zeros([SLOTS], tl.int64) + b
            inner = slot.to(tl.int64)
        at_slot = place * to_batch + inner * to_slot
        k = tl.load(keys + at_slot[None, :] + d[:, None], mask=there[None, :] & used[:, None], other=0)
        if BITS == 16:
            scores = tl.dot(q, k.to(DOT_TYPE), input_precision="ieee")
        else:
            at_scale = place * to_scales + inner
            if BITS == 4:
                even, odd = _halves(k, DOT_TYPE)
                scores = tl.dot(q, even, input_precision="ieee")
                scores = tl.dot(q_odd, odd, scores, input_precision="ieee")
            else:
                scores = tl.dot(q, k.to(DOT_TYPE), input_precision="ieee")
            k_scale = tl.load(key_scales + at_scale, mask=there, other=0.0).to(tl.float32)
            k_zero = tl.load(key_zeros + at_scale, mask=there, other=0.0).to(tl.float32)
            scores = scores * k_scale[None, :] + q_sum[:, None] * k_zero[None, :]
        scores = tl.where(there[None, :], _scaled(scores, scale, softcap, CAPPED), float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        peak = higher
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(values + at_slot[:, None] + d[None, :], mask=there[:, None] & used[None, :], other=0)
        sum = sum * shrink[:, None]
        if BITS == 16:
            sum = tl.dot(weights.to(query.dtype.element_ty).to(DOT_TYPE), v.to(DOT_TYPE), sum, input_precision="ieee")
        else:
            v_scale = tl.load(value_scales + at_scale, mask=there, other=0.0).to(tl.float32)
            v_zero = tl.load(value_zeros + at_scale, mask=there, other=0.0).to(tl.float32)
            zeros = zeros * shrink + tl.sum(weights * v_zero[None, :], axis=1)
            weights = (weights * v_scale[None, :]).to(query.dtype.element_ty).to(DOT_TYPE)
            if BITS == 4:
                even, odd = _halves(v, DOT_TYPE)
                sum = tl.dot(weights, even, sum, input_precision="ieee")
                sum_odd = tl.dot(weights, odd, sum_odd * shrink[:, None], input_precision="ieee")
            else:
                sum = tl.dot(weights, v.to(DOT_TYPE), sum, input_precision="ieee")
    sum += zeros[:, None]
    if BITS == 4:
        sum_odd += zeros[:, None]
    if EXTRA:  # noqa: SIM102 - known when compiled, the other is not
        if split == 0:  # the token that is in no cache
            own = (b * kinds + h) * SIZE
            if BITS == 4:
                k = tl.load(extra_key + own + 2 * d, mask=used, other=0.0).to(tl.float32)
                k_odd = tl.load(extra_key + own + 2 * d + 1, mask=used, other=0.0).to(tl.float32)
                v = tl.load(extra_value + own + 2 * d, mask=used, other=0.0).to(tl.float32)
                v_odd = tl.load(extra_value + own + 2 * d + 1, mask=used, other=0.0).to(tl.float32)
                score = tl.sum(q.to(tl.float32) * k[None, :], axis=1)
                score += tl.sum(q_odd.to(tl.float32) * k_odd[None, :], axis=1)
            else:
                k = tl.load(extra_key + own + d, mask=used, other=0.0).to(tl.float32)
                v = tl.load(extra_value + own + d, mask=used, other=0.0).to(tl.float32)
                score = tl.sum(q.to(tl.float32) * k[None, :], axis=1)
            score = _scaled(score, scale, softcap, CAPPED)
            higher = tl.maximum(peak, score)
            weight, shrink = tl.exp2(score - higher), tl.exp2(peak - higher)
            peak = higher
            total = total * shrink + weight
            sum = sum * shrink[:, None] + weight[:, None] * v[None, :]
            if BITS == 4:
                sum_odd = sum_odd * shrink[:, None] + weight[:, None] * v_odd[None, :]
    to = (b * kinds + h) * GROUP + row
    store = inside[:, None] & used[None, :]
    if ALONE:
        share = 1.0 / tl.maximum(total, 1e-30)
        target = out
    else:
        to = to * splits + split
        tl.store(peaks + to, peak, mask=inside)
        tl.store(totals + to, total, mask=inside)
        share = tl.full([ROWS], 1.0, tl.float32)
        target = partial
    if ALONE or (begin < end) or (EXTRA and split == 0):  # others are empty, and not read
        result = (sum * share[:, None]).to(target.dtype.element_ty)
        if BITS == 4:
            odd = (sum_odd * share[:, None]).to(target.dtype.element_ty)
            tl.store(target + to[:, None] * SIZE + 2 * d[None, :], result, mask=store)
            tl.store(target + to[:, None] * SIZE + 2 * d[None, :] + 1, odd, mask=store)
        else:
            tl.store(target + to[:, None] * SIZE + d[None, :], result, mask=store)


@triton.jit(do_not_specialize=["splits"])  # which differ from one size of batch to the next
def _join(out, partial, peaks, totals, splits, SIZE: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    at = row * splits + part
    total = tl.load(totals + at, mask=part < splits, other=0.0)
    filled = total > 0
    peak = tl.load(peaks + at, mask=filled, other=LOWEST)
    share = tl.exp2(peak - tl.max(peak, axis=0)) * filled.to(tl.float32)
    sums = tl.load(partial + at[:, None] * SIZE + d[None, :], mask=filled[:, None] & (d < SIZE)[None, :], other=0.0)
    result = tl.sum(sums * share[:, None], axis=0) / tl.maximum(tl.sum(share * total, axis=0), 1e-30)
    tl.store(out + row * SIZE + d, result.to(out.dtype.element_ty), mask=d < SIZE)


def decode_attention(call: Call) -> Tensor:
    """[batch, heads, 1, head_dim]."""
    launch, bits = prepare(call, blocks=BLOCKS), call.bits
    size, group = call.query.shape[3], call.query.shape[1] // call.head_index.shape[0]
    _attend[launch.grid](
        *launch.arguments,
        size, dot_width(size // 2 if bits == 4 else size), group,
        max(ROWS, triton.next_power_of_2(group)), SLOTS, bits, launch.paged, launch.started, launch.extra,
        call.softcap > 0, launch.splits == 1, SHORTEST_STRETCH, dot_type(call.query.dtype),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    join(launch)
    return launch.out


def join(launch: Launch) -> None:
    """Add up what several blocks had of a head."""
    splits, size = launch.splits, launch.out.shape[3]
    if splits > 1:
        _join[(launch.out.shape[0] * launch.out.shape[1],)](
            launch.out, *launch.parts, splits, size, triton.next_power_of_2(size), triton.next_power_of_2(splits),
            num_warps=4,
        )  # fmt: skip
