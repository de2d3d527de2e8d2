"""Triton kernels for squared norms of a linear layer's gradients: of tiles of them, or of tiles of Gram matrices.

A program has one tile of one trajectory of one layer, and gives its share of the norm; a table tells where inputs and
gradients of all layers of a shape are. Gram matrices are symmetric: below the diagonal is nothing to do, and what is
above it counts twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import ALIGNMENT, Launcher
from pronghorn.kernels._table import TYPES, device_table, tensor_at
from pronghorn.kernels._triton import blocks, dot_type, dot_width

MOST, MOST_FLOAT32 = 128, 64  # rows or columns of a tile; float32 takes three products, and registers for them
LEAST = 32  # of a tile that is made smaller so that there are programs enough
PROGRAMS = 132
DEPTH, DEEP = 32, 64  # that is summed over at once, in float32 and in 16 bits
STAGES = 3
WARPS, MOST_WARPS = 4, 8


@triton.jit
def _length(lengths, trajectory, positions, LIMITED: tl.constexpr):
    length = positions
    if LIMITED:
        length = tl.minimum(tl.load(lengths + trajectory), positions)
    return length


@triton.jit
def _sum_of_products(a, b):
    products = a.to(tl.float64) * b.to(tl.float64)
    return tl.sum(tl.sum(products, axis=1), axis=0)


@triton.jit
def _store_share(shares, share):
    """[trajectories, layers, tiles]"""
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    tl.store(shares + at * tl.num_programs(0) + tl.program_id(0), share)


@Launcher
@triton.jit(do_not_specialize=["positions"])
def _direct(
    table, lengths, shares, positions,
    IN: tl.constexpr, OUT: tl.constexpr, LIMITED: tl.constexpr, IN_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, DOT_TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Input features from `i` on and output features from `o` on."""
    trajectory, layer = tl.program_id(1).to(tl.int64), tl.program_id(2)
    across: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    i = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    o = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, DEPTH)
    length = _length(lengths, trajectory, positions, LIMITED)
    inputs = tensor_at(table + 2 * layer, IN_TYPE, ALIGNED) + trajectory * positions * IN
    gradients = tensor_at(table + 2 * layer + 1, OUT_TYPE, ALIGNED) + trajectory * positions * OUT
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, length, DEPTH):
        there = (step < length - first)[:, None]
        left = tl.load(inputs + (step[:, None] * IN + i[None, :]), mask=there & (i < IN)[None, :], other=0.0)
        right = tl.load(gradients + (step[:, None] * OUT + o[None, :]), mask=there & (o < OUT)[None, :], other=0.0)
        total = tl.dot(tl.trans(left.to(DOT_TYPE)), right.to(DOT_TYPE), total, input_precision="tf32x3")
        inputs += DEPTH * IN
        gradients += DEPTH * OUT
    _store_share(shares, _sum_of_products(total, total))


@triton.jit
def _gram(
    tensor, trajectory, row, column, length, positions, features,
    SIZE: tl.constexpr, DOT_TYPE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Products of positions from `row` on with those from `column` on, over the first `features`: all or none."""
    p, c = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    at = p[:, None] * SIZE + c[None, :]
    left = tensor + (trajectory * positions + row) * SIZE
    right = tensor + (trajectory * positions + column) * SIZE
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for first in range(0, features, DEPTH):
        inside = (c < SIZE - first)[None, :]
        a = tl.load(left + at, mask=(p < length - row)[:, None] & inside, other=0.0)
        b = tl.load(right + at, mask=(p < length - column)[:, None] & inside, other=0.0)
        total = tl.dot(a.to(DOT_TYPE), tl.trans(b.to(DOT_TYPE)), total, input_precision="tf32x3")
        left += DEPTH
        right += DEPTH
    return total


@Launcher
@triton.jit(do_not_specialize=["positions"])
def _by_gram(
    table, lengths, shares, positions,
    IN: tl.constexpr, OUT: tl.constexpr, LIMITED: tl.constexpr, IN_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, IN_DOT: tl.constexpr, OUT_DOT: tl.constexpr,
    ROWS: tl.constexpr, IN_DEPTH: tl.constexpr, OUT_DEPTH: tl.constexpr,
):  # fmt: skip
    trajectory, layer = tl.program_id(1).to(tl.int64), tl.program_id(2)
    across = tl.cdiv(positions, ROWS)
    row, column = (tl.program_id(0) // across) * ROWS, (tl.program_id(0) % across) * ROWS
    length = _length(lengths, trajectory, positions, LIMITED)
    there = (column >= row) & (column < length)
    inputs = tensor_at(table + 2 * layer, IN_TYPE, ALIGNED)
    gradients = tensor_at(table + 2 * layer + 1, OUT_TYPE, ALIGNED)
    a = _gram(inputs, trajectory, row, column, length, positions, tl.where(there, IN, 0), IN, IN_DOT, ROWS, IN_DEPTH)
    b = _gram(
        gradients, trajectory, row, column, length, positions, tl.where(there, OUT, 0), OUT, OUT_DOT, ROWS, OUT_DEPTH
    )
    share = _sum_of_products(a, b) * tl.where(column > row, 2.0, 1.0)
    _store_share(shares, share)


def ghost_norm_linear(pairs: list[tuple[Tensor, Tensor]], lengths: Tensor | None) -> Tensor:
    """float64 [trajectories], of inputs and output gradients of layers."""
    kinds: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for x, gradient in pairs:
        kinds.setdefault((x.shape, gradient.shape[2], x.dtype, gradient.dtype), []).append(
            (x.contiguous(), gradient.contiguous())
        )
    shares = [_of_one_shape(layers, lengths) for layers in kinds.values()]
    return (shares[0] if len(shares) == 1 else torch.cat(shares, dim=1)).sum(dim=1)


def _of_one_shape(layers: list[tuple[Tensor, Tensor]], lengths: Tensor | None) -> Tensor:
    """Shares of each trajectory's norm, [trajectories, shares]."""
    inputs, gradients = layers[0]
    trajectories, positions, in_features = inputs.shape
    out_features = gradients.shape[2]
    wide = torch.promote_types(inputs.dtype, gradients.dtype)
    rows, columns = direct_tile(len(layers) * trajectories, in_features, out_features, wide)
    square = gram_tile(len(layers) * trajectories, positions, wide)
    gram = gram_is_cheaper(positions, in_features, out_features, (rows, columns), square)
    tiles = blocks(positions, square) ** 2 if gram else blocks(in_features, rows) * blocks(out_features, columns)
    addresses = tuple([tensor.data_ptr() for pair in layers for tensor in pair])
    aligned = not any(address % ALIGNMENT for address in addresses)
    table = device_table(addresses, inputs.device)
    shares = torch.empty(trajectories, len(layers) * tiles, dtype=torch.float64, device=inputs.device)
    given = table, table if lengths is None else lengths.contiguous(), shares
    sizes = in_features, out_features, lengths is not None, TYPES[inputs.dtype], TYPES[gradients.dtype], aligned
    if gram:
        _by_gram(
            (tiles, trajectories, len(layers)), given, (positions,),
            (
                *sizes, dot_type(inputs.dtype), dot_type(gradients.dtype), square,
                _depth(in_features, inputs.dtype), _depth(out_features, gradients.dtype),
            ),
            num_warps=_warps(square, square), num_stages=STAGES,
        )  # fmt: skip
    else:
        _direct(
            (tiles, trajectories, len(layers)), given, (positions,),
            (*sizes, dot_type(wide), rows, columns, _depth(positions, wide)),
            num_warps=_warps(rows, columns), num_stages=STAGES,
        )  # fmt: skip
    return shares


def direct_tile(trajectories: int, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a tile of a gradient."""
    rows, columns = (min(_most(dtype), dot_width(size)) for size in (in_features, out_features))
    while (
        max(rows, columns) > LEAST
        and trajectories * blocks(in_features, rows) * blocks(out_features, columns) < PROGRAMS
    ):
        rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
    return rows, columns


def gram_tile(trajectories: int, positions: int, dtype: torch.dtype) -> int:
    """Rows and columns of a tile of a Gram matrix."""
    rows = min(_most(dtype), dot_width(positions))
    while rows > LEAST and trajectories * _on_and_above_diagonal(blocks(positions, rows)) < PROGRAMS:
        rows //= 2
    return rows


def gram_is_cheaper(positions: int, in_features: int, out_features: int, direct: tuple[int, int], square: int) -> bool:
    """Whether tiles of Gram matrices take fewer multiplications than tiles of the gradient."""
    rows, columns = direct
    of_gradient = blocks(in_features, rows) * rows * blocks(out_features, columns) * columns * positions
    return _on_and_above_diagonal(blocks(positions, square)) * square**2 * (in_features + out_features) < of_gradient


def _on_and_above_diagonal(number: int) -> int:
    return number * (number + 1) // 2


def _most(dtype: torch.dtype) -> int:
    return MOST_FLOAT32 if dtype == torch.float32 else MOST


def _depth(size: int, dtype: torch.dtype) -> int:
    return min(DEPTH if dtype == torch.float32 else DEEP, dot_width(size))


def _warps(rows: int, columns: int) -> int:
    return MOST_WARPS if rows * columns > MOST * MOST // 2 else WARPS
