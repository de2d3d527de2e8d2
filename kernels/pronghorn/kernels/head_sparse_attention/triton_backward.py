"""Triton kernels for the gradients of head-typed sparse attention: one by rows for queries, one by keys."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._memory import tokens_outside
from pronghorn.kernels._triton import dot_type
from pronghorn.kernels.head_sparse_attention.reference import Rule
from pronghorn.kernels.head_sparse_attention.triton import (
    LOG2_E,
    Tile,
    border_tile,
    first_recent,
    head_arguments,
    head_rule,
    inner_contiguous,
    key_tiles,
    load_rows,
    raw_scores,
    sees,
    store_rows,
    tile_width,
)

# As in `triton.py`. Of keys the rows are what is looped over.
QUERY = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 16, 8, 2)}
KEY = {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 2), 256: Tile(16, 64, 8, 2)}
QUERY_FP32 = KEY_FP32 = Tile(16, 16, 8, 1)


@triton.jit
def _query_tile(
    query_grad,
    q,
    g,
    total,
    delta,
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
    v = load_rows(values, first, value_token, length, KEYS, SIZE, WIDTH, MASKED, DOT_TYPE)
    raw = raw_scores(q, tl.trans(k), bend, CAPPED)
    weights = tl.exp2(raw * factor - total[:, None])
    if MASKED:
        key = first + tl.arange(0, KEYS)
        weights = tl.where(sees(position[:, None], key[None, :], recent[:, None], begin, sink_end), weights, 0.0)
    grad = weights * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
    if CAPPED:
        grad *= 1 - raw * raw
    grad = grad.to(keys.dtype.element_ty).to(DOT_TYPE)
    return tl.dot(grad, k, query_grad, input_precision="ieee")


@triton.jit
def _query_gradient(
    query_grad,
    query,
    key,
    value,
    grad,
    out,
    log_sum_exp,
    deltas,
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
    scale,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    grad_batch,
    grad_head,
    grad_token,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    # The order of programs is the forward's. The sums of grad * out stay in `deltas` [batch, heads, tokens].
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
    rows = grad + b * grad_batch + h.to(tl.int64) * grad_head
    g = load_rows(rows, first, grad_token, tokens, ROWS, SIZE, WIDTH, True, DOT_TYPE)
    rows = (b * tokens * heads + h) * SIZE  # of results
    result = load_rows(out + rows, first, heads * SIZE, tokens, ROWS, SIZE, WIDTH, True, DOT_TYPE)
    numbers = (b * heads + h) * tokens
    delta = tl.sum(g.to(tl.float32) * result.to(tl.float32), axis=1)
    tl.store(deltas + numbers + row, delta, mask=row < tokens)
    total = tl.load(log_sum_exp + numbers + row, mask=row < tokens, other=0.0) * LOG2_E
    group = (h // (heads // groups)).to(tl.int64)
    keys, values = key + b * key_batch + group * key_head, value + b * value_batch + group * value_head
    sum = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range((sink_stop - sink) + (full - near) + (end - full_stop)):
        sum = _query_tile(
            sum, q, g, total, delta, keys, values, key_token, value_token,
            border_tile(i, sink, sink_stop, near, full, full_stop), row + offset, recent, begin, sink_end, length,
            factor, bend, SIZE, WIDTH, KEYS, CAPPED, True, DOT_TYPE,
        )  # fmt: skip
    for i in range(full_stop - full):
        sum = _query_tile(
            sum, q, g, total, delta, keys, values, key_token, value_token,
            full + i, row + offset, recent, begin, sink_end, length,
            factor, bend, SIZE, WIDTH, KEYS, CAPPED, False, DOT_TYPE,
        )  # fmt: skip
    store_rows(query_grad + rows, first, heads * SIZE, tokens, sum * scale, ROWS, SIZE, WIDTH)


@triton.jit
def _rows_reaching(key, reach, tokens, BLOCK: tl.constexpr):
    """How many rows have recent keys from `key` on, or from before it."""
    return tl.minimum(tl.maximum(key - reach + BLOCK, 0) // BLOCK * BLOCK, tokens)


@triton.jit
def _row_tiles(
    key,
    offset,
    tokens,
    begin,
    sink_end,
    reach,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """(first, full, full_stop, stop): tiles of rows that see some key from `key` to the tile's last; all in between."""
    last = key + KEYS - 1
    stop = tl.where(key < sink_end, tokens, _rows_reaching(last, reach, tokens, BLOCK))
    stop = tl.where(last < begin, 0, stop)
    first = tl.maximum(key - offset, 0) // ROWS
    stop = tl.maximum(tl.cdiv(stop, ROWS), first)
    full_stop = tl.where(last < sink_end, tokens, _rows_reaching(key, reach, tokens, BLOCK))
    full_stop = tl.where(key < begin, 0, full_stop)
    full = tl.minimum(tl.cdiv(tl.maximum(last - offset, 0), ROWS), stop)
    full_stop = tl.minimum(tl.maximum(full_stop // ROWS, full), stop)
    return first, full, full_stop, stop


@triton.jit
def _key_tile(
    key_grad,
    value_grad,
    k,
    v,
    queries,
    grads,
    query_token,
    grad_token,
    log_sum_exp,
    deltas,
    tile,
    key,
    tokens,
    offset,
    begin,
    sink_end,
    reach,
    factor,
    bend,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    # All products are transposed: keys along the first axis. Rows that are none have no gradient, so they add 0.
    first = tile * ROWS
    row = first + tl.arange(0, ROWS)
    q = load_rows(queries, first, query_token, tokens, ROWS, SIZE, WIDTH, MASKED, DOT_TYPE)
    g = load_rows(grads, first, grad_token, tokens, ROWS, SIZE, WIDTH, MASKED, DOT_TYPE)
    raw = raw_scores(k, tl.trans(q), bend, CAPPED)
    total = tl.load(log_sum_exp + row, mask=row < tokens, other=0.0) * LOG2_E
    weights = tl.exp2(raw * factor - total[None, :])
    if MASKED:
        recent = first_recent(row, begin, reach, BLOCK)
        seen = sees((row + offset)[None, :], key[:, None], recent[None, :], begin, sink_end)
        weights = tl.where(seen, weights, 0.0)
    value_grad = tl.dot(weights.to(grads.dtype.element_ty).to(DOT_TYPE), g, value_grad, input_precision="ieee")
    delta = tl.load(deltas + row, mask=row < tokens, other=0.0)
    grad = weights * (tl.dot(v, tl.trans(g), input_precision="ieee") - delta[None, :])
    if CAPPED:
        grad *= 1 - raw * raw
    key_grad = tl.dot(grad.to(grads.dtype.element_ty).to(DOT_TYPE), q, key_grad, input_precision="ieee")
    return key_grad, value_grad


@triton.jit
def _key_gradients(
    key_grad,
    value_grad,
    query,
    key,
    value,
    grad,
    log_sum_exp,
    deltas,
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
    scale,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    grad_batch,
    grad_head,
    grad_token,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    # Early keys, which most rows see, come first. The sums run over all heads of the group.
    program, blocks = tl.program_id(0), tl.cdiv(length, KEYS)
    group, b = program % groups, (program // (groups * blocks)).to(tl.int64)
    first = program // groups % blocks * KEYS
    keys = key + b * key_batch + group.to(tl.int64) * key_head
    values = value + b * value_batch + group.to(tl.int64) * value_head
    k = load_rows(keys, first, key_token, length, KEYS, SIZE, WIDTH, True, DOT_TYPE)
    v = load_rows(values, first, value_token, length, KEYS, SIZE, WIDTH, True, DOT_TYPE)
    at, offset = first + tl.arange(0, KEYS), length - tokens
    key_sum = tl.zeros([KEYS, WIDTH], tl.float32)
    value_sum = tl.zeros([KEYS, WIDTH], tl.float32)
    for h in range(group * (heads // groups), (group + 1) * (heads // groups)):
        begin, sink_end, own_reach = head_rule(head_types, start, b, h, sink_size, reach, PADDED)
        tile, full, full_stop, stop = _row_tiles(first, offset, tokens, begin, sink_end, own_reach, BLOCK, ROWS, KEYS)
        head = tl.cast(h, tl.int64)
        queries, grads = query + b * query_batch + head * query_head, grad + b * grad_batch + head * grad_head
        totals, sums = log_sum_exp + (b * heads + head) * tokens, deltas + (b * heads + head) * tokens
        for i in range((full - tile) + (stop - full_stop)):
            key_sum, value_sum = _key_tile(
                key_sum, value_sum, k, v, queries, grads, query_token, grad_token, totals, sums,
                border_tile(i, tile, tile, tile, full, full_stop), at, tokens, offset, begin, sink_end, own_reach,
                factor, bend, SIZE, WIDTH, ROWS, BLOCK, CAPPED, True, DOT_TYPE,
            )  # fmt: skip
        for i in range(full_stop - full):
            key_sum, value_sum = _key_tile(
                key_sum, value_sum, k, v, queries, grads, query_token, grad_token, totals, sums,
                full + i, at, tokens, offset, begin, sink_end, own_reach,
                factor, bend, SIZE, WIDTH, ROWS, BLOCK, CAPPED, False, DOT_TYPE,
            )  # fmt: skip
    rows = (b * length * groups + group) * SIZE
    store_rows(key_grad + rows, first, groups * SIZE, length, key_sum * scale, KEYS, SIZE, WIDTH)
    store_rows(value_grad + rows, first, groups * SIZE, length, value_sum, KEYS, SIZE, WIDTH)


def backward(
    grad: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_types: Tensor,
    start: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `out` lies in memory as the forward left it."""
    query, key, value, grad = inner_contiguous(query, key, value, grad)
    batch, heads, tokens, size = query.shape
    groups, length = key.shape[1:3]
    query_grad, key_grad, value_grad = tokens_outside(query), tokens_outside(key), tokens_outside(value)
    deltas = torch.empty_like(log_sum_exp)
    width = tile_width(size)
    numbers = (*head_arguments(query, key, head_types, start, rule), rule.scale)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3])
    how = (rule.block_size, rule.softcap > 0, start is not None, dot_type(query.dtype))
    exact = query.dtype == torch.float32
    tile = QUERY_FP32 if exact else QUERY[max(width, 64)]
    _query_gradient[(triton.cdiv(tokens, tile.rows) * heads * batch,)](
        query_grad, query, key, value, grad, out, log_sum_exp, deltas, *numbers, *strides,
        size, width, tile.rows, tile.keys, *how, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = KEY_FP32 if exact else KEY[max(width, 64)]
    _key_gradients[(triton.cdiv(length, tile.keys) * groups * batch,)](
        key_grad, value_grad, query, key, value, grad, log_sum_exp, deltas, *numbers, *strides,
        size, width, tile.rows, tile.keys, *how, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return query_grad, key_grad, value_grad
