"""Sparse convolution pair by pair: rows are fetched while they are multiplied, and added where they belong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels.fetch_on_demand import reference

__all__ = ["fetch_on_demand"]


def fetch_on_demand(
    x: Tensor,
    weight: Tensor,
    pairs: Tensor,
    starts: Tensor,
    outputs: int,
    *,
    scale: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """y[o] = sum over pairs p = (i, o) of scale[p] x[i] weight[k], where k is the offset that p belongs to.

    Differentiable in `x`, `weight` and `scale`. An output may stand in many pairs, also of one offset. Sums are in
    float32 and in any order, so results differ in their last bits from call to call on a GPU, and so does the gradient
    of `x`; that of `weight` is summed in a fixed order. Where `torch.use_deterministic_algorithms` is on, the reference
    computes the former two, in a fixed order.

    Args:
        x: [inputs, input channels] in fp16, bf16 or fp32 (fp64 in the reference).
        weight: [offsets, input channels, output channels] in the dtype of `x`.
        pairs: int32 [2, pairs], rows of `x` and rows of the result, ordered by offset. Values are not checked.
        starts: int32 or int64 [offsets + 1] on the device of `x`, where the pairs of each offset start: from 0, and up
            to where the last one's end. What stands behind that is passed over.
        outputs: number of rows of the result; those in no pair are zeros.
        scale: float32 [pairs] (fp64 in the reference), by default ones.
        tf32: multiply float32 in the tensor cores' 10-bit mantissa, on a GPU.

    Returns:
        [outputs, output channels] in the dtype of `x`, rounded once.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.

    Source: Hong et al., Exploiting Hardware Utilization and Adaptive Dataflow for Efficient Sparse Convolution in 3D
    Point Clouds (MLSys 2023), section 3.
    """
    check_tensor("x", x, dim=2, floating=True)
    check_tensor("weight", weight, dim=3, floating=True, like=x)
    volume, channels, _ = weight.shape
    check_shape("x", x, (x.shape[0], channels))
    check_tensor("pairs", pairs, dim=2, like=x)
    check_shape("pairs", pairs, (2, pairs.shape[1]))
    check_tensor("starts", starts, like=x)
    check_shape("starts", starts, (volume + 1,))
    _check_dtype("weight", weight, x.dtype)
    _check_dtype("pairs", pairs, torch.int32)
    _check_dtype("starts", starts, torch.int32, torch.int64)
    if scale is not None:
        check_tensor("scale", scale, like=x)
        check_shape("scale", scale, (pairs.shape[1],))
        _check_dtype("scale", scale, torch.float64 if x.dtype == torch.float64 else torch.float32)
    if outputs < 0:
        raise ValueError(f"outputs: got {outputs}, wanted 0 or more")
    result: Tensor = torch.ops.pronghorn.fetch_on_demand(x, weight, *pairs.unbind(), starts, scale, outputs, tf32)
    return result


def _check_dtype(name: str, tensor: Tensor, *accepted: torch.dtype) -> None:
    if tensor.dtype not in accepted:
        raise TypeError(f"{name}: got {tensor.dtype}, wanted {' or '.join(map(str, accepted))}")


def _triton(x: Tensor, columns: int) -> bool:
    return use_triton("fetch_on_demand", x) and x.dtype != torch.float64 and x.numel() > 0 and columns > 0


@torch.library.custom_op("pronghorn::fetch_on_demand", mutates_args=())
def _fetch_on_demand(
    x: Tensor, weight: Tensor, sources: Tensor, targets: Tensor, starts: Tensor, scale: Tensor | None, outputs: int,
    tf32: bool,
) -> Tensor:  # fmt: skip
    ordered = torch.are_deterministic_algorithms_enabled()
    if _triton(x, weight.shape[2]) and len(weight) and not ordered:
        from pronghorn.kernels.fetch_on_demand import triton

        return triton.fetch_on_demand(x, weight, sources, targets, starts, scale, outputs, tf32)
    return reference.fetch_on_demand(x, weight, sources, targets, starts, scale, outputs)


@_fetch_on_demand.register_fake
def _(
    x: Tensor, weight: Tensor, sources: Tensor, targets: Tensor, starts: Tensor, scale: Tensor | None, outputs: int,
    tf32: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty((outputs, weight.shape[2]))


@torch.library.custom_op("pronghorn::fetch_on_demand_weight_gradient", mutates_args=())
def _weight_gradient(
    x: Tensor, grad: Tensor, sources: Tensor, targets: Tensor, starts: Tensor, scale: Tensor | None, tf32: bool
) -> Tensor:
    if _triton(x, grad.shape[1]) and len(starts) > 1:
        from pronghorn.kernels.fetch_on_demand import triton

        return triton.weight_gradient(x, grad, sources, targets, starts, scale, tf32)
    return reference.weight_gradient(x, grad, sources, targets, starts, scale)


@_weight_gradient.register_fake
def _(
    x: Tensor, grad: Tensor, sources: Tensor, targets: Tensor, starts: Tensor, scale: Tensor | None, tf32: bool
) -> Tensor:
    return x.new_empty((starts.shape[0] - 1, x.shape[1], grad.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.tf32 = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, sources, targets, starts, scale = ctx.saved_tensors
    multiply, grad = torch.ops.pronghorn.fetch_on_demand, grad.contiguous()
    of_x = of_weight = of_scale = None
    if ctx.needs_input_grad[0]:
        of_x = multiply(grad, weight.transpose(1, 2), targets, sources, starts, scale, x.shape[0], ctx.tf32)
    if ctx.needs_input_grad[1]:
        of_weight = torch.ops.pronghorn.fetch_on_demand_weight_gradient(
            x, grad, sources, targets, starts, scale, ctx.tf32
        )
    if ctx.needs_input_grad[5]:
        each = torch.arange(sources.shape[0], dtype=torch.int32, device=x.device)  # every pair is an output of its own
        products = multiply(x, weight, sources, each, starts, None, sources.shape[0], ctx.tf32)
        of_scale = (products.to(scale.dtype) * grad[targets]).sum(dim=1)
    return of_x, of_weight, None, None, None, of_scale, None, None


_fetch_on_demand.register_autograd(_backward, setup_context=_setup_context)
