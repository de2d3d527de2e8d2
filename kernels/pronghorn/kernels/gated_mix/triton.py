"""Triton kernels for the gated mix: each element is read once, and the gate's gradient is summed in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32  # of a tile


@triton.jit
def _tile(
    batch_stride, head_stride, token_stride, heads, tokens, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    blocks = tl.cdiv(tokens, ROWS)
    row, channel = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = pair // heads, pair % heads
    at = b * batch_stride + h * head_stride + row.to(tl.int64)[:, None] * token_stride + channel[None, :]
    return at, (row < tokens)[:, None] & (channel < SIZE)[None, :]


@triton.jit
def _mix(
    full, streaming, gate, out, heads, group, tokens,
    full_batch, full_head, full_token, streaming_batch, streaming_head, streaming_token,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at, inside = _tile(full_batch, full_head, full_token, heads, tokens, SIZE, WIDTH, ROWS)
    f = tl.load(full + at, mask=inside, other=0.0).to(tl.float32)
    at, inside = _tile(streaming_batch, streaming_head, streaming_token, heads, tokens, SIZE, WIDTH, ROWS)
    s = tl.load(streaming + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.load(gate + tl.program_id(0) // tl.cdiv(tokens, ROWS) % heads // group).to(tl.float32)
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)
    at, inside = _tile(heads * tokens * SIZE, tokens * SIZE, SIZE, heads, tokens, SIZE, WIDTH, ROWS)
    tl.store(out + at, (share * f + (1 - share) * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    grad, full, streaming, sums, heads, tokens,
    grad_batch, grad_head, grad_token, full_batch, full_head, full_token,
    streaming_batch, streaming_head, streaming_token,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at, inside = _tile(grad_batch, grad_head, grad_token, heads, tokens, SIZE, WIDTH, ROWS)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    at, inside = _tile(full_batch, full_head, full_token, heads, tokens, SIZE, WIDTH, ROWS)
    f = tl.load(full + at, mask=inside, other=0.0).to(tl.float32)
    at, inside = _tile(streaming_batch, streaming_head, streaming_token, heads, tokens, SIZE, WIDTH, ROWS)
    s = tl.load(streaming + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(tl.sum(g * (f - s), axis=1), axis=0)
    tl.store(sums + tl.program_id(0), total)


def gated_mix(full: Tensor, streaming: Tensor, gate: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim]."""
    full, streaming = _dense_rows(full, streaming)
    batch, heads, tokens, size = full.shape
    out = torch.empty(full.shape, dtype=full.dtype, device=full.device)
    _mix[(batch * heads * triton.cdiv(tokens, TOKENS),)](
        full, streaming, gate.contiguous(), out, heads, heads // gate.shape[0], tokens,
        *full.stride()[:3], *streaming.stride()[:3], size, triton.next_power_of_2(size), TOKENS,
    )  # fmt: skip
    return out


def gate_gradient(grad: Tensor, full: Tensor, streaming: Tensor, gate: Tensor) -> Tensor:
    """[key/value heads], zero where the gate was clamped."""
    grad, full, streaming = _dense_rows(grad, full, streaming)
    batch, heads, tokens, size = full.shape
    blocks = triton.cdiv(tokens, TOKENS)
    sums = torch.empty(batch, heads, blocks, dtype=torch.float32, device=full.device)
    _gradient[(batch * heads * blocks,)](
        grad, full, streaming, sums, heads, tokens,
        *grad.stride()[:3], *full.stride()[:3], *streaming.stride()[:3], size, triton.next_power_of_2(size), TOKENS,
    )  # fmt: skip
    of_gates = sums.sum(dim=(0, 2)).unflatten(0, (gate.shape[0], -1)).sum(dim=1)
    return torch.where((gate >= 0) & (gate <= 1), of_gates, 0).to(gate.dtype)


def _dense_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)
