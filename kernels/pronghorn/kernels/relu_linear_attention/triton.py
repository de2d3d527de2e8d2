"""Triton kernels for linear attention with ReLU: parts of the tokens are summed up, then every part reads the sum.

A tile is [channels, tokens], whichever of them is adjacent in memory. Triton makes wide loads only where it knows that
strides and the number of tokens divide by 16, so such numbers are given divided by a constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._triton import blocks, dot_type, dot_width


class Tile(NamedTuple):
    """Tokens multiplied at once, warps that do it, and tiles of the loop in flight."""

    tokens: int
    warps: int
    stages: int


# For heads up to so wide; 32 bits, which no tensor core multiplies exactly, want more registers.
TILES = {64: Tile(128, 4, 3), 128: Tile(64, 8, 3)}
FP32 = {32: Tile(32, 8, 2), 128: Tile(16, 8, 2)}
WIDE, ROWS_OF_WIDE = 64, 32  # of wider heads, so many rows of the state fit into registers and shared memory
PROGRAMS = 1024  # that keep a GPU busy: a few for each multiprocessor
UNIT = 16


@triton.jit
def _tile(
    pointer, channel, batch, head, first, tokens, batch_stride, head_stride, step,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Places of [channels, TOKENS] from token `first` on, and which of them are there.

    INSIDE: tokens are adjacent, and `step` leads from channel to channel; else the other way round.
    """
    token = tl.arange(0, TOKENS)
    pointer += batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    if INSIDE:
        at = pointer + first + channel.to(tl.int64)[:, None] * step + token[None, :]
    else:
        at = pointer + first.to(tl.int64) * step + token.to(tl.int64)[None, :] * step + channel[:, None]
    return at, (channel < SIZE)[:, None] & (first + token < tokens)[None, :]


@triton.jit
def _relu(x):
    x = x.to(tl.float32)  # the interpreter has no comparison of bfloat16
    return tl.where(x < 0, 0.0, x)  # NaN stays


@Launcher
@triton.jit(
    do_not_specialize=["tokens", "heads", "tiles", "k_batch", "k_head", "k_step", "v_batch", "v_head", "v_step"]
)
def _sum_state(
    k, v, sums, tokens, heads, tiles, k_batch, k_head, k_step, v_batch, v_head, v_step,
    TOKEN_UNIT: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, K_INSIDE: tl.constexpr,
    V_INSIDE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """[v; 1] relu(k)^T of one part of one head's tokens."""
    row, part = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    tokens = tokens * TOKEN_UNIT
    r, c = tl.arange(0, WIDTH), tl.arange(0, WIDTH)
    start = part * tiles * TOKENS
    state, total = tl.zeros([WIDTH, WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for i in range(tl.minimum(tiles, tl.cdiv(tokens - start, TOKENS))):
        first = start + i * TOKENS
        at, there = _tile(
            k, c, batch, head, first, tokens, k_batch * K_UNIT, k_head * K_UNIT, k_step * K_UNIT,
            SIZE, TOKENS, K_INSIDE,
        )  # fmt: skip
        key = _relu(tl.load(at, mask=there, other=0.0))
        at, there = _tile(
            v, c, batch, head, first, tokens, v_batch * V_UNIT, v_head * V_UNIT, v_step * V_UNIT,
            SIZE, TOKENS, V_INSIDE,
        )  # fmt: skip
        value = tl.load(at, mask=there, other=0.0)
        state = tl.dot(value.to(DOT_TYPE), tl.trans(key.to(DOT_TYPE)), state, input_precision="ieee")
        total += tl.sum(key, axis=1)
    sums += (part.to(tl.int64) * tl.num_programs(0) + row) * ((SIZE + 1) * SIZE)
    tl.store(sums + r[:, None] * SIZE + c[None, :], state, mask=(r < SIZE)[:, None] & (c < SIZE)[None, :])
    tl.store(sums + SIZE * SIZE + c, total, mask=c < SIZE)


@Launcher
@triton.jit(
    do_not_specialize=[
        "tokens", "heads", "tiles", "q_batch", "q_head", "q_step", "out_batch", "out_head", "out_step"
    ]
)  # fmt: skip
def _read_state(
    q, sums, out, tokens, heads, tiles, q_batch, q_head, q_step, out_batch, out_head, out_step,
    TOKEN_UNIT: tl.constexpr, Q_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, Q_INSIDE: tl.constexpr,
    OUT_INSIDE: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """ROWS of the state times relu(q), for one part of one head's tokens."""
    row, part = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    tokens = tokens * TOKEN_UNIT
    sums += row.to(tl.int64) * ((SIZE + 1) * SIZE)
    r, c = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    state = tl.load(
        sums + r[:, None] * SIZE + c[None, :], mask=(r < SIZE)[:, None] & (c < SIZE)[None, :], other=0.0
    )  # fmt: skip
    total = tl.load(sums + SIZE * SIZE + c, mask=c < SIZE, other=0.0)
    # Its 11 upper bits, and the rest: together, tensor cores multiply them by a query of 16 bits to 22 bits.
    high = (state.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    low = state - high
    start = part * tiles * TOKENS
    for i in range(tl.minimum(tiles, tl.cdiv(tokens - start, TOKENS))):
        first = start + i * TOKENS
        at, there = _tile(
            q, c, batch, head, first, tokens, q_batch * Q_UNIT, q_head * Q_UNIT, q_step * Q_UNIT,
            SIZE, TOKENS, Q_INSIDE,
        )  # fmt: skip
        query = _relu(tl.load(at, mask=there, other=0.0))
        if q.dtype.element_ty == tl.float32:
            read = tl.dot(state, query, input_precision="ieee")
        else:
            read = tl.dot(low, query, tl.dot(high, query, input_precision="tf32"), input_precision="tf32")
        read = read / (tl.sum(query * total[:, None], axis=0) + EPS)[None, :]
        at, there = _tile(
            out, r, batch, head, first, tokens, out_batch * OUT_UNIT, out_head * OUT_UNIT, out_step * OUT_UNIT,
            SIZE, TOKENS, OUT_INSIDE,
        )  # fmt: skip
        tl.store(at, read.to(out.dtype.element_ty), mask=there)


def key_value_state(k: Tensor, v: Tensor) -> Tensor:
    """float32 [batch, heads, head_dim + 1, head_dim]; parts are added in a fixed order."""
    k, v = _readable(k), _readable(v)
    batch, heads, tokens, size = k.shape
    tile, tiles, parts = _parts(k)
    sums = torch.empty(parts, batch, heads, size + 1, size, dtype=torch.float32, device=k.device)
    tokens, token_unit = _divided(tokens)
    k_strides, k_unit, k_inside = _strides(k)
    v_strides, v_unit, v_inside = _strides(v)
    _sum_state(
        (batch * heads, parts, 1), (k, v, sums), (tokens, heads, tiles, *k_strides, *v_strides),
        (token_unit, k_unit, v_unit, k_inside, v_inside, size, dot_width(size), tile.tokens, dot_type(k.dtype)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return sums[0] if parts == 1 else sums.sum(dim=0)


def attend_state(q: Tensor, state: Tensor, eps: float) -> Tensor:
    """[batch, heads, tokens, head_dim], in memory as `q` is."""
    out = torch.empty_like(q)
    q, state = _readable(q), state.contiguous()
    batch, heads, tokens, size = q.shape
    tile, tiles, parts = _parts(q)
    tokens, token_unit = _divided(tokens)
    written = (
        out if _tokens_inside(out) or out.stride(3) == 1 else torch.empty(out.shape, dtype=q.dtype, device=q.device)
    )
    rows = min(dot_width(size), ROWS_OF_WIDE if size > WIDE else WIDE)
    q_strides, q_unit, q_inside = _strides(q)
    out_strides, out_unit, out_inside = _strides(written)
    _read_state(
        (batch * heads, parts, blocks(size, rows)), (q, state, written),
        (tokens, heads, tiles, *q_strides, *out_strides),
        (token_unit, q_unit, out_unit, q_inside, out_inside, eps, size, dot_width(size), rows, tile.tokens),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out if written is out else out.copy_(written)


def _tokens_inside(tensor: Tensor) -> bool:
    return tensor.stride(2) == 1 and tensor.shape[2] > 1


def _readable(tensor: Tensor) -> Tensor:
    """With adjacent tokens or channels."""
    return tensor if _tokens_inside(tensor) or tensor.stride(3) == 1 else tensor.contiguous()


def _divided(*numbers: int) -> tuple[Any, ...]:
    """Numbers divided by a unit, and the unit."""
    unit = 1 if any(number % UNIT for number in numbers) else UNIT
    return *(number // unit for number in numbers), unit


def _strides(tensor: Tensor) -> tuple[tuple[int, ...], int, bool]:
    """Those of batch and head, and from one channel or token to the next, divided by a unit; whether tokens adjoin."""
    inside = _tokens_inside(tensor)
    axes = (0, 1, 3 if inside else 2)
    *strides, unit = _divided(*(tensor.stride(axis) if tensor.shape[axis] > 1 else 0 for axis in axes))
    return tuple(strides), unit, inside


def _parts(tensor: Tensor) -> tuple[Tile, int, int]:
    """The tile, how many of them a program takes, and programs for each head."""
    batch, heads, tokens, size = tensor.shape
    tiles_of = FP32 if tensor.dtype == torch.float32 else TILES
    tile = next(tile for most, tile in tiles_of.items() if size <= most)
    parts = min(blocks(tokens, tile.tokens), max(1, PROGRAMS // (batch * heads)))
    tiles = blocks(blocks(tokens, parts), tile.tokens)
    return tile, tiles, blocks(tokens, tiles * tile.tokens)
