"""Triton kernel for strided sites: every input marks the sites that it reaches, and the marks are counted in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._triton import blocks
from pronghorn.kernels.kernel_map.keys import Box, padded
from pronghorn.kernels.kernel_map.triton import NUMBERS

ROWS = 128
PLACES = 1024  # that a block counts
LIMITS = [name for name in NUMBERS if not name.startswith("stride")]


@Launcher
@triton.jit(do_not_specialize=["rows", *NUMBERS])
def _mark(
    coords, offsets, marks, rows,
    low0, low1, low2, low3, low4, size0, size1, size2, size3, size4, step0, step1, step2, step3, step4,
    stride0, stride1, stride2, stride3, stride4,
    DIMENSIONS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    lows, sizes = (low0, low1, low2, low3, low4), (size0, size1, size2, size3, size4)
    steps, strides = (step0, step1, step2, step3, step4), (stride0, stride1, stride2, stride3, stride4)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    reaches = row < rows
    place = tl.zeros([ROWS], tl.int64)
    for d in tl.static_range(DIMENSIONS):
        moved = tl.load(coords + row.to(tl.int64) * DIMENSIONS + d, mask=row < rows, other=0)
        moved -= tl.load(offsets + k * DIMENSIONS + d)
        site = moved // strides[d]
        site = tl.where(site * strides[d] > moved, site - 1, site)  # division truncates
        shifted = site.to(tl.int64) - lows[d]
        reaches = reaches & (site * strides[d] == moved) & (shifted >= 0) & (shifted < sizes[d])
        place += shifted * steps[d]
    tl.store(marks + place, 1, mask=reaches)


@Launcher
@triton.jit
def _count(marks, counts, PLACES: tl.constexpr):
    block = tl.program_id(0)
    there = tl.load(marks + block * PLACES + tl.arange(0, PLACES))
    tl.store(counts + block, tl.sum(there.to(tl.int32), axis=0))


@Launcher
@triton.jit(do_not_specialize=["rows", *LIMITS])
def _write(
    marks, ends, coords, rows,
    low0, low1, low2, low3, low4, size0, size1, size2, size3, size4, step0, step1, step2, step3, step4,
    DIMENSIONS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    lows, sizes = (low0, low1, low2, low3, low4), (size0, size1, size2, size3, size4)
    steps = (step0, step1, step2, step3, step4)
    block = tl.program_id(0)
    before = tl.load(ends + block - 1, mask=block > 0, other=0)
    if before == tl.load(ends + block):
        return
    place = block * PLACES + tl.arange(0, PLACES)
    there = tl.load(marks + place).to(tl.int32)
    row = before + tl.cumsum(there, axis=0) - 1
    kept = (there == 1) & (row < rows)
    for d in tl.static_range(DIMENSIONS):
        site = (place // steps[d]) % sizes[d] + lows[d]  # all in 32 bits, which count the marks there may be
        tl.store(coords + row.to(tl.int64) * DIMENSIONS + d, site.to(tl.int32), mask=kept)


def strided_coords(coords: Tensor, offsets: Tensor, stride: list[int], box: Box) -> Tensor:
    """int32 [outputs, dimensions], in lexicographic order."""
    marks, ends = _marked(coords, offsets, stride, box)
    found = torch.empty(int(ends[-1]), coords.shape[1], dtype=torch.int32, device=coords.device)
    return _written(marks, ends, found, box)


def strided_coords_within(
    coords: Tensor, offsets: Tensor, stride: list[int], box: Box, capacity: int
) -> tuple[Tensor, Tensor]:
    """int32 [capacity, dimensions], and how many there are, int32 [1]."""
    marks, ends = _marked(coords, offsets, stride, box)
    found = torch.full((capacity, coords.shape[1]), -1, dtype=torch.int32, device=coords.device)
    return _written(marks, ends, found, box), ends[-1:].clone()


def _marked(coords: Tensor, offsets: Tensor, stride: list[int], box: Box) -> tuple[Tensor, Tensor]:
    """Marks of places, filled up to whole blocks, and how many there are up to the end of each."""
    rows, dimensions = coords.shape
    marks = torch.zeros(blocks(box.places, PLACES) * PLACES, dtype=torch.int8, device=coords.device)
    _mark(
        (blocks(rows, ROWS), len(offsets), 1), (coords.contiguous(), offsets.contiguous(), marks),
        (rows, *box.numbers, *padded(stride, 1)), (dimensions, ROWS),
    )  # fmt: skip
    counts = torch.empty(len(marks) // PLACES, dtype=torch.int32, device=coords.device)
    _count((len(counts), 1, 1), (marks, counts), (), (PLACES,))
    return marks, counts.cumsum(0, dtype=torch.int32)


def _written(marks: Tensor, ends: Tensor, found: Tensor, box: Box) -> Tensor:
    rows, dimensions = found.shape
    if rows:
        _write((len(ends), 1, 1), (marks, ends, found), (rows, *box.numbers), (dimensions, PLACES))
    return found
