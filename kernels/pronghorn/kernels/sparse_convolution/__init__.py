"""Sparse convolution as an implicit matmul: every output row gathers its inputs through a kernel map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.sparse_convolution import reference
from pronghorn.kernels.sparse_convolution.epilogue import Epilogue
from pronghorn.kernels.sparse_convolution.sorting import CountedMap, SortedMap, sort_map

__all__ = ["CountedMap", "Epilogue", "SortedMap", "sort_map", "sparse_convolution"]


def sparse_convolution(
    x: Tensor,
    weight: Tensor,
    kernel_map: Tensor | SortedMap | CountedMap,
    transposed_map: Tensor | SortedMap | CountedMap | None = None,
    *,
    tf32: bool = False,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """y[o] = sum over k of x[map[k, o]] weight[k], where the map has a row.

    Differentiable in `x` and `weight`. Sums are in float32, and in the same order at every call.

    Args:
        x: [inputs, input channels] in fp16, bf16 or fp32 (fp64 in the reference).
        weight: [kernel volume, input channels, output channels] in the dtype of `x`.
        kernel_map: int32 [kernel volume, outputs], -1 where there is no row, or the same sorted by `sort_map`, so that
            tiles of outputs can pass over offsets, or one that tells how many outputs have any.
        transposed_map: int32 [kernel volume, inputs] with the outputs of each input, likewise; wanted for the gradient
            of `x` alone.
        tf32: multiply float32 in the tensor cores' 10-bit mantissa, on a GPU.
        epilogue: what is done to the sums before they are rounded, for inference.

    Returns:
        [outputs, output channels] in the dtype of `x`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device. RuntimeError: the gradient of `x` is
            asked for, and there is no transposed map, or any gradient beside an epilogue.

    Source: Tang et al. (MICRO 2023), sections 2 and 3.
    """
    check_tensor("x", x, dim=2, floating=True)
    check_tensor("weight", weight, dim=3, floating=True, like=x)
    volume, channels, _ = weight.shape
    check_shape("x", x, (x.shape[0], channels))
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: got {weight.dtype}, wanted the dtype of x, {x.dtype}")
    tables = [_tables(name, of, volume, x) for name, of in
              (("kernel_map", kernel_map), ("transposed_map", transposed_map))]  # fmt: skip
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if epilogue is not None:
            raise RuntimeError("epilogue: is for inference; a gradient was asked for")
        result: Tensor = _Differentiable.apply(x, weight, tf32, len(tables[0]), *tables[0], *tables[1])
    else:
        if epilogue is not None:
            _check_epilogue(epilogue, (tables[0][0].shape[1], weight.shape[2]), x)
        result = _operation(x, weight, tables[0], tf32, *(epilogue or ()))
    return result


def _check_epilogue(epilogue: Epilogue, shape: tuple[int, int], x: Tensor) -> None:
    for name, tensor, wanted in (
        ("scale", epilogue.scale, shape[1:]), ("shift", epilogue.shift, shape[1:]),
        ("residual", epilogue.residual, shape),
    ):  # fmt: skip
        if tensor is not None:
            check_tensor(f"epilogue.{name}", tensor, floating=True, like=x)
            check_shape(f"epilogue.{name}", tensor, wanted)


def _tables(name: str, of: Tensor | SortedMap | CountedMap | None, volume: int, x: Tensor) -> list[Tensor]:
    if of is None and name == "transposed_map":
        return []
    tables: list[Any] = list(of) if isinstance(of, tuple) else [of]
    check_tensor(name, tables[0], dim=2, floating=False, like=x)
    check_shape(name, tables[0], (volume, tables[0].shape[1]))
    if tables[0].dtype != torch.int32:
        raise TypeError(f"{name}: got {tables[0].dtype}, wanted torch.int32")
    return tables


def _triton(x: Tensor) -> bool:
    return use_triton("sparse_convolution", x) and x.dtype != torch.float64 and x.numel() > 0


def _forward(
    x: Tensor, weight: Tensor, tables: Sequence[Tensor], tf32: bool, scale: Tensor | None = None,
    shift: Tensor | None = None, residual: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    epilogue = Epilogue(scale, shift, residual, relu)
    if _triton(x):
        from pronghorn.kernels.sparse_convolution import triton

        return triton.sparse_convolution(x, weight, tables, tf32, epilogue)
    return reference.sparse_convolution(x, weight, tables, epilogue)


def _weight_gradient(x: Tensor, grad: Tensor, tables: Sequence[Tensor], tf32: bool) -> Tensor:
    if _triton(x):
        from pronghorn.kernels.sparse_convolution import triton

        return triton.weight_gradient(x, grad, tables, tf32)
    return reference.weight_gradient(x, grad, tables)


_operation = define(
    "sparse_convolution", _forward,
    lambda x, weight, tables, *_: x.new_empty((tables[0].shape[1], weight.shape[2])),
)  # fmt: skip
_gradient_operation = define(
    "sparse_convolution_weight_gradient", _weight_gradient,
    lambda x, grad, tables, tf32: x.new_empty((tables[0].shape[0], x.shape[1], grad.shape[1])),
)  # fmt: skip


class _Differentiable(torch.autograd.Function):
    """The operation with its gradients; maps are given one by one, for a function's arguments are tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tf32: bool, count: int, *maps: Tensor) -> Tensor:
        ctx.tf32, ctx.count = tf32, count
        ctx.save_for_backward(x, weight, *maps)
        result: Tensor = _operation(x, weight, list(maps[:count]), tf32)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *maps = ctx.saved_tensors
        tables, transposed = maps[: ctx.count], maps[ctx.count :]
        grad = grad.contiguous()
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            if not transposed:
                raise RuntimeError("transposed_map: the gradient of x was asked for, and there is none")
            of_x = _operation(grad, weight.transpose(1, 2), transposed, ctx.tf32)
        if ctx.needs_input_grad[1]:
            of_weight = _gradient_operation(x, grad, tables, ctx.tf32)
        return of_x, of_weight, None, None, *[None] * len(maps)
