"""Triton kernel for bias, residual and activation: a program has ELEMENTS numbers that follow each other in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels._launch import Launcher
from pronghorn.kernels._memory import as_dense, channels_inside, dense
from pronghorn.kernels._triton import activate, blocks

ELEMENTS = 2048
WARPS = 4


@Launcher
@triton.jit(do_not_specialize=["last", "pixels"])
def _bias_activation(
    x, bias, residual, out, last, pixels,
    BIASED: tl.constexpr, ADDED: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr,
    ADJACENT: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """`last`: numbers that the last program has; ADJACENT: channels are, not pixels."""
    # Within a program, offsets are short.
    start = tl.program_id(0).to(tl.int64) * ELEMENTS
    at = tl.arange(0, ELEMENTS)
    inside = at < tl.where(tl.program_id(0) == tl.num_programs(0) - 1, last, ELEMENTS)
    y = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        if ADJACENT:
            c = ((start % CHANNELS).to(tl.int32) + at) % CHANNELS
        else:
            c = (
                ((start // pixels) % CHANNELS).to(tl.int32) + ((start % pixels).to(tl.int32) + at) // pixels
            ) % CHANNELS
        y += tl.load(bias + c).to(tl.float32)
    if ADDED:
        y += tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + at, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=inside)


def bias_activation(x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    """In the shape of x."""
    x = dense(x)
    out = torch.empty_like(x)
    programs = blocks(x.numel(), ELEMENTS)
    given = x if bias is None else bias.contiguous(), x if residual is None else as_dense(residual, x)
    _bias_activation(
        (programs, 1, 1), (x, *given, out),
        (x.numel() - (programs - 1) * ELEMENTS, x.shape[2] * x.shape[3]),
        (bias is not None, residual is not None, activation, x.shape[1], channels_inside(x), ELEMENTS),
        num_warps=WARPS,
    )  # fmt: skip
    return out
