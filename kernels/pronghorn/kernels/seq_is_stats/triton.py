"""Triton kernels for the statistics of sequences: parts of sequences are summed up, then all is known of sequences.

A program has a tile of some sequences and tokens, and goes along the tokens; of few sequences each is cut into parts,
so that there are programs enough. The number of tokens is given divided by a constant, for Triton makes wide loads only
where it knows that 16 divides it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._triton import blocks, power_of_2

ELEMENTS = 1024  # of a tile
PROGRAMS = 4096  # of so many, the memory is busy to the end
PARTIAL_SUMS = 8192  # of some sequences, in the tile that sums them up
SEQUENCES = 1024  # at most, in that tile
WARPS, MOST_WARPS = 4, 8
UNIT = 16


@triton.jit
def _k3(r, wide):
    """exp(r) - r - 1 in float64, of r in float32 and `wide`; its series where little is left of the difference."""
    series = 1 / 362880 + r / 3628800
    series = 1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040 + r * (1 / 40320 + r * series))))
    series = r * r * (1 / 2 + r * (1 / 6 + r * series))
    near = tl.abs(r) < 1
    # exp(r) is beyond float32 from 88 on, its root is not.
    root = tl.where(near, series, tl.exp(r * 0.5)).to(tl.float64)
    return tl.where(near, root, root * root - wide - 1.0)


@Launcher
@triton.jit(do_not_specialize=["sequences", "tokens", "tiles"])
def _sums(
    log_probs, sampler_log_probs, mask, totals, divergences, counts, sequences, tokens, tiles,
    UNIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Of a part of some sequences: the sums of log-ratios and of k3, and the number of tokens."""
    tokens = tokens * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * tiles * TOKENS
    total, divergence = tl.zeros([ROWS, TOKENS], tl.float64), tl.zeros([ROWS, TOKENS], tl.float64)
    count = tl.zeros([ROWS, TOKENS], tl.int32)
    for first in range(start, tl.minimum(start + tiles * TOKENS, tokens), TOKENS):
        t = first + tl.arange(0, TOKENS)
        at = row.to(tl.int64)[:, None] * tokens + t[None, :]
        inside = (row < sequences)[:, None] & (t < tokens)[None, :]
        counted = tl.load(mask + at, mask=inside, other=0) != 0
        learner = tl.load(log_probs + at, mask=inside, other=0.0).to(tl.float32)
        sampler = tl.load(sampler_log_probs + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.where(counted & (sampler == sampler), learner - sampler, 0.0)
        total += r.to(tl.float64)
        divergence += _k3(r, r.to(tl.float64))
        count += counted.to(tl.int32)
    to = tl.program_id(1).to(tl.int64) * sequences + row
    tl.store(totals + to, tl.sum(total, axis=1), mask=row < sequences)
    tl.store(divergences + to, tl.sum(divergence, axis=1), mask=row < sequences)
    tl.store(counts + to, tl.sum(count, axis=1), mask=row < sequences)


@triton.jit
def _moments(log_ratios):
    """The largest, and the sums of ratios to it and of their squares."""
    largest = tl.max(log_ratios, axis=0)
    ratios = tl.exp(log_ratios - largest)
    return largest, tl.sum(ratios, axis=0), tl.sum(ratios * ratios, axis=0)


@Launcher
@triton.jit(do_not_specialize=["sequences", "parts"])
def _finish(
    totals, divergences, counted, log_ratios, k3, geometric_mean, counts, moments, log_ess, log_ess_clipped,
    sequences, parts, LIMIT: tl.constexpr, ALONE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All of some sequences; and of all sequences, where a program is ALONE, or else what joins those of programs."""
    row, part = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PARTS)
    at = part[None, :] * sequences + row[:, None]
    real = row < sequences
    inside = real[:, None] & (part < parts)[None, :]
    total = tl.sum(tl.load(totals + at, mask=inside, other=0.0), axis=1)
    count = tl.sum(tl.load(counted + at, mask=inside, other=0), axis=1)
    tokens = tl.maximum(count, 1).to(tl.float64)
    tl.store(log_ratios + row, total, mask=real)
    tl.store(counts + row, count.to(tl.int64), mask=real)
    tl.store(k3 + row, tl.sum(tl.load(divergences + at, mask=inside, other=0.0), axis=1) / tokens, mask=real)
    tl.store(geometric_mean + row, tl.exp(total / tokens), mask=real)
    clipped = total
    if LIMIT is not None:
        most = tl.full([ROWS], LIMIT, tl.float64)
        clipped = tl.where(total > most, most, total)
    nothing = tl.full([ROWS], float("-inf"), tl.float64)
    largest, sum, squares = _moments(tl.where(real, total, nothing))
    largest_clipped, sum_clipped, squares_clipped = _moments(tl.where(real, clipped, nothing))
    if ALONE:
        tl.store(log_ess, 2.0 * tl.log(sum) - tl.log(squares))
        tl.store(log_ess_clipped, 2.0 * tl.log(sum_clipped) - tl.log(squares_clipped))
    else:
        to, step = moments + tl.program_id(0), tl.num_programs(0)
        tl.store(to, largest)
        tl.store(to + step, sum)
        tl.store(to + 2 * step, squares)
        tl.store(to + 3 * step, largest_clipped)
        tl.store(to + 4 * step, sum_clipped)
        tl.store(to + 5 * step, squares_clipped)


@Launcher
@triton.jit(do_not_specialize=["programs"])
def _join(moments, log_ess, log_ess_clipped, programs, PROGRAMS: tl.constexpr):
    """Both effective sample sizes of what some programs found."""
    program = tl.arange(0, PROGRAMS)
    for which in tl.static_range(2):
        at, real = moments + 3 * which * programs + program, program < programs
        largest = tl.load(at, mask=real, other=float("-inf"))
        scale = tl.exp(largest - tl.max(largest, axis=0))
        sum = tl.sum(tl.load(at + programs, mask=real, other=0.0) * scale, axis=0)
        squares = tl.sum(tl.load(at + 2 * programs, mask=real, other=0.0) * scale * scale, axis=0)
        tl.store(log_ess if which == 0 else log_ess_clipped, 2.0 * tl.log(sum) - tl.log(squares))


def seq_is_stats(
    log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor, limit: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-ratios, k3, geometric means and counts of sequences, and both effective sample sizes."""
    given = log_probs.contiguous(), sampler_log_probs.contiguous(), mask.contiguous().view(torch.uint8)
    sequences, tokens = log_probs.shape
    device = log_probs.device
    columns = min(ELEMENTS, power_of_2(tokens))
    rows = ELEMENTS // columns
    down, along = blocks(sequences, rows), blocks(tokens, columns)
    tiles = blocks(along, blocks(PROGRAMS, down))
    parts = blocks(along, tiles)
    unit = 1 if tokens % UNIT else UNIT
    totals, divergences = (torch.empty(parts, sequences, dtype=torch.float64, device=device) for _ in range(2))
    counted = torch.empty(parts, sequences, dtype=torch.int32, device=device)
    _sums(
        (down, parts, 1), (*given, totals, divergences, counted), (sequences, tokens // unit, tiles),
        (unit, rows, columns), num_warps=WARPS,
    )  # fmt: skip
    width = power_of_2(parts)
    rows = max(1, min(SEQUENCES, PARTIAL_SUMS // width, power_of_2(sequences)))
    programs = blocks(sequences, rows)
    log_ratios, k3, geometric_mean = (torch.empty(sequences, dtype=torch.float64, device=device) for _ in range(3))
    counts = torch.empty(sequences, dtype=torch.int64, device=device)
    log_ess, log_ess_clipped = (torch.empty((), dtype=torch.float64, device=device) for _ in range(2))
    moments = torch.empty(6, programs, dtype=torch.float64, device=device)
    _finish(
        (programs, 1, 1),
        (totals, divergences, counted, log_ratios, k3, geometric_mean, counts, moments, log_ess, log_ess_clipped),
        (sequences, parts), (limit, programs == 1, rows, width), num_warps=MOST_WARPS,
    )  # fmt: skip
    if programs > 1:
        _join((1, 1, 1), (moments, log_ess, log_ess_clipped), (programs,), (power_of_2(programs),), num_warps=WARPS)
    return log_ratios, k3, geometric_mean, counts, log_ess, log_ess_clipped
