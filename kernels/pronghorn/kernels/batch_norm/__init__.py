"""Batch norm over the first rows of a tensor: how many they are is data on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.batch_norm import reference

__all__ = ["Normalised", "batch_norm"]


class Normalised(NamedTuple):
    """What a batch norm gives.

    Attributes:
        y: [rows, channels] in the dtype of `x`; zeros behind the rows that count.
        mean: float32 [channels].
        variance: float32 [channels], biased, of the rows that count.
    """

    y: Tensor
    mean: Tensor
    variance: Tensor


def batch_norm(x: Tensor, count: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Normalised:
    """(x - mean) / sqrt(variance + eps) * weight + bias with the statistics of the first `count` rows.

    Differentiable in `x`, `weight` and `bias`. Statistics and sums are in float32 (float64 of such an `x`), and in the
    same order at every call. Nothing is waited for: a CUDA graph can hold it for any count.

    Args:
        x: [rows, channels], floating point. Rows from `count` on are not read, and get no gradient.
        count: int32 [1], from 1 to the number of rows, on the device of `x`; that it is, is checked on the CPU alone,
            where it waits for nothing. Elsewhere more than there are mean all rows.
        weight: [channels], or None for ones.
        bias: [channels], or None for zeros.
        eps: added to the variance.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.

    Source: Ioffe and Szegedy, Batch Normalization (arXiv 1502.03167), algorithm 1.
    """
    check_tensor("x", x, dim=2, floating=True)
    check_tensor("count", count, like=x)
    check_shape("count", count, (1,))
    if count.dtype != torch.int32:
        raise TypeError(f"count: got {count.dtype}, wanted torch.int32")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_tensor(name, tensor, floating=True, like=x)
            check_shape(name, tensor, (x.shape[1],))
    return Normalised(*_Differentiable.apply(x, count, weight, bias, eps))


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, count: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, variance = _forward_operation(x, count, weight, bias, eps)
        ctx.eps = eps
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
        ctx.save_for_backward(x, count, weight, mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        x, count, weight, mean, variance = ctx.saved_tensors
        of_x, of_weight, of_bias = _backward_operation(x, grad, count, weight, mean, variance, ctx.eps)
        given = [None if dtype is None else found.to(dtype)
                 for found, dtype in zip((of_weight, of_bias), ctx.dtypes, strict=True)]  # fmt: skip
        return of_x, None, *given, None


def _triton(x: Tensor) -> bool:
    return use_triton("batch_norm", x) and x.dtype != torch.float64 and x.numel() > 0


def _forward(
    x: Tensor, count: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if count.device.type == "cpu" and not 1 <= int(count) <= len(x):
        raise ValueError(f"count: got {int(count)}, wanted 1 to the number of rows of x, {len(x)}")
    if _triton(x):
        from pronghorn.kernels.batch_norm import triton

        return triton.batch_norm(x, count, weight, bias, eps)
    return reference.batch_norm(x.contiguous(), count, weight, bias, eps)


def _backward(
    x: Tensor, grad: Tensor, count: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if _triton(x):
        from pronghorn.kernels.batch_norm import triton

        return triton.gradients(x, grad, count, weight, mean, variance, eps)
    return reference.gradients(x.contiguous(), grad.contiguous(), count, weight, mean, variance, eps)


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _statistics(x), _statistics(x)


_forward_operation = define("batch_norm", _forward, _fake)
_backward_operation = define("batch_norm_gradients", _backward, _fake)
