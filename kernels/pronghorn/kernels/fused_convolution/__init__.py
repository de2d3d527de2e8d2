"""A 3 x 3 convolution, and what follows it: a bias, an RMS norm over channels, a sum and an activation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor, wants_gradient
from pronghorn.kernels._dispatch import unforced, use_cuda, use_triton
from pronghorn.kernels._library import define
from pronghorn.kernels.fused_convolution import cuda, reference

__all__ = ["ACTIVATIONS", "fused_convolution", "runs_fused"]

ACTIVATIONS = tuple(cuda.ACTIVATIONS)
INSTEAD = "its reference implementation"  # there is no Triton kernel


def fused_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(norm(conv(x) + bias) + residual), with norm(y) = y / sqrt(mean over channels of y^2 + eps) * w + b.

    The convolution has stride 1, no groups and a border of zeros. Everything is in float32 (float64 of such an `x`) and
    rounded once. It has no Triton kernel: where its CUDA kernel cannot run, its reference does, which is slow
    (`runs_fused` tells). Differentiable in all tensors; with gradients it is the reference that computes, and cuDNN's
    backward, in TF32 where `torch.backends.cudnn` allows that.

    Args:
        x: [batch, channels, height, width] in fp16, bf16 or fp32 (fp64 in the reference). What is not in the
            channels_last format is copied first.
        weight: [results, channels, 3, 3] in the dtype of `x`, likewise.
        bias: [results] in the dtype of `x`, or None for zeros.
        norm_weight: likewise, or None for no norm.
        norm_bias: likewise, with a norm, or None for zeros.
        eps: of the norm, > 0.
        residual: [batch, results, height, width] in the dtype of `x`, or None for zeros.
        activation: None, "relu" or "silu".

    Returns:
        [batch, results, height, width] in the dtype of `x`, channels_last.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
    """
    check_tensor("x", x, dim=4, floating=True)
    if 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted at least one channel and one pixel")
    check_tensor("weight", weight, dim=4, floating=True, like=x)
    results = weight.shape[0]
    check_shape("weight", weight, (results, x.shape[1], 3, 3))
    if not results:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted at least one result")
    shapes = {"bias": (results,), "norm_weight": (results,), "norm_bias": (results,),
              "residual": (len(x), results, *x.shape[2:])}  # fmt: skip
    given = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias, "residual": residual}
    for name, tensor in given.items():
        if tensor is not None:
            check_tensor(name, tensor, floating=True, like=x)
            check_shape(name, tensor, shapes[name])
    for name, tensor in {"weight": weight, **given}.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted that of x, {x.dtype}")
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias: got one without norm_weight, wanted both or none")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: got {eps!r}, wanted a positive number")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, accepted are {', '.join(map(repr, ACTIVATIONS))}")
    tensors = x, weight, bias, norm_weight, norm_bias, residual
    if wants_gradient(*tensors):
        return reference.fused_convolution(*tensors, eps, activation)
    result: Tensor = _operation(*tensors, eps, activation)
    return result


def runs_fused(x: Tensor, weight: Tensor, *, normed: bool = False) -> bool:
    """Whether the CUDA kernel runs on tensors like these and fills the GPU, so that it is the fast way.

    While `torch.compile` looks on it does not: what fills a GPU is asked of the loaded kernel.
    """
    if not unforced() or torch.compiler.is_compiling() or wants_gradient(x, weight) or cuda.obstacle(x, weight):
        return False
    return cuda.fills(x, weight, normed)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: Tensor | None, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    tensors = x, weight, bias, norm_weight, norm_bias, residual
    if use_triton("fused_convolution", x) and use_cuda("fused_convolution", cuda.obstacle(x, weight), INSTEAD):
        return cuda.fused_convolution(*tensors, eps, activation)
    return reference.fused_convolution(*tensors, eps, activation)


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    shape = len(x), len(weight), *x.shape[2:]
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


_operation = define("fused_convolution", _forward, _fake)
