"""Triton kernel for attention of several branches over one observation: rows of tokens and heads against key tiles.

A first, small kernel lists the tokens of a sample, real ones first: of the prefix by its mask, of branches branch by
branch. The others then know a token by its slot in that list, so a hole in the prefix or a branch that does not count
costs nothing and is never read. The heads of a group are rows of one tile, which share the keys that are read.

The rows of all branches follow each other. After the prefix's keys a tile reads those of the branches it has rows of,
which is where a row may not see a key.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import LARGEST, Launcher
from pronghorn.kernels._triton import blocks, dot_type, dot_width, power_of_2, shared_memory
from pronghorn.kernels.shared_observation_attention.reference import Tensors


class Tile(NamedTuple):
    """Rows and keys multiplied at once, warps that do it, and tiles of the loop in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


# For heads up to 64, up to 128 and up to 256 wide in 16 bits: on GPUs whose blocks have `ROOM` of shared memory (Hopper
# and later), and on others, where all fit into 99 KiB. Three stages hold two tiles: where a tile lies is read first.
ROOM = 200 << 10
FORWARD = {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 3), 256: Tile(128, 64, 8, 3)}
FORWARD_TIGHT = {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 32, 4, 3)}
EXACT = Tile(32, 32, 8, 1)  # in 32 bits, which no tensor core multiplies exactly
PROCESSORS = 132  # where there is no GPU to ask
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: the difference of two is a number


@triton.jit
def _sort(mask, order, count, tokens, each, WIDTH: tl.constexpr):
    """Tokens, `each` of them with a bit of the mask, real ones first, and how many these are."""
    t = tl.arange(0, WIDTH)
    there = t < tokens
    real = (tl.load(mask + t // each, mask=there, other=0) != 0).to(tl.int32)
    before, number = tl.cumsum(real, axis=0), tl.sum(real, axis=0)
    tl.store(order + tl.where(real != 0, before - 1, number + t - before), t, mask=there)
    tl.store(count, number)


@Launcher
@triton.jit(do_not_specialize=["length", "tokens", "branch"])
def _arrange(
    prefix_mask, branch_mask, order, counts, length, tokens, branch, PREFIX: tl.constexpr, BRANCHES: tl.constexpr
):
    b = tl.program_id(1).to(tl.int64)
    order += b * (length + tokens)
    if tl.program_id(0) == 0:
        _sort(prefix_mask + b * length, order, counts + 2 * b, length, 1, PREFIX)
    else:
        _sort(branch_mask + b * (tokens // branch), order + length, counts + 2 * b + 1, tokens, branch, BRANCHES)


@triton.jit
def row_numbers(order, slot, stop, head, HEADS: tl.constexpr):
    """Which of a sample's tokens' heads the rows are that lie in slots; of slots from `stop` on, anything."""
    return tl.load(order + slot, mask=slot < stop, other=0) * HEADS + head


@triton.jit
def _places(number, there, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    inside = there[:, None]
    if SIZE < WIDTH:
        inside = inside & (d < SIZE)[None, :]
    return number[:, None] * SIZE + d[None, :], inside


@triton.jit
def load_rows(pointer, number, there, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH]; zeros where there is none, and beyond SIZE."""
    at, inside = _places(number, there, SIZE, WIDTH)
    return tl.load(pointer + at, mask=inside, other=0.0)


@triton.jit
def store_rows(pointer, number, there, rows, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """The counterpart of `load_rows`."""
    at, inside = _places(number, there, SIZE, WIDTH)
    tl.store(pointer + at, rows.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def own_slots(first, last, stop, branch):
    """From the first to behind the last slot of the branches that slots `first` to `last` lie in."""
    return first // branch * branch, tl.minimum((tl.minimum(last, stop - 1) // branch + 1) * branch, stop)


@triton.jit
def sees_own(slot, key, branch, state):
    """Whether a branch's token sees another: one of its branch, and if it is of the state, such a one."""
    return (slot // branch == key // branch) & ((slot % branch >= state) | (key % branch < state))


@triton.jit
def attend_tile(q, k, v, seen, peak, total, sum, FACTOR: tl.constexpr, DOT_TYPE: tl.constexpr):
    """The running softmax of rows, in base 2, with one more tile of keys."""
    raw = tl.dot(q, tl.trans(k.to(DOT_TYPE)), input_precision="ieee")
    raw = tl.where(seen, raw, float("-inf"))
    higher = tl.maximum(peak, tl.max(raw, axis=1) * FACTOR)
    weights = tl.exp2(raw * FACTOR - higher[:, None])
    shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    sum = tl.dot(weights.to(v.dtype).to(DOT_TYPE), v.to(DOT_TYPE), sum * shrink[:, None], input_precision="ieee")
    return higher, total, sum


@Launcher
@triton.jit(do_not_specialize=["length", "tokens", "branch", "state"])
def _forward(
    prefix_query, prefix_key, prefix_value, branch_query, branch_key, branch_value,
    prefix_out, branch_out, prefix_total, branch_total, order, counts, length, tokens, branch, state,
    FACTOR: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = HEADS // GROUP
    block, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    order += b * (length + tokens)
    real = tl.load(counts + 2 * b)
    of_branches = tl.cdiv(tokens * GROUP, ROWS)
    if block < of_branches:  # these have most to do, so they begin first
        first, every, stop, places = block * ROWS, tokens, tl.load(counts + 2 * b + 1), order + length
        query, out = branch_query + b * tokens * HEADS * SIZE, branch_out + b * tokens * HEADS * SIZE
        totals = branch_total + b * tokens * HEADS
        low, high = own_slots(first // GROUP, (first + ROWS - 1) // GROUP, stop, branch)
    else:
        first, every, stop, places = (block - of_branches) * ROWS, length, real, order
        query, out = prefix_query + b * length * HEADS * SIZE, prefix_out + b * length * HEADS * SIZE
        totals = prefix_total + b * length * HEADS
        low, high = 0, 0
    row = first + tl.arange(0, ROWS)
    slot = row // GROUP
    number = row_numbers(places, slot, every, group * GROUP + row % GROUP, HEADS)
    there = slot < stop
    q = load_rows(query, number, there, SIZE, WIDTH).to(DOT_TYPE)
    peak, total = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    sum = tl.zeros([ROWS, WIDTH], tl.float32)
    keys, values = prefix_key + b * length * GROUPS * SIZE, prefix_value + b * length * GROUPS * SIZE
    for i in range(tl.where(first // GROUP < stop, tl.cdiv(real, KEYS), 0)):
        key = i * KEYS + tl.arange(0, KEYS)
        at = row_numbers(order, key, real, group, GROUPS)
        k, v = load_rows(keys, at, key < real, SIZE, WIDTH), load_rows(values, at, key < real, SIZE, WIDTH)
        peak, total, sum = attend_tile(q, k, v, (key < real)[None, :], peak, total, sum, FACTOR, DOT_TYPE)
    keys, values = branch_key + b * tokens * GROUPS * SIZE, branch_value + b * tokens * GROUPS * SIZE
    for i in range(low, high, KEYS):
        key = i + tl.arange(0, KEYS)
        at = row_numbers(order + length, key, high, group, GROUPS)
        k, v = load_rows(keys, at, key < high, SIZE, WIDTH), load_rows(values, at, key < high, SIZE, WIDTH)
        seen = sees_own(slot[:, None], key[None, :], branch, state) & (key < high)[None, :]
        peak, total, sum = attend_tile(q, k, v, seen, peak, total, sum, FACTOR, DOT_TYPE)
    total = tl.where(there, total, 1.0)
    store_rows(out, number, slot < every, tl.where(there[:, None], sum / total[:, None], 0.0), SIZE, WIDTH)
    total = tl.where(there, (peak + tl.log2(total)) / LOG2_E, float("inf"))
    tl.store(totals + number, total, mask=slot < every)


def shared_observation_attention(
    tensors: Tensors, prefix_mask: Tensor, branch_mask: Tensor, state_tokens: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of prefix and branches, and log(sum(exp(scores))) of both, which is infinite where masked out."""
    tensors = contiguous(tensors)
    prefix, branches = tensors.prefix_query, tensors.branch_query
    order, counts = arrange(prefix_mask, branch_mask, branches.shape[2])
    prefix_out, branch_out = torch.empty_like(prefix), torch.empty_like(branches)
    prefix_total = prefix.new_empty(prefix.shape[:-1], dtype=torch.float32)
    branch_total = branches.new_empty(branches.shape[:-1], dtype=torch.float32)
    out = prefix_out, branch_out, prefix_total, branch_total
    tile = pick("prefix_query", prefix, FORWARD, FORWARD_TIGHT, EXACT)
    _forward(
        grid_of_rows(tensors, tile),
        (*tensors, *out, order, counts), numbers(tensors, state_tokens), constants(tensors, scale, tile),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def contiguous(tensors: Tensors) -> Tensors:
    """As the kernels read them."""
    return Tensors(*(tensor.contiguous() for tensor in tensors))


def arrange(prefix_mask: Tensor, branch_mask: Tensor, branch: int) -> tuple[Tensor, Tensor]:
    """Lists of tokens, int32 [batch, prefix tokens + all branches' tokens], and how many are real [batch, 2]."""
    batch, length = prefix_mask.shape
    tokens = branch_mask.shape[1] * branch
    order = torch.empty(batch, length + tokens, dtype=torch.int32, device=prefix_mask.device)
    counts = torch.empty(batch, 2, dtype=torch.int32, device=prefix_mask.device)
    masks = [mask.contiguous().view(torch.uint8) for mask in (prefix_mask, branch_mask)]
    _arrange(
        (2, batch, 1), (*masks, order, counts), (length, tokens, branch), (power_of_2(length), power_of_2(tokens)),
        num_warps=4,
    )  # fmt: skip
    return order, counts


def grid_of_rows(tensors: Tensors, tile: Tile) -> tuple[int, int, int]:
    """Tiles of the rows of all branches and of the prefix, key/value heads, samples."""
    batch, length, heads, _ = tensors.prefix_query.shape
    groups = tensors.prefix_key.shape[2]
    tokens = tensors.branch_query.shape[1] * tensors.branch_query.shape[2]
    return sum(blocks(count * (heads // groups), tile.rows) for count in (tokens, length)), groups, batch


def numbers(tensors: Tensors, state_tokens: int) -> tuple[int, int, int, int]:
    """From `length` to `state`, what the kernels take in this order."""
    branches, tokens = tensors.branch_query.shape[1:3]
    check_size("prefix_query", tensors.prefix_query)
    check_size("branch_query", tensors.branch_query)
    return tensors.prefix_query.shape[1], branches * tokens, tokens, state_tokens


def constants(tensors: Tensors, scale: float, tile: Tile) -> tuple[float | int | tl.dtype, ...]:
    """From `FACTOR` to `DOT_TYPE`, likewise."""
    heads, size = tensors.prefix_query.shape[2:]
    group = heads // tensors.prefix_key.shape[2]
    dtype = dot_type(tensors.prefix_query.dtype)
    return scale * LOG2_E.value, heads, group, size, dot_width(size), tile.rows, tile.keys, dtype


def check_size(name: str, tensor: Tensor) -> None:
    """A sample's numbers are counted in 32 bits."""
    if tensor[0].numel() > LARGEST:
        raise ValueError(f"{name}: got {tensor[0].numel()} numbers a sample, the Triton kernels take up to {LARGEST}")


def pick(name: str, query: Tensor, roomy: dict[int, Tile], tight: dict[int, Tile], exact: Tile) -> Tile:
    """The tile for a query's width, dtype and device."""
    width = max(64, dot_width(query.shape[-1]))
    if width > max(roomy):
        raise ValueError(f"{name}: got a head_dim of {query.shape[-1]}, the Triton kernels take up to {max(roomy)}")
    if query.dtype == torch.float32:
        return exact
    return (roomy if _roomy(query.device) else tight)[width]


@functools.cache
def processors(device: torch.device) -> int:
    """Of a GPU."""
    return PROCESSORS if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _roomy(device: torch.device) -> bool:
    return shared_memory(device) >= ROOM
