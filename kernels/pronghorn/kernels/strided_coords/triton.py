"""Triton kernel for strided sites: every input marks the sites that it reaches, and the marks are counted in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._triton import blocks
from pronghorn.kernels.kernel_map.keys import Box
from pronghorn.kernels.kernel_map.triton import NUMBERS, padded

ROWS = 128
LIMITS = [name for name in NUMBERS if not name.startswith("stride")]


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


@triton.jit(do_not_specialize=["rows", *LIMITS])
def _site(
    places, coords, rows,
    low0, low1, low2, low3, low4, size0, size1, size2, size3, size4, step0, step1, step2, step3, step4,
    DIMENSIONS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    lows, sizes = (low0, low1, low2, low3, low4), (size0, size1, size2, size3, size4)
    steps = (step0, step1, step2, step3, step4)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.load(places + row, mask=row < rows, other=0)
    for d in tl.static_range(DIMENSIONS):
        site = (place // steps[d]) % sizes[d] + lows[d]
        tl.store(coords + row.to(tl.int64) * DIMENSIONS + d, site.to(tl.int32), mask=row < rows)


def strided_coords(coords: Tensor, offsets: Tensor, stride: list[int], box: Box) -> Tensor:
    """int32 [outputs, dimensions], in lexicographic order."""
    rows, dimensions = coords.shape
    marks = torch.zeros(box.places, dtype=torch.int8, device=coords.device)
    numbers = padded(box.lower, 0), padded(box.sizes, 1), padded(box.steps, 0), padded(stride, 1)
    _mark[(blocks(rows, ROWS), len(offsets))](
        coords.contiguous(), offsets.contiguous(), marks, rows, *[n for kind in numbers for n in kind], dimensions, ROWS
    )
    places = marks.nonzero()
    found = torch.empty(len(places), dimensions, dtype=torch.int32, device=coords.device)
    if len(places):
        limits = [n for kind in numbers[:3] for n in kind]
        _site[(blocks(len(places), ROWS),)](places, found, len(places), *limits, dimensions, ROWS)
    return found
