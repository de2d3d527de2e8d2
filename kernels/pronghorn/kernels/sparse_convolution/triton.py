"""Triton kernels for sparse convolution: one matmul with gathered rows, whose tiles are data, and its gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._triton import blocks, dot_type, dot_width, power_of_2
from pronghorn.kernels.sparse_convolution.epilogue import Epilogue
from pronghorn.kernels.sparse_convolution.tiles import TILE, is_sorted


class Tile(NamedTuple):
    """What a block computes: output rows, output channels; input channels at a time; warps and stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# By output channels, up to each, as measured on an H100 for 39 000 outputs (and, the last, for few of them).
TILES = {
    16: Tile(64, 16, 16, 2, 5),
    32: Tile(128, 32, 32, 4, 5),
    64: Tile(128, 64, 64, 4, 5),
    1 << 30: Tile(64, 128, 64, 4, 5),
}
SORTED_STAGES = 3  # of the widest: fewer steps to fill them
FEW = Tile(64, 64, 128, 4, 5)
FEWEST_ROWS = 64
INNER_BYTES = 2  # of a channel: of wider ones there are fewer at a time, so that stages fit into shared memory
BUSY = 132  # blocks
NOTHING = Epilogue()
GRADIENT = Tile(64, 64, 64, 4, 3)  # rows summed at a time, output and input channels of a block
GRADIENT_BLOCKS = 1056


@Launcher
@triton.jit(do_not_specialize=["outputs", "tiles", "volume"])
def _multiply(
    x, weight, kernel_map, order, active, counts, out, scale, shift, residual, outputs, tiles, volume,
    IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    WIDTH: tl.constexpr, SORTED: tl.constexpr, COUNTED: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, TILE: tl.constexpr,
    SCALED: tl.constexpr, SHIFTED: tl.constexpr, ADDED: tl.constexpr, RELU: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(2)
    row, n = tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < outputs
    CHUNKS: tl.constexpr = (IN + INNER - 1) // INNER
    WEIGHT_IN: tl.constexpr = 1 if TRANSPOSED else OUT
    WEIGHT_OUT: tl.constexpr = IN if TRANSPOSED else 1
    count = volume
    actives = active + (split * tiles + tile * ROWS // TILE) * WIDTH
    if SORTED:
        count = tl.load(counts + split * tiles + tile * ROWS // TILE)
    elif COUNTED:
        count = tl.where(tile * ROWS < tl.load(counts), volume, 0)
    sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(count * CHUNKS):
        k = step // CHUNKS
        c = (step % CHUNKS) * INNER + tl.arange(0, INNER)
        if SORTED:
            k = tl.load(actives + k) + split * WIDTH
        i = tl.load(kernel_map + k.to(tl.int64) * outputs + row, mask=inside, other=-1)
        a = tl.load(
            x + i.to(tl.int64)[:, None] * IN + c[None, :], mask=(i >= 0)[:, None] & (c < IN)[None, :], other=0.0
        )
        b = tl.load(
            weight + k.to(tl.int64) * (IN * OUT) + c[:, None] * WEIGHT_IN + n[None, :] * WEIGHT_OUT,
            mask=(c < IN)[:, None] & (n < OUT)[None, :], other=0.0,
        )  # fmt: skip
        sum = tl.dot(a.to(DOT_TYPE), b.to(DOT_TYPE), sum, input_precision=PRECISION)
    to = row
    if SORTED:
        to = tl.load(order + split * outputs + row, mask=inside, other=0)
    to = to.to(tl.int64)
    if SPLITS > 1:
        to += split.to(tl.int64) * outputs
    if SCALED:
        sum = sum * tl.load(scale + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
    if SHIFTED:
        sum += tl.load(shift + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
    if ADDED:
        beside = tl.load(
            residual + to[:, None] * OUT + n[None, :], mask=inside[:, None] & (n < OUT)[None, :], other=0.0
        )
        sum += beside.to(tl.float32)
    if RELU:
        sum = tl.maximum(sum, 0.0)
    tl.store(
        out + to[:, None] * OUT + n[None, :], sum.to(out.dtype.element_ty), mask=inside[:, None] & (n < OUT)[None, :]
    )


@Launcher
@triton.jit(do_not_specialize=["outputs", "stretch"])
def _weight_gradient(
    x, grad, kernel_map, order, counts, out, outputs, stretch,
    IN: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr, SORTED: tl.constexpr, COUNTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k, part = tl.program_id(0), tl.program_id(2)
    BLOCKS: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    c = (tl.program_id(1) // BLOCKS) * INNER + tl.arange(0, INNER)
    n = (tl.program_id(1) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    sum = tl.zeros([INNER, COLUMNS], tl.float32)
    start, end = part * stretch, outputs
    if COUNTED:
        end = tl.minimum(outputs, tl.load(counts))
    for first in range(start, tl.minimum(start + stretch, end), ROWS):
        row = first + tl.arange(0, ROWS)
        i = tl.load(kernel_map + k.to(tl.int64) * outputs + row, mask=row < outputs, other=-1)
        there = i >= 0
        to = row
        if SORTED:
            to = tl.load(order + (k // WIDTH) * outputs + row, mask=row < outputs, other=0)
        a = tl.load(x + i.to(tl.int64)[None, :] * IN + c[:, None], mask=there[None, :] & (c < IN)[:, None], other=0.0)
        g = tl.load(
            grad + to.to(tl.int64)[:, None] * OUT + n[None, :], mask=there[:, None] & (n < OUT)[None, :], other=0.0
        )
        sum = tl.dot(a.to(DOT_TYPE), g.to(DOT_TYPE), sum, input_precision=PRECISION)
    at = (part.to(tl.int64) * tl.num_programs(0) + k) * IN
    tl.store(out + (at + c[:, None]) * OUT + n[None, :], sum, mask=(c < IN)[:, None] & (n < OUT)[None, :])


@Launcher
@triton.jit(do_not_specialize=["outputs", "volume"])
def _bitmasks(kernel_map, masks, outputs, volume, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row, split = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    mask = tl.zeros([ROWS], tl.int32)
    for bit in range(WIDTH):
        k = split * WIDTH + bit
        i = tl.load(kernel_map + k.to(tl.int64) * outputs + row, mask=row < tl.where(k < volume, outputs, 0), other=-1)
        mask = mask | ((i >= 0).to(tl.int32) << bit)
    tl.store(masks + split * outputs + row, mask, mask=row < outputs)


@Launcher
@triton.jit(do_not_specialize=["outputs", "volume"])
def _permute(kernel_map, order, columns, shorter_order, outputs, volume, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    inside, split = row < outputs, k // WIDTH
    at = tl.load(order + split * outputs + row, mask=inside, other=0)
    has = row < tl.where(k < volume, outputs, 0)
    found = tl.load(kernel_map + k.to(tl.int64) * outputs + at, mask=has)
    tl.store(columns + k.to(tl.int64) * outputs + row, found, mask=has)
    if k % WIDTH == 0:
        tl.store(shorter_order + split * outputs + row, at.to(tl.int32), mask=inside)


@triton.jit
def _either(a, b):
    return a | b


@Launcher
@triton.jit(do_not_specialize=["outputs"])
def _tile_lists(masks, active, counts, outputs, WIDTH: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    tile, split = tl.program_id(0), tl.program_id(1)
    row, bit = tile * TILE + tl.arange(0, TILE), tl.arange(0, BITS)
    mask = tl.reduce(tl.load(masks + split * outputs + row, mask=row < outputs, other=0), 0, _either)
    has = (mask >> bit) & 1
    at = split * tl.num_programs(0) + tile
    count = tl.sum(has, axis=0)
    tl.store(counts + at, count)
    # Those that are there first, in order; -1 behind them.
    place = tl.where(has == 1, tl.cumsum(has, axis=0) - 1, count + tl.cumsum(1 - has, axis=0) - 1)
    tl.store(active + at * WIDTH + place, tl.where(has == 1, bit, -1), mask=place < WIDTH)


def in_order(kernel_map: Tensor, masks: Tensor, order: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of a sorted map, from sorted masks and their order."""
    (volume, outputs), splits = kernel_map.shape, len(masks)
    tiles = blocks(outputs, TILE)
    new = functools.partial(torch.empty, dtype=torch.int32, device=kernel_map.device)
    columns, shorter, active, counts = (
        new(volume, outputs), new(splits, outputs), new(splits, tiles, width), new(splits, tiles)
    )  # fmt: skip
    # Also of a split that has no offset: 4 offsets in 3 splits are 2, 2 and none.
    _permute(
        (tiles, splits * width, 1), (kernel_map, order, columns, shorter), (outputs, volume), (width, TILE), num_warps=4
    )
    _tile_lists((tiles, splits, 1), (masks, active, counts), (outputs,), (width, power_of_2(width), TILE), num_warps=1)
    return columns, shorter, active, counts


def sparse_convolution(
    x: Tensor, weight: Tensor, tables: Sequence[Tensor], tf32: bool, epilogue: Epilogue | None = None
) -> Tensor:
    """[outputs, output channels]."""
    x = x.contiguous()
    kernel_map, order, active, counts, splits, width = _unpacked(tables)
    in_order = is_sorted(tables)
    volume, outputs = kernel_map.shape
    _, channels, columns = weight.shape
    tile = choose_tile(outputs, channels, columns, splits, in_order, x.itemsize)
    dtype = x.dtype if splits == 1 else torch.float32
    shape = (outputs, columns) if splits == 1 else (splits, outputs, columns)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    scale, shift, residual, relu = epilogue if epilogue is not None and splits == 1 else NOTHING
    residual = None if residual is None else residual.contiguous()
    given = [out if tensor is None else tensor for tensor in (scale, shift, residual)]  # what is not read is `out`
    transposed = not weight.is_contiguous()
    if transposed and not weight.transpose(1, 2).is_contiguous():
        weight, transposed = weight.contiguous(), False
    _multiply(
        (blocks(outputs, tile.rows), blocks(columns, tile.columns), splits),
        (x, weight, kernel_map, order, active, counts, out, *given), (outputs, counts.shape[-1], volume),
        (channels, columns, transposed, width, in_order, len(tables) > 1, splits, tile.rows, tile.columns, tile.inner,
         TILE, scale is not None, shift is not None, residual is not None, relu, dot_type(x.dtype),
         _precision(x.dtype, tf32)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits == 1:
        return out
    sums = out.sum(dim=0)
    return (sums if epilogue is None else epilogue(sums)).to(x.dtype)


@functools.lru_cache(maxsize=4096)
def choose_tile(outputs: int, channels: int, columns: int, splits: int, in_order: bool, itemsize: int) -> Tile:
    """The tile of a size of problem."""

    def busy(tile: Tile) -> bool:
        return blocks(outputs, tile.rows) * blocks(columns, tile.columns) * splits >= BUSY

    tile = next(tile for most, tile in TILES.items() if columns <= most)
    if tile.columns > FEW.columns:
        tile = tile._replace(stages=SORTED_STAGES) if in_order else tile
        tile = tile if busy(tile) else FEW
    while tile.rows > FEWEST_ROWS and not busy(tile):
        tile = tile._replace(rows=tile.rows // 2)
    inner = min(tile.inner, dot_width(channels)) * INNER_BYTES // max(itemsize, INNER_BYTES)
    return tile._replace(inner=max(16, inner), columns=min(tile.columns, dot_width(columns)))


def weight_gradient(x: Tensor, grad: Tensor, tables: Sequence[Tensor], tf32: bool) -> Tensor:
    """[kernel volume, input channels, output channels]; rows are summed in parts, and these in a fixed order."""
    x, grad = x.contiguous(), grad.contiguous()
    kernel_map, order, _, counts, _, width = _unpacked(tables)
    (volume, outputs), channels, columns = kernel_map.shape, x.shape[1], grad.shape[1]
    tile = GRADIENT._replace(
        columns=min(GRADIENT.columns, dot_width(columns)), inner=min(GRADIENT.inner, dot_width(channels))
    )
    tiles = blocks(channels, tile.inner) * blocks(columns, tile.columns)
    parts = max(1, min(GRADIENT_BLOCKS // (volume * tiles), blocks(outputs, 4 * tile.rows)))
    stretch = blocks(blocks(outputs, parts), tile.rows) * tile.rows
    out = torch.empty(parts, volume, channels, columns, dtype=torch.float32, device=x.device)
    _weight_gradient(
        (volume, tiles, parts), (x, grad, kernel_map, order, counts, out), (outputs, stretch),
        (channels, columns, width, is_sorted(tables), len(tables) > 1, tile.rows, tile.columns, tile.inner,
         dot_type(x.dtype), _precision(x.dtype, tf32)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out.sum(dim=0).to(x.dtype)


def bitmasks(kernel_map: Tensor, splits: int, width: int) -> Tensor:
    """int32 [splits, outputs]."""
    volume, outputs = kernel_map.shape
    masks = torch.empty(splits, outputs, dtype=torch.int32, device=kernel_map.device)
    _bitmasks((blocks(outputs, TILE), splits, 1), (kernel_map, masks), (outputs, volume), (width, TILE), num_warps=4)
    return masks


def _unpacked(tables: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Map, order, active offsets, their counts, splits and offsets of a split; of an unsorted map, itself for all.

    Of a counted map, the counts are the count.
    """
    kernel_map = tables[0].contiguous()
    if not is_sorted(tables):
        return kernel_map, kernel_map, kernel_map, tables[-1], 1, 1
    order, active, counts = tables[1:]
    return kernel_map, order, active, counts, active.shape[0], active.shape[2]


def _precision(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"
