"""Triton kernels for fetch-on-demand: tiles of pairs of one offset are multiplied in one launch and added atomically.

How many tiles an offset has is data that only the device knows. Offset k gets the tiles from starts[k] // rows + k to
those of the next offset: as many as it needs, or one more. Their total, pairs // rows + offsets, needs no data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._triton import dot_type, dot_width


class Tile(NamedTuple):
    """What a block computes: pairs and columns of the result; what it sums over at a time; warps and stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# By output channels, up to each; rows are halved where offsets have few pairs, or the GPU too few tiles.
TILES = {
    32: Tile(128, 32, 32, 4, 3),
    64: Tile(128, 64, 64, 4, 3),
    1 << 30: Tile(128, 128, 64, 8, 3),
}
FEWEST_ROWS = 16
INNER_BYTES = 128  # of a row at a time, so that stages fit into shared memory
BUSY = 264  # blocks
GRADIENT = Tile(64, 64, 64, 4, 3)  # `inner` input by `columns` output channels, `rows` pairs summed at a time
GRADIENT_BLOCKS = 512
# Without tensor cores a thread holds its operands in registers: larger ones spill.
FLOAT32_TILE, FLOAT32_GRADIENT = Tile(64, 64, 16, 4, 2), Tile(16, 64, 64, 8, 3)
SUMMED = 1024  # elements that a block adds up


@triton.jit
def _find(starts, tile, volume, rows, OFFSETS: tl.constexpr):
    """Offset of a tile, and from where to where its pairs stand: nowhere, if the tile is not needed."""
    # All at once: a loop here keeps Triton from pipelining the one that follows.
    k = tl.arange(0, OFFSETS)
    tiles = tl.load(starts + k, mask=k < volume, other=0).to(tl.int64) // rows + k
    k = tl.sum(((tiles <= tile) & (k < volume)).to(tl.int32), axis=0) - 1
    start, end = tl.load(starts + k).to(tl.int64), tl.load(starts + k + 1).to(tl.int64)
    start += (tile - start // rows - k) * rows
    return k, start, tl.minimum(start + rows, end)


@triton.jit(do_not_specialize=["volume"])
def _multiply(
    x, weight, sources, targets, starts, scale, out, volume, weight_offset, weight_in, weight_out,
    IN: tl.constexpr, OUT: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, OFFSETS: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k, start, end = _find(starts, tl.program_id(0), volume, ROWS, OFFSETS)
    if start >= end:
        return
    pair, n = start + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = pair < end
    i = tl.load(sources + pair, mask=inside, other=0).to(tl.int64)
    weight += k.to(tl.int64) * weight_offset
    sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, IN, INNER):
        c = first + tl.arange(0, INNER)
        a = tl.load(x + i[:, None] * IN + c[None, :], mask=inside[:, None] & (c < IN)[None, :], other=0.0)
        b = tl.load(
            weight + c[:, None] * weight_in + n[None, :] * weight_out,
            mask=(c < IN)[:, None] & (n < OUT)[None, :], other=0.0,
        )  # fmt: skip
        sum = tl.dot(a.to(DOT_TYPE), b.to(DOT_TYPE), sum, input_precision=PRECISION)
    if SCALED:
        sum *= tl.load(scale + pair, mask=inside, other=0.0)[:, None]
    o = tl.load(targets + pair, mask=inside, other=0).to(tl.int64)
    # Nobody reads before the kernel ends, so no addition waits for another.
    tl.atomic_add(out + o[:, None] * OUT + n[None, :], sum, mask=inside[:, None] & (n < OUT)[None, :], sem="relaxed")


@triton.jit(do_not_specialize=["volume", "stretch"])
def _weight_gradient(
    x, grad, sources, targets, starts, scale, parts, volume, stretch,
    IN: tl.constexpr, OUT: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, OFFSETS: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _, start, end = _find(starts, tl.program_id(0), volume, stretch, OFFSETS)
    BLOCKS: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    c = (tl.program_id(1) // BLOCKS) * INNER + tl.arange(0, INNER)
    n = (tl.program_id(1) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    sum = tl.zeros([INNER, COLUMNS], tl.float32)
    for first in range(start, end, ROWS):
        pair = first + tl.arange(0, ROWS)
        inside = pair < end
        i = tl.load(sources + pair, mask=inside, other=0).to(tl.int64)
        o = tl.load(targets + pair, mask=inside, other=0).to(tl.int64)
        a = tl.load(x + i[None, :] * IN + c[:, None], mask=inside[None, :] & (c < IN)[:, None], other=0.0)
        g = tl.load(grad + o[:, None] * OUT + n[None, :], mask=inside[:, None] & (n < OUT)[None, :], other=0.0)
        if SCALED:
            g = g.to(tl.float32) * tl.load(scale + pair, mask=inside, other=0.0)[:, None]
        sum = tl.dot(a.to(DOT_TYPE), g.to(DOT_TYPE), sum, input_precision=PRECISION)
    at = tl.program_id(0).to(tl.int64) * IN
    # Also where there are no pairs: all parts of an offset are added up.
    tl.store(parts + (at + c[:, None]) * OUT + n[None, :], sum, mask=(c < IN)[:, None] & (n < OUT)[None, :])


@triton.jit(do_not_specialize=["stretch"])
def _add_parts(parts, starts, out, stretch, SIZE: tl.constexpr, SUMMED: tl.constexpr):
    k, at = tl.program_id(0), tl.program_id(1) * SUMMED + tl.arange(0, SUMMED)
    start, end = tl.load(starts + k).to(tl.int64), tl.load(starts + k + 1).to(tl.int64)
    sum = tl.zeros([SUMMED], tl.float32)
    for part in range(start // stretch + k, end // stretch + k + 1):
        sum += tl.load(parts + part * SIZE + at, mask=at < SIZE, other=0.0)
    tl.store(out + k.to(tl.int64) * SIZE + at, sum.to(out.dtype.element_ty), mask=at < SIZE)


def fetch_on_demand(
    x: Tensor, weight: Tensor, sources: Tensor, targets: Tensor, starts: Tensor, scale: Tensor | None, outputs: int,
    tf32: bool,
) -> Tensor:  # fmt: skip
    """[outputs, output channels]."""
    x, sources, targets, starts = (tensor.contiguous() for tensor in (x, sources, targets, starts))
    volume, channels, columns = weight.shape
    tile = choose_tile(len(sources), weight, tf32)
    out = torch.zeros(outputs, columns, dtype=torch.float32, device=x.device)
    _multiply[(len(sources) // tile.rows + volume, triton.cdiv(columns, tile.columns))](
        x, weight, sources, targets, starts, starts if scale is None else scale.contiguous(), out, volume,
        *weight.stride(), channels, columns, scale is not None, tile.rows, tile.columns, tile.inner,
        triton.next_power_of_2(volume), dot_type(x.dtype), _precision(x.dtype, tf32),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out.to(x.dtype)


def choose_tile(pairs: int, weight: Tensor, tf32: bool) -> Tile:
    """The tile of a size of problem."""
    volume, channels, columns = weight.shape
    plain = _plain(weight.dtype, tf32)
    tile = FLOAT32_TILE if plain else next(tile for most, tile in TILES.items() if columns <= most)
    inner = min(tile.inner, dot_width(channels), INNER_BYTES // weight.itemsize)
    tile = tile._replace(inner=inner, columns=min(tile.columns, dot_width(columns)))
    blocks = triton.cdiv(columns, tile.columns)
    while tile.rows > FEWEST_ROWS and (pairs < 2 * tile.rows * volume or pairs // tile.rows * blocks < BUSY):
        tile = tile._replace(rows=tile.rows // 2, warps=max(2, tile.warps // 2) if tile.rows <= 64 else tile.warps)
    return tile


def weight_gradient(
    x: Tensor, grad: Tensor, sources: Tensor, targets: Tensor, starts: Tensor, scale: Tensor | None, tf32: bool
) -> Tensor:
    """[offsets, input channels, output channels]; pairs are summed in parts, and these in a fixed order."""
    x, grad, sources, targets, starts = (tensor.contiguous() for tensor in (x, grad, sources, targets, starts))
    volume, channels, columns = len(starts) - 1, x.shape[1], grad.shape[1]
    tile = FLOAT32_GRADIENT if _plain(x.dtype, tf32) else GRADIENT
    tile = tile._replace(columns=min(tile.columns, dot_width(columns)), inner=min(tile.inner, dot_width(channels)))
    blocks = triton.cdiv(channels, tile.inner) * triton.cdiv(columns, tile.columns)
    stretch = max(4 * GRADIENT.rows, triton.cdiv(len(sources), max(1, GRADIENT_BLOCKS // blocks)))
    # A small scale takes 16-bit gradients out of their range: then the product is of float32, in as many bits.
    multiplied = x.dtype if scale is None else torch.float32
    precision = _precision(multiplied, tf32 or x.dtype != torch.float32)
    parts = torch.empty(len(sources) // stretch + volume, channels, columns, dtype=torch.float32, device=x.device)
    _weight_gradient[(len(parts), blocks)](
        x, grad, sources, targets, starts, starts if scale is None else scale.contiguous(), parts, volume, stretch,
        channels, columns, scale is not None, tile.rows, tile.columns, tile.inner, triton.next_power_of_2(volume),
        dot_type(multiplied), precision, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    out = torch.empty(volume, channels, columns, dtype=x.dtype, device=x.device)
    _add_parts[(volume, triton.cdiv(channels * columns, SUMMED))](
        parts, starts, out, stretch, channels * columns, SUMMED
    )
    return out


def _plain(dtype: torch.dtype, tf32: bool) -> bool:
    return dtype == torch.float32 and not tf32


def _precision(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"
