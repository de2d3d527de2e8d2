"""The middle of a gated convolutional block: SiLU, a depthwise 3x3 convolution, and one half gated by the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels._arguments import check_shape, check_tensor, wants_gradient
from pronghorn.kernels._dispatch import triton_kernels, use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels._memory import dense
from pronghorn.kernels.gated_depthwise_conv import reference

__all__ = ["gated_depthwise_conv"]


def gated_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """value * silu(gate), the two halves of the channels of a depthwise 3x3 convolution of silu(x), plus bias.

    The convolution has stride 1 and a border of zeros. Differentiable in `x`, `weight` and `bias`. Sums are in float32
    (float64 of such an `x`), and in the same order at every call.

    Args:
        x: [batch, 2 * channels, height, width] in fp16, bf16 or fp32 (fp64 in the reference); contiguous or in the
            channels_last format. Anything else is copied first.
        weight: [2 * channels, 1, 3, 3], of any floating-point dtype.
        bias: [2 * channels], or None for zeros.

    Returns:
        [batch, channels, height, width] in the dtype and the memory format of `x`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.

    Source: Xie et al. (arXiv 2410.10629), the Mix-FFN of section 2.2.
    """
    check_tensor("x", x, dim=4, floating=True)
    channels = x.shape[1]
    if not channels or not x.shape[2] or not x.shape[3]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted at least one pixel and one pair of channels")
    if channels % 2:
        raise ValueError(f"x: got {channels} channels, wanted an even number, of values and of gates")
    check_tensor("weight", weight, floating=True, like=x)
    check_shape("weight", weight, (channels, 1, 3, 3))
    if bias is not None:
        check_tensor("bias", bias, floating=True, like=x)
        check_shape("bias", bias, (channels,))
    if wants_gradient(x, weight, bias):
        result: Tensor = _Differentiable.apply(x, weight, bias)
    else:
        result = _forward_operation(x, weight, bias)
    return result


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
        ctx.save_for_backward(x, weight, bias)
        result: Tensor = _forward_operation(x, weight, bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, bias = ctx.saved_tensors
        of_x, *sums = _backward_operation(x, grad, weight, bias)
        return of_x, *[None if dtype is None else found.to(dtype)
                       for found, dtype in zip(sums, ctx.dtypes, strict=True)]  # fmt: skip


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if use_triton("gated_depthwise_conv", x) and x.dtype != torch.float64 and x.numel() > 0:
        result: Tensor = triton_kernels("gated_depthwise_conv").gated_depthwise_conv(x, weight, bias)
        return result
    return reference.gated_depthwise_conv(x, weight, bias)


def _fake_backward(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(dense(x)), x.new_empty(weight.shape, dtype=wide), x.new_empty(x.shape[1], dtype=wide)


_forward_operation = define("gated_depthwise_conv", _forward, lambda x, *_: reference.halved(dense(x)))
_backward_operation = define("gated_depthwise_conv_gradients", reference.gradients, _fake_backward)
