"""Triton kernels for the gradients of attention of branches over one observation.

One kernel goes by rows, for queries; one by keys, for values and then for keys: with wide heads the sums of both would
not fit into registers. A key of the prefix is seen by every row, and there are few keys of many rows, so several
programs share a tile of keys, each with a part of the rows; their sums are added up by a third kernel, in order.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._triton import blocks, dot_width
from pronghorn.kernels.shared_observation_attention.reference import Tensors
from pronghorn.kernels.shared_observation_attention.triton import (
    LOG2_E,
    Tile,
    arrange,
    constants,
    contiguous,
    grid_of_rows,
    load_rows,
    numbers,
    own_slots,
    pick,
    processors,
    row_numbers,
    sees_own,
    store_rows,
)

# As in `triton.py`. Of keys the rows are what is looped over.
QUERY = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 3)}
QUERY_TIGHT = {64: Tile(64, 64, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(32, 32, 4, 3)}
VALUE = {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 3), 256: Tile(64, 128, 8, 3)}
VALUE_TIGHT = {64: Tile(64, 64, 4, 3), 128: Tile(32, 64, 4, 3), 256: Tile(32, 64, 4, 3)}
KEY = {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 3), 256: Tile(32, 128, 8, 3)}
KEY_TIGHT = {64: Tile(64, 64, 4, 3), 128: Tile(32, 64, 4, 3), 256: Tile(32, 32, 4, 3)}
EXACT = Tile(16, 16, 8, 1)
MOST_PARTS = 32  # of the rows of a tile of keys
PART_COST = 4e-4  # of a pass over all rows: what writing and adding up a part of one tile takes all processors
SLOTS = 8  # of a tile that is added up


@triton.jit
def _query_tile(q, g, k, v, seen, total, delta, query_sum, FACTOR: tl.constexpr, DOT_TYPE: tl.constexpr):
    keys = k.to(DOT_TYPE)
    raw = tl.dot(q.to(DOT_TYPE), tl.trans(keys), input_precision="ieee")
    weights = tl.where(seen, tl.exp2(raw * FACTOR - total[:, None]), 0.0)
    slope = tl.dot(g.to(DOT_TYPE), tl.trans(v.to(DOT_TYPE)), input_precision="ieee")
    grad = (weights * (slope - delta[:, None])).to(k.dtype).to(DOT_TYPE)
    return tl.dot(grad, keys, query_sum, input_precision="ieee")


@Launcher
@triton.jit(do_not_specialize=["length", "tokens", "branch", "state"])
def _query_gradients(
    prefix_query, prefix_key, prefix_value, branch_query, branch_key, branch_value,
    prefix_grad, branch_grad, prefix_out, branch_out, prefix_total, branch_total, prefix_delta, branch_delta,
    of_prefix, of_branches, order, counts, length, tokens, branch, state,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    # Programs are in the forward's order. The sums of grad * out stay in the deltas, as long as there are heads.
    GROUPS: tl.constexpr = HEADS // GROUP
    block, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    order += b * (length + tokens)
    real = tl.load(counts + 2 * b)
    blocks_of_branches = tl.cdiv(tokens * GROUP, ROWS)
    if block < blocks_of_branches:
        first, every, stop, places = block * ROWS, tokens, tl.load(counts + 2 * b + 1), order + length
        heads, start = b * tokens * HEADS, b * tokens * HEADS * SIZE
        query, grad, out, to = branch_query + start, branch_grad + start, branch_out + start, of_branches + start
        totals, deltas = branch_total + heads, branch_delta + heads
        low, high = own_slots(first // GROUP, (first + ROWS - 1) // GROUP, stop, branch)
    else:
        first, every, stop, places = (block - blocks_of_branches) * ROWS, length, real, order
        heads, start = b * length * HEADS, b * length * HEADS * SIZE
        query, grad, out, to = prefix_query + start, prefix_grad + start, prefix_out + start, of_prefix + start
        totals, deltas = prefix_total + heads, prefix_delta + heads
        low, high = 0, 0
    row = first + tl.arange(0, ROWS)
    slot = row // GROUP
    number = row_numbers(places, slot, every, group * GROUP + row % GROUP, HEADS)
    there = slot < stop
    q, g = load_rows(query, number, there, SIZE, WIDTH), load_rows(grad, number, there, SIZE, WIDTH)
    result = load_rows(out, number, there, SIZE, WIDTH)
    delta = tl.sum(g.to(tl.float32) * result.to(tl.float32), axis=1)
    tl.store(deltas + number, delta, mask=there)
    total = tl.load(totals + number, mask=there, other=float("inf")) * LOG2_E
    query_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    keys, values = prefix_key + b * length * GROUPS * SIZE, prefix_value + b * length * GROUPS * SIZE
    for i in range(tl.where(first // GROUP < stop, tl.cdiv(real, KEYS), 0)):
        key = i * KEYS + tl.arange(0, KEYS)
        at = row_numbers(order, key, real, group, GROUPS)
        k, v = load_rows(keys, at, key < real, SIZE, WIDTH), load_rows(values, at, key < real, SIZE, WIDTH)
        query_sum = _query_tile(q, g, k, v, (key < real)[None, :], total, delta, query_sum, FACTOR, DOT_TYPE)
    keys, values = branch_key + b * tokens * GROUPS * SIZE, branch_value + b * tokens * GROUPS * SIZE
    for i in range(low, high, KEYS):
        key = i + tl.arange(0, KEYS)
        at = row_numbers(order + length, key, high, group, GROUPS)
        k, v = load_rows(keys, at, key < high, SIZE, WIDTH), load_rows(values, at, key < high, SIZE, WIDTH)
        seen = sees_own(slot[:, None], key[None, :], branch, state) & (key < high)[None, :]
        query_sum = _query_tile(q, g, k, v, seen, total, delta, query_sum, FACTOR, DOT_TYPE)
    store_rows(to, number, slot < every, query_sum * SCALE, SIZE, WIDTH)


@triton.jit
def _key_tile(
    key_sum, k, v, query, grad, totals, deltas, number, there, seen,
    FACTOR: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, VALUES: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):  # fmt: skip
    # All products are transposed: keys along the first axis. Rows that are not there weigh 0.
    q, g = load_rows(query, number, there, SIZE, WIDTH), load_rows(grad, number, there, SIZE, WIDTH)
    queries, grads = q.to(DOT_TYPE), g.to(DOT_TYPE)
    total = tl.load(totals + number, mask=there, other=float("inf")) * LOG2_E
    weights = tl.exp2(tl.dot(k, tl.trans(queries), input_precision="ieee") * FACTOR - total[None, :])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    if VALUES:
        return tl.dot(weights.to(g.dtype).to(DOT_TYPE), grads, key_sum, input_precision="ieee")
    delta = tl.load(deltas + number, mask=there, other=0.0)
    slope = tl.dot(v, tl.trans(grads), input_precision="ieee")
    weights = (weights * (slope - delta[None, :])).to(g.dtype).to(DOT_TYPE)
    return tl.dot(weights, queries, key_sum, input_precision="ieee")


@Launcher
@triton.jit(do_not_specialize=["length", "tokens", "branch", "state", "parts"])
def _key_gradients(
    prefix_query, prefix_key, prefix_value, branch_query, branch_key, branch_value,
    prefix_grad, branch_grad, prefix_total, branch_total, prefix_delta, branch_delta,
    of_prefix, of_branches, order, counts, length, tokens, branch, state, parts,
    ALONE: tl.constexpr, SCALE: tl.constexpr, VALUES: tl.constexpr,
    FACTOR: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """Of values, or else of keys."""
    GROUPS: tl.constexpr = HEADS // GROUP
    block, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    order += b * (length + tokens)
    real, many = tl.load(counts + 2 * b), tl.load(counts + 2 * b + 1)
    shared = tl.cdiv(length, KEYS) * parts
    part = block % parts
    if block < shared:  # these have most to do, so they begin first
        first, every, stop, places = block // parts * KEYS, length, real, order
        keys, values = prefix_key + b * length * GROUPS * SIZE, prefix_value + b * length * GROUPS * SIZE
        low, high = 0, 0
    else:  # some keys of one branch
        tile, in_branch = block - shared, tl.cdiv(branch, KEYS)
        low = tile // in_branch * branch
        first, every, places = low + tile % in_branch * KEYS, low + branch, order + length
        high = tl.where(low < many, every, low)
        stop = high
        keys, values = branch_key + b * tokens * GROUPS * SIZE, branch_value + b * tokens * GROUPS * SIZE
    # Tiles of the prefix's rows, then of the branches', of which a part has its share.
    before = tl.cdiv(real * GROUP, ROWS)
    tiles = tl.where((block < shared) & (first < real), before + tl.cdiv(many * GROUP, ROWS), 0)
    begin = tl.minimum(part * tl.cdiv(tiles, parts), tiles)
    end = tl.minimum(begin + tl.cdiv(tiles, parts), tiles)

    key = first + tl.arange(0, KEYS)
    at = row_numbers(places, key, every, group, GROUPS)
    k = load_rows(keys, at, key < stop, SIZE, WIDTH).to(DOT_TYPE)
    v = load_rows(values, at, key < stop, SIZE, WIDTH).to(DOT_TYPE)
    key_sum = tl.zeros([KEYS, WIDTH], tl.float32)
    start = b * length * HEADS
    query, grad = prefix_query + start * SIZE, prefix_grad + start * SIZE
    totals, deltas = prefix_total + start, prefix_delta + start
    for i in range(begin, tl.minimum(end, before)):
        row = i * ROWS + tl.arange(0, ROWS)
        number = row_numbers(order, row // GROUP, real, group * GROUP + row % GROUP, HEADS)
        key_sum = _key_tile(
            key_sum, k, v, query, grad, totals, deltas, number, row // GROUP < real, True,
            FACTOR, SIZE, WIDTH, False, VALUES, DOT_TYPE,
        )  # fmt: skip
    start = b * tokens * HEADS
    query, grad = branch_query + start * SIZE, branch_grad + start * SIZE
    totals, deltas = branch_total + start, branch_delta + start
    for i in range(tl.maximum(begin - before, 0), end - before):
        row = i * ROWS + tl.arange(0, ROWS)
        number = row_numbers(order + length, row // GROUP, many, group * GROUP + row % GROUP, HEADS)
        key_sum = _key_tile(
            key_sum, k, v, query, grad, totals, deltas, number, row // GROUP < many, True,
            FACTOR, SIZE, WIDTH, False, VALUES, DOT_TYPE,
        )  # fmt: skip
    for i in range(low * GROUP, high * GROUP, ROWS):
        row = i + tl.arange(0, ROWS)
        slot = row // GROUP
        number = row_numbers(order + length, slot, high, group * GROUP + row % GROUP, HEADS)
        key_sum = _key_tile(
            key_sum, k, v, query, grad, totals, deltas, number, slot < high,
            sees_own(slot[None, :], key[:, None], branch, state), FACTOR, SIZE, WIDTH, True, VALUES, DOT_TYPE,
        )  # fmt: skip
    key_sum = tl.where((key < stop)[:, None], key_sum if VALUES else key_sum * SCALE, 0.0)
    if block >= shared:
        store_rows(of_branches + b * tokens * GROUPS * SIZE, at, key < every, key_sum, SIZE, WIDTH)
    elif ALONE:
        store_rows(of_prefix + b * length * GROUPS * SIZE, at, key < every, key_sum, SIZE, WIDTH)
    else:  # slot by slot, in the order that they are added up in
        start = (part * tl.num_programs(2) + b) * length * GROUPS * SIZE
        store_rows(of_prefix + start, key * GROUPS + group, key < stop, key_sum, SIZE, WIDTH)


@Launcher
@triton.jit(do_not_specialize=["length", "tokens", "parts"])
def _add_up(
    sums, of_prefix, order, counts, length, tokens, parts,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """What parts of the rows gave the prefix's keys or values, and zeros for those that are masked out."""
    group, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    there = slot < tl.load(counts + 2 * b)
    sum = tl.zeros([SLOTS, WIDTH], tl.float32)
    for part in range(parts):
        start = (part * tl.num_programs(2) + b) * length * GROUPS * SIZE
        sum += load_rows(sums + start, slot * GROUPS + group, there, SIZE, WIDTH)
    to = row_numbers(order + b * (length + tokens), slot, length, group, GROUPS)
    store_rows(of_prefix + b * length * GROUPS * SIZE, to, slot < length, sum, SIZE, WIDTH)


def gradients(
    prefix_grad: Tensor, branch_grad: Tensor, prefix_out: Tensor, branch_out: Tensor,
    prefix_total: Tensor, branch_total: Tensor, tensors: Tensors, prefix_mask: Tensor, branch_mask: Tensor,
    state_tokens: int, scale: float,
) -> Tensors:  # fmt: skip
    """Of all six tensors; results and totals are as the forward left them."""
    tensors = contiguous(tensors)
    lists = arrange(prefix_mask, branch_mask, tensors.branch_query.shape[2])
    found = Tensors(*(torch.empty_like(tensor) for tensor in tensors))
    deltas = torch.empty_like(prefix_total), torch.empty_like(branch_total)
    grads = prefix_grad.contiguous(), branch_grad.contiguous()
    sizes = numbers(tensors, state_tokens)
    tile = pick("prefix_query", tensors.prefix_query, QUERY, QUERY_TIGHT, EXACT)
    _query_gradients(
        grid_of_rows(tensors, tile),
        (*tensors, *grads, prefix_out, branch_out, prefix_total, branch_total, *deltas, found.prefix_query,
         found.branch_query, *lists),
        sizes, (scale, *constants(tensors, scale, tile)), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    read = (*tensors, *grads, prefix_total, branch_total, *deltas)
    tile = pick("prefix_query", tensors.prefix_query, VALUE, VALUE_TIGHT, EXACT)
    how = scale, True, *constants(tensors, scale, tile)
    _of_keys(read, found.prefix_value, found.branch_value, lists, sizes, tile, how)
    tile = pick("prefix_query", tensors.prefix_query, KEY, KEY_TIGHT, EXACT)
    how = scale, False, *constants(tensors, scale, tile)
    _of_keys(read, found.prefix_key, found.branch_key, lists, sizes, tile, how)
    return found


def _of_keys(
    read: tuple[Tensor, ...], of_prefix: Tensor, of_branches: Tensor, lists: tuple[Tensor, Tensor],
    sizes: tuple[int, int, int, int], tile: Tile, how: tuple[Any, ...],
) -> None:  # fmt: skip
    """Fill in the gradients of keys or of values."""
    batch, length, groups, size = of_prefix.shape
    _, tokens, branch, _ = sizes
    shared, own = blocks(length, tile.keys), tokens // branch * blocks(branch, tile.keys)
    parts = _parts(shared * groups * batch, processors(of_prefix.device))
    sums = of_prefix.new_empty(parts, *of_prefix.shape, dtype=torch.float32) if parts > 1 else of_prefix
    _key_gradients(
        (shared * parts + own, groups, batch), (*read, sums, of_branches, *lists), (*sizes, parts),
        (parts == 1, *how), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        _add_up(
            (blocks(length, SLOTS), groups, batch), (sums, of_prefix, *lists), (length, tokens, parts),
            (groups, size, dot_width(size), SLOTS), num_warps=4,
        )  # fmt: skip


def _parts(tiles: int, processors: int) -> int:
    """In how many parts the rows of a tile of keys are best done, where a processor has one program at a time."""

    def time(parts: int) -> float:
        return blocks(tiles * parts, processors) / parts + (PART_COST * tiles * parts if parts > 1 else 0)

    return min(range(1, MOST_PARTS + 1), key=time)
