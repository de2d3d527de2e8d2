"""The gated GELU of a feed-forward layer, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.geglu import reference

__all__ = ["geglu"]


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with the GELU that tanh approximates.

    In float32 (float64 of such a `gate`), and rounded once. Differentiable, once, in both.

    Args:
        gate: [..., width] in fp16, bf16 or fp32 (fp64 in the reference). It and `up` may be halves of one tensor; only
            channels that do not lie side by side are copied first.
        up: in the shape and the dtype of `gate`.

    Returns:
        In the shape and the dtype of `gate`, contiguous.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.

    Source: Shazeer (arXiv 2002.05202), equation 6; Hendrycks and Gimpel (arXiv 1606.08415), section 2.
    """
    check_tensor("gate", gate, floating=True)
    if not gate.dim() or not gate.shape[-1]:
        raise ValueError(f"gate: got shape {tuple(gate.shape)}, wanted at least 1 channel")
    check_tensor("up", up, like=gate)
    check_shape("up", up, tuple(gate.shape))
    if up.dtype != gate.dtype:
        raise TypeError(f"up: got {up.dtype}, wanted that of gate, {gate.dtype}")
    trained = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    operation = _Differentiable.apply if trained else _forward_operation
    width = gate.shape[-1]
    result: Tensor = operation(gate.reshape(-1, width), up.reshape(-1, width))
    return result.reshape(gate.shape)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        result: Tensor = _forward_operation(gate, up)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _backward_operation(grad, *ctx.saved_tensors)
        return found


def _triton(gate: Tensor) -> bool:
    return use_triton("geglu", gate) and gate.dtype != torch.float64 and gate.numel() > 0


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    if _triton(gate):
        from pronghorn.kernels.geglu import triton

        return triton.geglu(gate, up)
    return reference.geglu(gate, up).contiguous()


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if _triton(gate):
        from pronghorn.kernels.geglu import triton

        return triton.gradients(grad, gate, up)
    of_gate, of_up = reference.gradients(grad, gate, up)
    return of_gate.contiguous(), of_up.contiguous()


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


_forward_operation = define("geglu", _forward, _fake)
_backward_operation = define("geglu_gradients", _backward, _fake_backward)
