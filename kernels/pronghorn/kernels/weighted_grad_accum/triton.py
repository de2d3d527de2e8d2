"""Triton kernel that adds gradients to buffers: one launch for all tensors of a dtype.

A table on the device tells for each tensor where it and its buffers are, how many elements it has, and which program
is the first that works on it; every program does the same number of elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import ALIGNMENT
from pronghorn.kernels._table import TYPES, device_table, tensor_at
from pronghorn.kernels._triton import blocks, power_of_2

ELEMENTS = 1024  # of a tile
TILES = 16  # of a program, at most
PROGRAMS = 1024  # of so many or more, a program has several tiles
WARPS = 4


@triton.jit
def _add(gradient, accum, score, at, inside, accum_weight, score_weight, SCORED: tl.constexpr):
    """Adds a tile to its buffers, and gives its squares."""
    g = tl.load(gradient + at, mask=inside).to(tl.float32)
    a = tl.load(accum + at, mask=inside)
    if SCORED:  # all is read before anything is written, so that no read waits for a write
        s = tl.load(score + at, mask=inside)
        tl.store(score + at, s + score_weight * g, mask=inside)
    tl.store(accum + at, a + accum_weight * g, mask=inside)
    return g.to(tl.float64) * g.to(tl.float64)


@triton.jit(do_not_specialize=["tensors", "tiles"])
def _accumulate(
    table, sums, weights, tensors, tiles,
    TYPE: tl.constexpr, SCORED: tl.constexpr, ALIGNED: tl.constexpr, TENSORS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    accum_weight = tl.load(weights).to(tl.float32)
    score_weight = tl.load(weights + 1).to(tl.float32)
    program, which = tl.program_id(0), tl.arange(0, TENSORS)
    before = tl.load(table + which, mask=which < tensors, other=0) <= program
    index = tl.sum((before & (which < tensors)).to(tl.int32), axis=0) - 1
    offset = (program - tl.load(table + index)) * tiles * ELEMENTS
    left = tl.minimum(tl.load(table + tensors + index) - offset, tiles * ELEMENTS).to(tl.int32)
    gradient = tensor_at(table + 2 * tensors + index, TYPE, ALIGNED) + offset
    accum = tensor_at(table + 3 * tensors + index, tl.float32, ALIGNED) + offset
    score = tensor_at(table + 4 * tensors + index, tl.float32, ALIGNED) + offset
    squares = tl.zeros([ELEMENTS], tl.float64)
    full = left // ELEMENTS
    for tile in range(full):  # without a mask, for with one of any length there are no wide loads
        at = tile * ELEMENTS + tl.arange(0, ELEMENTS)
        squares += _add(gradient, accum, score, at, None, accum_weight, score_weight, SCORED)
    if full * ELEMENTS < left:
        at = full * ELEMENTS + tl.arange(0, ELEMENTS)
        inside = at < left
        last = _add(gradient, accum, score, at, inside, accum_weight, score_weight, SCORED)
        squares += tl.where(inside, last, 0.0)
    tl.store(sums + program, tl.sum(squares, axis=0))


def weighted_grad_accum(gradients: list[Tensor], accum: list[Tensor], score: list[Tensor], weights: Tensor) -> Tensor:
    """The sum of squares of all gradients; an empty `score` is left out."""
    device = gradients[0].device
    gradients = [gradient.contiguous() for gradient in gradients]  # copies must live until all is launched
    kinds: dict[tuple[torch.dtype, bool], list[tuple[int, ...]]] = {}
    for gradient, a, s in zip(gradients, accum, score or accum, strict=True):  # a score that is not read
        size = gradient.numel()
        if size:
            places = gradient.data_ptr(), a.data_ptr(), s.data_ptr()
            aligned = not (places[0] | places[1] | places[2]) % ALIGNMENT
            kinds.setdefault((gradient.dtype, aligned), []).append((size, *places))
    weights = weights.contiguous()
    sums = [_launch(rows, device, TYPES[dtype], bool(score), aligned, weights)
            for (dtype, aligned), rows in kinds.items()]  # fmt: skip
    if not sums:
        return torch.zeros((), dtype=torch.float64, device=device)
    torch.autograd.graph.increment_version([*accum, *score])
    return (sums[0] if len(sums) == 1 else torch.cat(sums)).sum()


def _launch(
    rows: list[tuple[int, ...]], device: torch.device, dtype: tl.dtype, scored: bool, aligned: bool,
    weights: Tensor,
) -> Tensor:  # fmt: skip
    """The sums of squares of all programs; rows are a size and three addresses."""
    sizes, *places = zip(*rows, strict=True)
    tiles = min(TILES, max(1, sum(sizes) // (ELEMENTS * PROGRAMS)))
    firsts, programs = [], 0
    for size in sizes:
        firsts.append(programs)
        programs += blocks(size, ELEMENTS * tiles)
    table = device_table((*firsts, *sizes, *places[0], *places[1], *places[2]), device)
    sums = torch.empty(programs, dtype=torch.float64, device=device)
    _accumulate[(programs,)](
        table, sums, weights, len(rows), tiles, dtype, scored, aligned, power_of_2(len(rows)), ELEMENTS,
        num_warps=WARPS,
    )  # fmt: skip
    return sums
