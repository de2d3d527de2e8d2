"""Mixes two attention outputs by a gate for each key/value head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels.gated_mix import reference

__all__ = ["gated_mix"]


def gated_mix(full: Tensor, streaming: Tensor, gate: Tensor) -> Tensor:
    """a * full + (1 - a) * streaming, where a is the gate clamped to 0 … 1, shared by the heads of a group.

    Differentiable in all three; the gate's gradient is float32 and zero where the gate is outside of 0 … 1.

    Args:
        full: [batch, heads, tokens, head_dim] in fp16, bf16 or fp32 (fp64 in the reference).
        streaming: the same.
        gate: [key/value heads], of any floating-point dtype; key/value heads divide heads.

    Returns:
        [batch, heads, tokens, head_dim] in the dtype of `streaming`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.

    Source: Xiao et al. (arXiv 2410.10819), equation 1.
    """
    check_tensor("streaming", streaming, dim=4, floating=True)
    check_tensor("full", full, floating=True, like=streaming)
    check_shape("full", full, tuple(streaming.shape))
    check_tensor("gate", gate, dim=1, floating=True, like=streaming)
    if full.dtype != streaming.dtype:
        raise TypeError(f"full: got {full.dtype}, wanted the dtype of streaming, {streaming.dtype}")
    if not gate.shape[0] or streaming.shape[1] % gate.shape[0]:
        raise ValueError(f"gate: got {gate.shape[0]}, wanted a divisor of the {streaming.shape[1]} heads")
    result: Tensor = torch.ops.pronghorn.gated_mix(full, streaming, gate)
    return result


def _triton(full: Tensor) -> bool:
    return use_triton("gated_mix", full) and full.dtype != torch.float64 and full.numel() > 0


@torch.library.custom_op("pronghorn::gated_mix", mutates_args=())
def _gated_mix(full: Tensor, streaming: Tensor, gate: Tensor) -> Tensor:
    if _triton(full):
        from pronghorn.kernels.gated_mix import triton

        return triton.gated_mix(full, streaming, gate)
    return reference.gated_mix(full, streaming, gate)


@_gated_mix.register_fake
def _(full: Tensor, streaming: Tensor, gate: Tensor) -> Tensor:
    return streaming.new_empty(streaming.shape)


@torch.library.custom_op("pronghorn::gated_mix_gate_gradient", mutates_args=())
def _gate_gradient(grad: Tensor, full: Tensor, streaming: Tensor, gate: Tensor) -> Tensor:
    if _triton(full):
        from pronghorn.kernels.gated_mix import triton

        return triton.gate_gradient(grad, full, streaming, gate)
    return reference.gate_gradient(grad, full, streaming, gate)


@_gate_gradient.register_fake
def _(grad: Tensor, full: Tensor, streaming: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(gate)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    full, streaming, gate = ctx.saved_tensors
    share = reference.shares(gate, full)
    return (
        (share * grad).to(full.dtype) if ctx.needs_input_grad[0] else None,
        ((1 - share) * grad).to(streaming.dtype) if ctx.needs_input_grad[1] else None,
        torch.ops.pronghorn.gated_mix_gate_gradient(grad, full, streaming, gate) if ctx.needs_input_grad[2] else None,
    )


_gated_mix.register_autograd(_backward, setup_context=_setup_context)
