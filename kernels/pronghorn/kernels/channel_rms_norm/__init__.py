"""RMS norm over the channels of each pixel, and what follows it: a residual and an activation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels._arguments import check_shape, check_tensor, wants_gradient
from pronghorn.kernels._dispatch import triton_kernels, use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels._memory import dense
from pronghorn.kernels.channel_rms_norm import reference

__all__ = ["ACTIVATIONS", "channel_rms_norm"]

ACTIVATIONS = (None, "relu", "silu")


def channel_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(x / sqrt(mean over channels of x^2 + eps) * weight + bias + residual).

    Differentiable in `x`, `weight`, `bias` and `residual`. Statistics and sums are in float32 (float64 of such an `x`),
    and in the same order at every call.

    Args:
        x: [batch, channels, length] or [batch, channels, height, width] in fp16, bf16 or fp32 (fp64 in the reference);
            contiguous or with adjacent channels (channels_last). Anything else is copied first.
        weight: [channels], of any floating-point dtype.
        bias: [channels], or None for zeros.
        eps: added to the mean of squares.
        residual: in the shape of `x`, or None for zeros; not in the layout of `x`, it is copied first.
        activation: None, "relu" or "silu".

    Returns:
        In the shape, the dtype and the layout of `x`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Source: Zhang and Sennrich (arXiv 1910.07467), equation 4, over channels and with a bias.
    """
    check_tensor("x", x, floating=True)
    if x.dim() not in (3, 4):
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted 3 or 4 dimensions")
    check_tensor("weight", weight, floating=True, like=x)
    check_shape("weight", weight, (x.shape[1],))
    if bias is not None:
        check_tensor("bias", bias, floating=True, like=x)
        check_shape("bias", bias, (x.shape[1],))
    if residual is not None:
        check_tensor("residual", residual, floating=True, like=x)
        check_shape("residual", residual, x.shape)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: got {eps!r}, wanted a positive number")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, accepted are {', '.join(map(repr, ACTIVATIONS))}")
    if x.dim() == 3:
        rows = None if residual is None else residual.unsqueeze(2)
        return _call(x.unsqueeze(2), weight, bias, rows, eps, activation).squeeze(2)
    return _call(x, weight, bias, residual, eps, activation)


def _call(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, activation: str | None
) -> Tensor:
    if wants_gradient(x, weight, bias, residual):
        result: Tensor = _Differentiable.apply(x, weight, bias, residual, eps, activation)
    else:
        result = _forward_operation(x, weight, bias, residual, eps, activation)
    return result


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float,
        activation: str | None,
    ) -> Tensor:  # fmt: skip
        ctx.eps, ctx.activation = eps, activation
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias, residual)]
        # Without an activation no gradient needs to know what was added.
        ctx.save_for_backward(x, weight, *((None, None) if activation is None else (bias, residual)))
        result: Tensor = _forward_operation(x, weight, bias, residual, eps, activation)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, bias, residual = ctx.saved_tensors
        of_x, of_weight, of_bias, of_residual = _backward_operation(
            x, grad, weight, bias, residual, ctx.eps, ctx.activation
        )
        if ctx.activation is None:
            of_residual = grad
        given = [None if dtype is None else found.to(dtype)
                 for found, dtype in zip((of_weight, of_bias, of_residual), ctx.dtypes, strict=True)]  # fmt: skip
        return of_x, *given, None, None


def _triton(x: Tensor) -> bool:
    return use_triton("channel_rms_norm", x) and x.dtype != torch.float64 and x.numel() > 0


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, activation: str | None
) -> Tensor:
    if _triton(x):
        result: Tensor = triton_kernels("channel_rms_norm").channel_rms_norm(x, weight, bias, residual, eps, activation)
        return result
    return reference.channel_rms_norm(x, weight, bias, residual, eps, activation)


def _backward(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if _triton(x):
        from pronghorn.kernels.channel_rms_norm import triton

        return triton.gradients(x, grad, weight, bias, residual, eps, activation)
    return reference.gradients(x, grad, weight, bias, residual, eps, activation)


def _fake_backward(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    sums = [x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)]
    return torch.empty_like(dense(x)), *sums, x.new_empty(0) if residual is None else torch.empty_like(dense(x))


_forward_operation = define("channel_rms_norm", _forward, lambda x, *_: torch.empty_like(dense(x)))
_backward_operation = define("channel_rms_norm_gradients", _backward, _fake_backward)
