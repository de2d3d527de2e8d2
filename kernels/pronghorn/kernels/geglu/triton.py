"""Triton kernels for the gated GELU: a program has some channels of a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._triton import blocks

TILE, WARPS = 1024, 4
SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi), for 1 + tanh(x) = 2 sigmoid(2 x)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _place(WIDTH: tl.constexpr, TILE: tl.constexpr):
    """A row, channels of it, and which of these there are."""
    TILES: tl.constexpr = (WIDTH + TILE - 1) // TILE
    row, channel = (tl.program_id(0) // TILES).to(tl.int64), (tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE)
    return row, channel, channel < WIDTH


@triton.jit
def _opening(g):
    """GELU is g times this."""
    return 1 / (1 + tl.exp(-g * (g * g * CUBIC + 1) * SLOPE))


@Launcher
@triton.jit
def _forward(
    gate, up, out, GATE_ROW: tl.constexpr, UP_ROW: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    row, channel, inside = _place(WIDTH, TILE)
    g = tl.load(gate + row * GATE_ROW + channel, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * UP_ROW + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + channel, (g * _opening(g) * u).to(out.dtype.element_ty), mask=inside)


@Launcher
@triton.jit
def _gradients(
    grad, gate, up, of_gate, of_up, GATE_ROW: tl.constexpr, UP_ROW: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row, channel, inside = _place(WIDTH, TILE)
    at = row * WIDTH + channel
    given = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * GATE_ROW + channel, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * UP_ROW + channel, mask=inside, other=0.0).to(tl.float32)
    opening = _opening(g)
    steepness = opening * (1 - opening) * (g * g * (3 * CUBIC) + 1) * SLOPE
    tl.store(of_gate + at, (given * u * (opening + g * steepness)).to(of_gate.dtype.element_ty), mask=inside)
    tl.store(of_up + at, (given * g * opening).to(of_up.dtype.element_ty), mask=inside)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Of [rows, width]."""
    gate, up = _adjacent(gate), _adjacent(up)
    rows, width = gate.shape
    out = gate.new_empty(rows, width)
    _forward(
        (rows * blocks(width, TILE), 1, 1), (gate, up, out), (), (gate.stride(0), up.stride(0), width, TILE),
        num_warps=WARPS,
    )  # fmt: skip
    return out


def gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up, [rows, width]."""
    gate, up = _adjacent(gate), _adjacent(up)
    rows, width = gate.shape
    of_gate, of_up = (gate.new_empty(rows, width) for _ in range(2))
    _gradients(
        (rows * blocks(width, TILE), 1, 1), (grad.contiguous(), gate, up, of_gate, of_up), (),
        (gate.stride(0), up.stride(0), width, TILE), num_warps=WARPS,
    )  # fmt: skip
    return of_gate, of_up


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
