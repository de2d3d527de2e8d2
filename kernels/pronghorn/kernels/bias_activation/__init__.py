"""What follows a convolution: its bias, a residual and an activation, in one pass over what it gave."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor, wants_gradient
from pronghorn.kernels._dispatch import triton_kernels, use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels._memory import dense
from pronghorn.kernels.bias_activation import reference

__all__ = ["ACTIVATIONS", "bias_activation"]

ACTIVATIONS = (None, "relu", "silu")


def bias_activation(
    x: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """activation(x + bias + residual), computed in float32 (float64 of such an `x`).

    Differentiable in all; with gradients it is the reference that computes.

    Args:
        x: [batch, channels, height, width] in fp16, bf16 or fp32 (fp64 in the reference); contiguous or in the
            channels_last format. Anything else is copied first.
        bias: [channels], of any floating-point dtype, or None for zeros.
        residual: in the shape of `x`, or None for zeros; not in the memory format of `x`, it is copied first.
        activation: None, "relu" or "silu".

    Returns:
        In the shape, the dtype and the memory format of `x`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
    """
    check_tensor("x", x, dim=4, floating=True)
    if bias is not None:
        check_tensor("bias", bias, floating=True, like=x)
        check_shape("bias", bias, (x.shape[1],))
    if residual is not None:
        check_tensor("residual", residual, floating=True, like=x)
        check_shape("residual", residual, x.shape)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, accepted are None, 'relu' and 'silu'")
    if wants_gradient(x, bias, residual):
        return reference.bias_activation(x, bias, residual, activation)
    result: Tensor = _operation(x, bias, residual, activation)
    return result


def _forward(x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    if use_triton("bias_activation", x) and x.dtype != torch.float64 and x.numel() > 0:
        result: Tensor = triton_kernels("bias_activation").bias_activation(x, bias, residual, activation)
        return result
    return reference.bias_activation(dense(x), bias, residual, activation)


_operation = define("bias_activation", _forward, lambda x, *_: torch.empty_like(dense(x)))
