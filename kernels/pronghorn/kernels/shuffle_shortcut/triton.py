# Triton adds tuples up, and does not unpack them; as they grow, so does their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"
"""Triton kernel for residual autoencoding: a tile is some channels of some pixels of the result.

There is a coarse grid and a fine one; a cell is one pixel of the coarse grid, and FACTOR * FACTOR pixels of the fine
one. What is read from the other grid is read in steps, and the same program reads what lies between them: so where
channels are adjacent, it makes whole cells of a fine result, one pixel of all its cells after the other. Where pixels
are, it has a rectangle of them. The width is given divided by a constant, for Triton makes wide loads only where it
knows what divides it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import LARGEST, Launcher, planned
from pronghorn.kernels._triton import blocks, power_of_2

ELEMENTS = 512  # of a tile
CELLS_ELEMENTS = 256  # of a tile of which there are FACTOR * FACTOR; two for each thread keep the steps short
MOST = 256  # channels or pixels of a tile, whichever are adjacent
MOST_COLUMNS = 64  # of a rectangle
WARPS = 4
UNIT = 8


@triton.jit
def _offset(
    image, row, column, i, j, c, height, width, CHANNELS: tl.constexpr, FACTOR: tl.constexpr, ADJACENT: tl.constexpr
):  # fmt: skip
    """Where channel c of place (i, j) of a cell lies; FACTOR is 1 on the coarse grid, of `height` and `width`."""
    height, width = height * FACTOR, width * FACTOR
    row, column = row * FACTOR, column * FACTOR
    # What depends on the cell stands by itself, so that it is computed once for all channels that a thread has of it.
    if ADJACENT:
        return ((image * height + row) * width + column) * CHANNELS + ((i * width + j) * CHANNELS + c)
    return ((image * CHANNELS * height + row) * width + column) + ((c * height + i) * width + j)


@triton.jit
def _from_other(
    source, bias, image, row, column, i, j, c, there, height, width,
    BIASED: tl.constexpr, GIVEN: tl.constexpr, CHANNELS: tl.constexpr, FACTOR: tl.constexpr, UP: tl.constexpr,
    ADJACENT: tl.constexpr,
):  # fmt: skip
    """What a source of GIVEN channels on the other grid has for channel c of the result: one channel, or a group's sum.

    Each channel comes with its bias if it is BIASED.
    Where divisions can be left out, they are: Triton then knows which channels are adjacent.
    """
    AREA: tl.constexpr = FACTOR * FACTOR
    if UP:
        REPEATS: tl.constexpr = CHANNELS * AREA // GIVEN
        from_c = c // (REPEATS // AREA) if REPEATS % AREA == 0 else (c * AREA + i * FACTOR + j) // REPEATS
        at = _offset(image, row, column, 0, 0, from_c, height, width, GIVEN, 1, ADJACENT)
        total = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
        if BIASED:
            total += tl.load(bias + from_c, mask=there, other=0.0).to(tl.float32)
    else:
        GROUP: tl.constexpr = GIVEN * AREA // CHANNELS
        total = tl.zeros(c.shape, tl.float32)
        for k in tl.static_range(GROUP):
            if GROUP % AREA == 0:
                from_c, place = c * (GROUP // AREA) + k // AREA, k % AREA
            else:
                from_c, place = (c * GROUP + k) // AREA, (c * GROUP + k) % AREA
            at = _offset(
                image, row, column, place // FACTOR, place % FACTOR, from_c, height, width, GIVEN, FACTOR, ADJACENT
            )  # fmt: skip
            total += tl.load(source + at, mask=there, other=0.0).to(tl.float32)
            if BIASED:
                total += tl.load(bias + from_c, mask=there, other=0.0).to(tl.float32)
    return total


@Launcher
@triton.jit(do_not_specialize=["images", "height", "width"])
def _shuffle_shortcut(
    x, main, bias, out, images, height, width,
    UNIT: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, UP: tl.constexpr, X_CHANNELS: tl.constexpr,
    MAIN_CHANNELS: tl.constexpr, BIASED: tl.constexpr, SAME_GRID: tl.constexpr, CHANNELS: tl.constexpr,
    ADJACENT: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, PIXELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """TILE channels of PIXELS cells where channels are ADJACENT, else of PIXELS of the result in rows of COLUMNS.

    `height` and `width` are of the coarse grid; a `main` without channels is none; offsets are long if WIDE.
    """
    width = width * UNIT
    STEP: tl.constexpr = FACTOR if UP else 1
    # One axis, for of two Triton picks the faster by itself, and not the same one for what has steps and what has none.
    element, program = tl.arange(0, TILE * PIXELS), tl.program_id(0)
    if ADJACENT:
        TILES: tl.constexpr = (CHANNELS + TILE - 1) // TILE
        c, p = (program % TILES) * TILE + element % TILE, (program // TILES) * PIXELS + element // TILE
        image, row = 0, p // width  # rows of all images
        column = p - row * width
        there = (p < images * height * width) & (c < CHANNELS)
    else:
        across, down = tl.cdiv(width * STEP, COLUMNS), tl.cdiv(height * STEP, PIXELS // COLUMNS)
        image, tile = program // (across * down), program % (across * down)
        c = tl.program_id(1) * TILE + element // PIXELS
        y = (tile // across) * (PIXELS // COLUMNS) + element // COLUMNS % (PIXELS // COLUMNS)
        x_out = (tile % across) * COLUMNS + element % COLUMNS
        there = (y < height * STEP) & (x_out < width * STEP) & (c < CHANNELS)
        if WIDE:
            image, y = image.to(tl.int64), y.to(tl.int64)
        row, column = y // STEP, x_out // STEP
    if WIDE:
        row, c = row.to(tl.int64), c.to(tl.int64)
    places, values = (), ()
    for place in tl.static_range(STEP * STEP if ADJACENT else 1):
        if ADJACENT:
            i, j = place // STEP, place % STEP
            at = _offset(image, row, column, i, j, c, height, width, CHANNELS, STEP, True)
        else:
            i, j = y % STEP, x_out % STEP
            at = _offset(image, y, x_out, 0, 0, c, height * STEP, width * STEP, CHANNELS, 1, False)
        value = SCALE * _from_other(
            x, bias, image, row, column, i, j, c, there, height, width, False, X_CHANNELS, CHANNELS, FACTOR, UP,
            ADJACENT,
        )  # fmt: skip
        if SAME_GRID:
            value += tl.load(main + at, mask=there, other=0.0).to(tl.float32)
            if BIASED:
                value += tl.load(bias + c, mask=there, other=0.0).to(tl.float32)
        elif MAIN_CHANNELS > 0:
            value += _from_other(
                main, bias, image, row, column, i, j, c, there, height, width, BIASED, MAIN_CHANNELS, CHANNELS, FACTOR,
                UP, ADJACENT,
            )  # fmt: skip
        places, values = places + (at,), values + (value,)
    # All is read before anything is written, so that no read waits for a write.
    for place in tl.static_range(STEP * STEP if ADJACENT else 1):
        tl.store(out + places[place], values[place].to(out.dtype.element_ty), mask=there)


def shuffle_shortcut(
    x: Tensor, main: Tensor | None, bias: Tensor | None, out: Tensor, factor: int, up: bool, scale: float
) -> Tensor:
    """Writes `out`, and gives it back."""
    adjacent = not out.is_contiguous()  # an image that is both has one channel, and its x may have more
    layout = torch.channels_last if adjacent else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    given = x if main is None else main.contiguous(memory_format=layout)
    shape = None if main is None else given.shape
    grid, numbers, constants = _plan(x.shape, shape, out.shape, bias is not None, factor, up, scale, adjacent)
    tensors = x, given, x if bias is None else bias.contiguous(), out
    _shuffle_shortcut(grid, tensors, numbers, constants, num_warps=WARPS)
    return out


@planned
def _plan(
    x: torch.Size, main: torch.Size | None, out: torch.Size, biased: bool, factor: int, up: bool, scale: float,
    adjacent: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Grid, numbers and constants."""
    images, channels, *size = out
    height, width = x[2:] if up else size
    if adjacent:
        tile = min(power_of_2(channels), MOST)
        columns, pixels = 1, max(1, (CELLS_ELEMENTS if up and factor > 1 else ELEMENTS) // tile)
        grid = blocks(images * height * width, pixels) * blocks(channels, tile), 1, 1
    else:
        columns = min(power_of_2(size[1]), MOST_COLUMNS)
        pixels = columns * min(power_of_2(size[0]), MOST // columns)
        tile = min(power_of_2(channels), ELEMENTS // pixels)
        rectangles = blocks(size[1], columns) * blocks(size[0], pixels // columns)
        grid = rectangles * images, blocks(channels, tile), 1
    unit = 1 if width % UNIT else UNIT
    scale = scale if up else scale * channels / (x[1] * factor**2)
    wide = max(x.numel(), 0 if main is None else main.numel(), out.numel()) > LARGEST
    return (
        grid, (images, height, width // unit),
        (
            unit, scale, factor, up, x[1], 0 if main is None else main[1], biased, main == out, channels, adjacent,
            wide, tile, pixels, columns,
        ),
    )  # fmt: skip
