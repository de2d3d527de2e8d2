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

from pronghorn.kernels._dispatch import interpreting
from pronghorn.kernels._launch import Launcher, planned
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
PROGRAMS = 512  # that a GPU runs at once
MOST_PARTS = 8  # whose sums are read by all of the second kernel, rather than added up by a kernel between the two
FEW_TILES = 64  # of a head; so few are not worth more parts
UNIT = 16
Strides = tuple[int, ...]
RELU_OF_PAIRS = tl.constexpr("{.reg .b32 zero; mov.b32 zero, 0; max.NaN.bf16x2 $0, $1, zero;}")
RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
LEAST_ROWS = tl.constexpr(16)  # of a product


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
def _relu(x, DOT_TYPE: tl.constexpr, PTX: tl.constexpr):
    """relu(x) as an operand of a product. NaN stays."""
    if PTX and x.dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise(RELU_OF_PAIRS, "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
        return x.to(DOT_TYPE)
    x = x.to(tl.float32)  # the interpreter has no comparison of bfloat16
    return tl.where(x < 0, 0.0, x).to(DOT_TYPE)


@triton.jit
def _in_two(x, DOT_TYPE: tl.constexpr):
    """The upper bits of float32 and the rest, each as an operand of a product.

    Tensor cores multiply 11 bits by a float16, and 8 by a bfloat16: of a sum, 22 and 16 bits are seen.
    """
    if tl.bfloat16 == DOT_TYPE:
        high = x.to(tl.bfloat16)
        return high, (x - high.to(tl.float32)).to(tl.bfloat16)
    else:  # without it Triton would want both to give the same type
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        return high, x - high


@Launcher
@triton.jit(
    do_not_specialize=["tokens", "heads", "tiles", "k_batch", "k_head", "k_step", "v_batch", "v_head", "v_step"]
)
def _sum_state(
    k, v, sums, tokens, heads, tiles, k_batch, k_head, k_step, v_batch, v_head, v_step,
    TOKEN_UNIT: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, K_INSIDE: tl.constexpr,
    V_INSIDE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, DOT_TYPE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """[v; 1] relu(k)^T of one part of one head's tokens."""
    row, part = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    tokens = tokens * TOKEN_UNIT
    r, c = tl.arange(0, WIDTH), tl.arange(0, WIDTH)
    start = part * tiles * TOKENS
    state, total = tl.zeros([WIDTH, WIDTH], tl.float32), tl.zeros([LEAST_ROWS, WIDTH], tl.float32)
    ones = tl.full([LEAST_ROWS, TOKENS], 1.0, DOT_TYPE)  # a product adds up without waiting for other threads
    for i in range(tl.minimum(tiles, tl.cdiv(tokens - start, TOKENS))):
        first = start + i * TOKENS
        at, there = _tile(
            k, c, batch, head, first, tokens, k_batch * K_UNIT, k_head * K_UNIT, k_step * K_UNIT,
            SIZE, TOKENS, K_INSIDE,
        )  # fmt: skip
        key = tl.trans(_relu(tl.load(at, mask=there, other=0.0), DOT_TYPE, PTX))
        at, there = _tile(
            v, c, batch, head, first, tokens, v_batch * V_UNIT, v_head * V_UNIT, v_step * V_UNIT,
            SIZE, TOKENS, V_INSIDE,
        )  # fmt: skip
        value = tl.load(at, mask=there, other=0.0)
        state = tl.dot(value.to(DOT_TYPE), key, state, input_precision="ieee")
        total = tl.dot(ones, key, total, input_precision="ieee")
    sums += (part.to(tl.int64) * tl.num_programs(0) + row) * ((SIZE + 1) * SIZE)
    tl.store(sums + r[:, None] * SIZE + c[None, :], state, mask=(r < SIZE)[:, None] & (c < SIZE)[None, :])
    row = tl.arange(0, LEAST_ROWS)
    at = sums + SIZE * SIZE + row[:, None] * 0 + c[None, :]
    tl.store(at, total, mask=(row == 0)[:, None] & (c < SIZE)[None, :])


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
    TOKENS: tl.constexpr, PARTS: tl.constexpr, DOT_TYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """ROWS of the state, of which there are PARTS to be added up, times relu(q), for one part of one head's tokens."""
    row, part = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    tokens = tokens * TOKEN_UNIT
    sums += row.to(tl.int64) * ((SIZE + 1) * SIZE)
    r, c = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    state, total = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.static_range(PARTS):
        of = sums + i * (tl.num_programs(0).to(tl.int64) * ((SIZE + 1) * SIZE)) + c[None, :]
        state += tl.load(of + r[:, None] * SIZE, mask=(r < SIZE)[:, None] & (c < SIZE)[None, :], other=0.0)
        # The same in every row: so the product with it stands where what it divides stands.
        total += tl.load(of + r[:, None] * 0 + SIZE * SIZE, mask=(c < SIZE)[None, :] & (r >= 0)[:, None], other=0.0)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    if not EXACT:
        state, low = _in_two(state, DOT_TYPE)
        total, low_total = _in_two(total, DOT_TYPE)
    start = part * tiles * TOKENS
    for i in range(tl.minimum(tiles, tl.cdiv(tokens - start, TOKENS))):
        first = start + i * TOKENS
        at, there = _tile(
            q, c, batch, head, first, tokens, q_batch * Q_UNIT, q_head * Q_UNIT, q_step * Q_UNIT,
            SIZE, TOKENS, Q_INSIDE,
        )  # fmt: skip
        query = _relu(tl.load(at, mask=there, other=0.0), DOT_TYPE, PTX)
        read, weight = tl.dot(state, query, input_precision=PRECISION), tl.dot(total, query, input_precision=PRECISION)
        if not EXACT:
            read = tl.dot(low, query, read, input_precision=PRECISION)
            weight = tl.dot(low_total, query, weight, input_precision=PRECISION)
        weight += EPS
        if PTX:
            weight = tl.inline_asm_elementwise(RECIPROCAL, "=f,f", [weight], dtype=tl.float32, is_pure=True, pack=1)
            read = read * weight
        else:
            read = read / weight
        at, there = _tile(
            out, r, batch, head, first, tokens, out_batch * OUT_UNIT, out_head * OUT_UNIT, out_step * OUT_UNIT,
            SIZE, TOKENS, OUT_INSIDE,
        )  # fmt: skip
        tl.store(at, read.to(out.dtype.element_ty), mask=there)


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """[batch, heads, tokens, head_dim], in memory as `q` is."""
    return _read(q, _sums(k, v), eps)


def key_value_state(k: Tensor, v: Tensor) -> Tensor:
    """float32 [batch, heads, head_dim + 1, head_dim]; parts are added in a fixed order."""
    sums = _sums(k, v)
    return sums[0] if len(sums) == 1 else sums.sum(dim=0)


def attend_state(q: Tensor, state: Tensor, eps: float) -> Tensor:
    """[batch, heads, tokens, head_dim], in memory as `q` is."""
    return _read(q, state.contiguous()[None], eps)


def _sums(k: Tensor, v: Tensor) -> Tensor:
    """The state of each part of the tokens, float32 [parts, batch, heads, head_dim + 1, head_dim]."""
    k, v = _readable(k), _readable(v)
    found, grid, numbers, constants, tile = _sum_plan(k.shape, k.stride(), v.stride(), k.dtype, _ptx(k))
    sums = torch.empty(found, dtype=torch.float32, device=k.device)
    _sum_state(grid, (k, v, sums), numbers, constants, num_warps=tile.warps, num_stages=tile.stages)
    return sums


@planned
def _sum_plan(shape: torch.Size, k: Strides, v: Strides, dtype: torch.dtype, ptx: bool) -> tuple[Any, ...]:
    """Shape of the states, grid, numbers, constants and tile."""
    batch, heads, tokens, size = shape
    tile, tiles, parts = _parts(shape, dtype)
    tokens, token_unit = _divided(tokens)
    k_strides, k_unit, k_inside = _strides(shape, k)
    v_strides, v_unit, v_inside = _strides(shape, v)
    return (
        (parts, batch, heads, size + 1, size), (batch * heads, parts, 1),
        (tokens, heads, tiles, *k_strides, *v_strides),
        (token_unit, k_unit, v_unit, k_inside, v_inside, size, dot_width(size), tile.tokens, dot_type(dtype), ptx),
        tile,
    )  # fmt: skip


def _read(q: Tensor, sums: Tensor, eps: float) -> Tensor:
    """What queries read from the sum of states, [parts, batch, heads, head_dim + 1, head_dim]."""
    if len(sums) > MOST_PARTS:
        sums = sums.sum(dim=0, keepdim=True)
    out = torch.empty_like(q)
    q, written = _readable(q), out
    if not _reads(out.shape, out.stride()):
        written = torch.empty(out.shape, dtype=q.dtype, device=q.device)
    grid, numbers, constants, tile = _read_plan(q.shape, q.stride(), written.stride(), q.dtype, len(sums), eps, _ptx(q))
    _read_state(grid, (q, sums, written), numbers, constants, num_warps=tile.warps, num_stages=tile.stages)
    return out if written is out else out.copy_(written)


@planned
def _read_plan(
    shape: torch.Size, q: Strides, out: Strides, dtype: torch.dtype, states: int, eps: float, ptx: bool
) -> tuple[Any, ...]:
    """Grid, numbers, constants and tile."""
    batch, heads, tokens, size = shape
    tile, tiles, parts = _parts(shape, dtype)
    tokens, token_unit = _divided(tokens)
    rows = min(dot_width(size), ROWS_OF_WIDE if size > WIDE else WIDE)
    q_strides, q_unit, q_inside = _strides(shape, q)
    out_strides, out_unit, out_inside = _strides(shape, out)
    product = dot_type(dtype) if dtype == torch.bfloat16 else tl.float32
    return (
        (batch * heads, parts, blocks(size, rows)), (tokens, heads, tiles, *q_strides, *out_strides),
        (
            token_unit, q_unit, out_unit, q_inside, out_inside, eps, size, dot_width(size), rows, tile.tokens, states,
            product, ptx,
        ),
        tile,
    )  # fmt: skip


def _ptx(tensor: Tensor) -> bool:
    """Whether kernels use instructions of NVIDIA's, which round as 16 bits allow."""
    return tensor.element_size() == 2 and torch.version.hip is None and not interpreting()


def _tokens_inside(shape: torch.Size, strides: Strides) -> bool:
    return strides[2] == 1 and shape[2] > 1


def _reads(shape: torch.Size, strides: Strides) -> bool:
    """Whether tokens or channels are adjacent."""
    return strides[3] == 1 or _tokens_inside(shape, strides)


def _readable(tensor: Tensor) -> Tensor:
    """With adjacent tokens or channels."""
    return tensor if _reads(tensor.shape, tensor.stride()) else tensor.contiguous()


def _divided(*numbers: int) -> tuple[Any, ...]:
    """Numbers divided by a unit, and the unit."""
    unit = 1 if any(number % UNIT for number in numbers) else UNIT
    return *(number // unit for number in numbers), unit


def _strides(shape: torch.Size, strides: Strides) -> tuple[tuple[int, ...], int, bool]:
    """Those of batch and head, and from one channel or token to the next, divided by a unit; whether tokens adjoin."""
    inside = _tokens_inside(shape, strides)
    axes = (0, 1, 3 if inside else 2)
    *divided, unit = _divided(*(strides[axis] if shape[axis] > 1 else 0 for axis in axes))
    return tuple(divided), unit, inside


def _parts(shape: torch.Size, dtype: torch.dtype) -> tuple[Tile, int, int]:
    """The tile, how many of them a program takes, and programs for each head."""
    batch, heads, tokens, size = shape
    tiles_of = FP32 if dtype == torch.float32 else TILES
    tile = next(tile for most, tile in tiles_of.items() if size <= most)
    whole = blocks(tokens, tile.tokens)
    parts = min(whole, max(1, PROGRAMS // (batch * heads)), MOST_PARTS if whole <= FEW_TILES else whole)
    tiles = blocks(whole, parts)
    return tile, tiles, blocks(tokens, tiles * tile.tokens)
