"""Triton kernel for head-typed sparse attention: a program walks the key tiles its rows see, and masks the border ones.

Of each head three numbers say what it sees: `begin`, its first key; `sink_end`, the first key after its sink; `reach`,
from which recent keys follow (see `first_recent`). A dense head has no sink, and recent keys from `begin` on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._memory import tokens_outside
from pronghorn.kernels._triton import dot_type, dot_width
from pronghorn.kernels.head_sparse_attention.reference import STREAMING, Rule, window


class Tile(NamedTuple):
    """Queries and keys multiplied at once, warps that do it, and tiles of the loop in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


# For heads up to 64, up to 128 and up to 256 wide in 16 bits; in 32 bits, which no tensor core multiplies exactly. All
# fit into 99 KiB of shared memory on GPUs that have no more.
FORWARD = {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(64, 32, 4, 2)}
FORWARD_FP32 = Tile(32, 32, 8, 1)
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: the difference of two is a number
EVERYTHING = tl.constexpr(-(2**30))  # a reach from which all keys follow
STREAMS = tl.constexpr(STREAMING)


@triton.jit
def head_rule(head_types, start, batch, head, sink, reach, PADDED: tl.constexpr):
    """(begin, sink_end, reach) of a head."""
    streams = tl.load(head_types + head) == STREAMS
    begin = tl.maximum(tl.load(start + batch), 0) if PADDED else 0
    return begin, tl.where(streams, begin + sink, begin), tl.where(streams, reach, EVERYTHING)


@triton.jit
def first_recent(row, begin, reach, BLOCK: tl.constexpr):
    """The first recent key of a row."""
    return tl.maximum(row // BLOCK * BLOCK + reach, begin)


@triton.jit
def sees(position, key, recent, begin, sink_end):
    """Whether a query at `position`, whose recent keys begin at `recent`, sees `key`."""
    return (key <= position) & ((key >= recent) | ((key >= begin) & (key < sink_end)))


@triton.jit
def key_tiles(row, last, offset, begin, sink_end, reach, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """(sink, sink_stop, recent, full, full_stop, end), the tiles of keys that rows from `row` to `last` see.

    They are [sink, sink_stop) and [recent, end); of those, all rows see all keys of [full, full_stop).
    """
    end = tl.cdiv(last + offset + 1, KEYS)
    sink = tl.minimum(begin // KEYS, end)
    sink_stop = tl.where(sink_end > begin, tl.minimum(tl.cdiv(sink_end, KEYS), end), sink)
    recent = tl.minimum(tl.maximum(first_recent(row, begin, reach, BLOCK) // KEYS, sink_stop), end)
    full = tl.minimum(tl.maximum(tl.cdiv(first_recent(last, begin, reach, BLOCK), KEYS), recent), end)
    full_stop = tl.maximum((row + offset + 1) // KEYS, full)
    return sink, sink_stop, recent, full, full_stop, end


@triton.jit
def border_tile(i, sink, sink_stop, recent, full, full_stop):
    """The i-th tile of the sink, then of the recent ones around [full, full_stop)."""
    after = recent + i - (sink_stop - sink)
    after += tl.where(after >= full, full_stop - full, 0)
    return tl.where(i < sink_stop - sink, sink + i, after)


@triton.jit
def load_rows(
    pointer,
    first,
    stride,
    stop,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHECKED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """[COUNT, WIDTH] from row `first` on; zeros from row `stop` on, where CHECKED, and beyond SIZE."""
    row, d = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    at = (pointer + first.to(tl.int64) * stride) + row[:, None] * stride + d[None, :]
    if CHECKED or SIZE < WIDTH:
        rows = tl.load(at, mask=(first + row < stop)[:, None] & (d < SIZE)[None, :], other=0.0)
    else:
        rows = tl.load(at)
    return rows.to(DOT_TYPE)


@triton.jit
def store_rows(pointer, first, stride, stop, rows, COUNT: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """The counterpart of `load_rows`."""
    row, d = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    at = (pointer + first.to(tl.int64) * stride) + row[:, None] * stride + d[None, :]
    inside = (first + row < stop)[:, None] & (d < SIZE)[None, :]
    tl.store(at, rows.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def raw_scores(left, right, bend, CAPPED: tl.constexpr):
    """Products, in a cap's units where there is one: what `factor` turns into scores in base 2."""
    raw = tl.dot(left, right, input_precision="ieee")
    if CAPPED:
        raw = 1 - 2 / (tl.exp2(raw * bend) + 1)  # tanh
    return raw


@triton.jit
def _attend_tile(
    q,
    peak,
    total,
    sum,
    keys,
    values,
    key_token,
    value_token,
    tile,
    position,
    recent,
    begin,
    sink_end,
    length,
    factor,
    bend,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    first = tile * KEYS
    k = load_rows(keys, first, key_token, length, KEYS, SIZE, WIDTH, MASKED, DOT_TYPE)
    raw = raw_scores(q, tl.trans(k), bend, CAPPED)
    if MASKED:
        key = first + tl.arange(0, KEYS)
        raw = tl.where(sees(position[:, None], key[None, :], recent[:, None], begin, sink_end), raw, float("-inf"))
    higher = tl.maximum(peak, tl.max(raw, axis=1) * factor)
    weights = tl.exp2(raw * factor - higher[:, None])
    shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    v = load_rows(values, first, value_token, length, KEYS, SIZE, WIDTH, MASKED, DOT_TYPE)
    weights = weights.to(values.dtype.element_ty).to(DOT_TYPE)
    sum = tl.dot(weights, v, sum * shrink[:, None], input_precision="ieee")
    return higher, total, sum


# Lengths change from call to call in serving, and knowing that one divides by 16 would help nothing.
@triton.jit(do_not_specialize=["tokens", "length"])
def _forward(
    query,
    key,
    value,
    out,
    log_sum_exp,
    head_types,
    start,
    heads,
    groups,
    tokens,
    length,
    sink_size,
    reach,
    factor,
    bend,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    # Late rows, which see most, begin first; the heads of a group run side by side and share what they read.
    program, blocks = tl.program_id(0), tl.cdiv(tokens, ROWS)
    h, b = program % heads, (program // (heads * blocks)).to(tl.int64)
    first = (blocks - 1 - program // heads % blocks) * ROWS
    offset = length - tokens
    begin, sink_end, reach = head_rule(head_types, start, b, h, sink_size, reach, PADDED)
    row = first + tl.arange(0, ROWS)
    recent = first_recent(row, begin, reach, BLOCK)
    last = tl.minimum(first + ROWS, tokens) - 1
    sink, sink_stop, near, full, full_stop, end = key_tiles(first, last, offset, begin, sink_end, reach, BLOCK, KEYS)
    rows = query + b * query_batch + h.to(tl.int64) * query_head
    q = load_rows(rows, first, query_token, tokens, ROWS, SIZE, WIDTH, True, DOT_TYPE)
    group = (h // (heads // groups)).to(tl.int64)
    keys, values = key + b * key_batch + group * key_head, value + b * value_batch + group * value_head
    peak = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range((sink_stop - sink) + (full - near) + (end - full_stop)):
        peak, total, sum = _attend_tile(
            q, peak, total, sum, keys, values, key_token, value_token,
            border_tile(i, sink, sink_stop, near, full, full_stop), row + offset, recent, begin, sink_end, length,
            factor, bend, SIZE, WIDTH, KEYS, CAPPED, True, DOT_TYPE,
        )  # fmt: skip
    for i in range(full_stop - full):
        peak, total, sum = _attend_tile(
            q, peak, total, sum, keys, values, key_token, value_token,
            full + i, row + offset, recent, begin, sink_end, length,
            factor, bend, SIZE, WIDTH, KEYS, CAPPED, False, DOT_TYPE,
        )  # fmt: skip
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    sum = sum / total[:, None]
    store_rows(out + (b * tokens * heads + h) * SIZE, first, heads * SIZE, tokens, sum, ROWS, SIZE, WIDTH)
    totals = log_sum_exp + (b * heads + h) * tokens
    tl.store(totals + row, tl.where(blind, float("-inf"), (peak + tl.log2(total)) / LOG2_E), mask=row < tokens)


def head_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, head_types: Tensor, start: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """The result [batch, heads, tokens, head_dim] and log(sum(exp(scores))) [batch, heads, tokens]."""
    query, key, value = inner_contiguous(query, key, value)
    batch, heads, tokens, size = query.shape
    out = tokens_outside(query)
    log_sum_exp = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    width = tile_width(size)
    tile = FORWARD_FP32 if query.dtype == torch.float32 else FORWARD[max(width, 64)]
    _forward[(triton.cdiv(tokens, tile.rows) * heads * batch,)](
        query, key, value, out, log_sum_exp, *head_arguments(query, key, head_types, start, rule),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        size, width, tile.rows, tile.keys, rule.block_size, rule.softcap > 0, start is not None, dot_type(query.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, log_sum_exp


def head_arguments(
    query: Tensor, key: Tensor, head_types: Tensor, start: Tensor | None, rule: Rule
) -> tuple[Tensor | float, ...]:
    """From `head_types` to `bend`, what the kernels take in this order."""
    types = head_types.contiguous()
    heads, tokens, length = query.shape[1], query.shape[2], key.shape[2]
    factor, bend = (rule.softcap, 2 * rule.scale / rule.softcap) if rule.softcap else (rule.scale, 0.0)
    starts = types if start is None else start.contiguous()
    seen = window(tokens, length, rule.sink_size, rule.recent_size, rule.block_size)
    sizes = (heads, key.shape[1], tokens, length, *seen)
    return (types, starts, *sizes, factor * LOG2_E.value, bend * LOG2_E.value)


def inner_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose last dimension has no gaps."""
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)


def tile_width(size: int) -> int:
    """What a tile holds a head in."""
    width = dot_width(size)
    if width > max(FORWARD):
        raise ValueError(f"query: got a head_dim of {size}, the Triton kernels take up to {max(FORWARD)}")
    return width
