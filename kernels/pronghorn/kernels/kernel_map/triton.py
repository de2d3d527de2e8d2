"""Triton kernels for kernel maps: coordinates are put into a table, and every output site looks up its neighbours."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._triton import blocks, power_of_2
from pronghorn.kernels.kernel_map.keys import GRID, MOST_DIMENSIONS, Box, padded

ROWS = 128
EMPTY = tl.constexpr(-1)
SLOTS_FOR_EACH_ROW = 2  # at least; so few are taken that most are found at the first try
NUMBERS = [f"{kind}{d}" for kind in ("low", "size", "step", "stride") for d in range(MOST_DIMENSIONS)]


@triton.jit
def _mixed(key):
    """Bits of a place's number, so that neighbours do not lie side by side (the finaliser of SplitMix64)."""
    key = key.to(tl.uint64)
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    return key ^ (key >> 31)


@Launcher
@triton.jit(do_not_specialize=["capacity", "rows", *[name for name in NUMBERS if not name.startswith("stride")]])
def _fill(
    coords, keys, values, capacity, rows,
    low0, low1, low2, low3, low4, size0, size1, size2, size3, size4, step0, step1, step2, step3, step4,
    DIMENSIONS: tl.constexpr, HASHED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    lows, sizes = (low0, low1, low2, low3, low4), (size0, size1, size2, size3, size4)
    steps = (step0, step1, step2, step3, step4)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    place = tl.zeros([ROWS], tl.int64)
    for d in tl.static_range(DIMENSIONS):
        shifted = tl.load(coords + row.to(tl.int64) * DIMENSIONS + d, mask=inside, other=0).to(tl.int64) - lows[d]
        inside = inside & (shifted >= 0) & (shifted < sizes[d])
        place += shifted * steps[d]
    if HASHED:
        slot = (_mixed(place) & (capacity - 1)).to(tl.int64)
        pending = inside
        while tl.max(pending.to(tl.int32), axis=0) > 0:
            # Who is done, or has nothing to put in, exchanges what is there with itself.
            old = tl.atomic_cas(keys + slot, tl.where(pending, EMPTY, -2).to(tl.int64), place)
            taken = pending & ((old == EMPTY) | (old == place))
            tl.atomic_max(values + slot, row, mask=taken)
            pending = pending & ~taken
            slot = tl.where(pending, (slot + 1) & (capacity - 1), slot)
    else:
        tl.atomic_max(values + tl.where(inside, place, 0), row, mask=inside)


@Launcher
@triton.jit(do_not_specialize=["capacity", "rows", "own", *NUMBERS])
def _look_up(
    out_coords, offsets, keys, values, found, capacity, rows, own,
    low0, low1, low2, low3, low4, size0, size1, size2, size3, size4, step0, step1, step2, step3, step4,
    stride0, stride1, stride2, stride3, stride4,
    DIMENSIONS: tl.constexpr, HASHED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    lows, sizes = (low0, low1, low2, low3, low4), (size0, size1, size2, size3, size4)
    steps, strides = (step0, step1, step2, step3, step4), (stride0, stride1, stride2, stride3, stride4)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    there = row < rows
    inside = there
    place = tl.zeros([ROWS], tl.int64)
    for d in tl.static_range(DIMENSIONS):
        site = tl.load(out_coords + row.to(tl.int64) * DIMENSIONS + d, mask=there, other=0).to(tl.int64)
        shifted = site * strides[d] + tl.load(offsets + k * DIMENSIONS + d).to(tl.int64) - lows[d]
        inside = inside & (shifted >= 0) & (shifted < sizes[d])
        place += shifted * steps[d]
    if k == own:
        result = tl.where(inside, row, -1)
    elif HASHED:
        result = tl.full([ROWS], -1, tl.int32)
        slot = (_mixed(place) & (capacity - 1)).to(tl.int64)
        while tl.max(inside.to(tl.int32), axis=0) > 0:
            key = tl.load(keys + slot, mask=inside, other=EMPTY)
            hit = inside & (key == place)
            result = tl.where(hit, tl.load(values + slot, mask=hit, other=-1), result)
            inside = inside & (key != place) & (key != EMPTY)
            slot = (slot + 1) & (capacity - 1)
    else:
        result = tl.load(values + place, mask=inside, other=-1)
    tl.store(found + k.to(tl.int64) * rows + row, result, mask=there)


def kernel_map(
    coords: Tensor, out_coords: Tensor, offsets: Tensor, stride: list[int], box: Box, table: str, own: int
) -> Tensor:
    """int32 [kernel volume, outputs]."""
    (rows, dimensions), outputs = coords.shape, out_coords.shape[0]
    hashed = table != GRID
    capacity = max(512, power_of_2(SLOTS_FOR_EACH_ROW * rows)) if hashed else box.places
    values = torch.full((capacity,), -1, dtype=torch.int32, device=coords.device)
    keys = torch.full((capacity,), -1, dtype=torch.int64, device=coords.device) if hashed else values
    coords, out_coords, offsets = coords.contiguous(), out_coords.contiguous(), offsets.contiguous()
    how = dimensions, hashed, ROWS
    _fill((blocks(rows, ROWS), 1, 1), (coords, keys, values), (capacity, rows, *box.numbers), how)
    found = torch.empty(offsets.shape[0], outputs, dtype=torch.int32, device=coords.device)
    _look_up(
        (blocks(outputs, ROWS), offsets.shape[0], 1), (out_coords, offsets, keys, values, found),
        (capacity, outputs, own, *box.numbers, *padded(stride, 1)), how,
    )  # fmt: skip
    return found
