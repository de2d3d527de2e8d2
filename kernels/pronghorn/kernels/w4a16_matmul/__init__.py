"""Multiply 16-bit activations with a 2- to 8-bit weight, without writing the weight out in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_tensor, resolve_group_size
from pronghorn.kernels._autocast import without_autocast
from pronghorn.kernels._dispatch import use_cuda, use_triton
from pronghorn.kernels.dequantize_weight import check_quantized_weight
from pronghorn.kernels.dequantize_weight.layouts import get_layout
from pronghorn.kernels.w4a16_matmul import cuda, reference

__all__ = ["preferred_layout", "w4a16_matmul"]


def w4a16_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    *,
    layout: str,
    bits: int = 4,
    group_size: int,
    out_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x @ W^T (+ bias) with W as `dequantize_weight` defines it, accumulated in float32.

    Args:
        x: [..., K] in fp16, bf16 or fp32 (fp64 in the reference).
        qweight: packed codes in `layout`.
        scales: scales in `layout`.
        qzeros: zero points in `layout`, None for symmetric layouts.
        layout: "gemm", "gemv", "gemv_fast", "exllama", "marlin", "fragments" or "natural".
        bits: 2, 3, 4 or 8, as far as the layout holds them.
        group_size: input channels a scale; -1 for whole rows.
        out_features: N.
        bias: [N].

    Returns:
        [..., N] in the dtype of `x`. Differentiable in `x` and `bias`; the weight is constant.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or does not fit the layout.

    Source: Lin et al. (arXiv 2306.00978), section 4 (TinyChat).
    """
    check_tensor("qweight", qweight)
    check_tensor("x", x, floating=True, like=qweight)
    if x.dim() == 0:
        raise ValueError("x: got a scalar, wanted [..., K]")
    group_size = check_quantized_weight(qweight, scales, qzeros, layout, bits, group_size, out_features, x.shape[-1])
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, wanted ({out_features},)")
    rows = x.reshape(-1, x.shape[-1])
    output: Tensor = torch.ops.pronghorn.w4a16_matmul(
        rows, qweight, scales, qzeros, layout, bits, group_size, out_features
    )
    output = output.view(*x.shape[:-1], out_features)
    return output if bias is None else output + bias.to(output.dtype)


def preferred_layout(
    layout: str,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """The layout that a weight stored in `layout` is multiplied fastest in; `repack` brings it there.

    Where that takes kernels that are compiled at first use, they are compiled now, so that CUDA graphs can be captured.

    Args:
        layout: what the weight is stored in.
        bits: width of a code.
        group_size: inputs a scale, -1 for the whole row.
        out_features: N.
        in_features: K.
        dtype: of activations and scales.
        device: where it is multiplied.

    Returns:
        "fragments" on a Hopper GPU where shape, bits and dtype allow it, otherwise `layout`.
    """
    group_size = resolve_group_size(group_size, in_features)
    try:
        get_layout(cuda.LAYOUT).check(out_features, in_features, bits, group_size)
    except ValueError:
        return layout
    if cuda.obstacle(device, dtype, dtype, bits, group_size):
        return layout
    cuda.prepare(out_features, in_features, bits=bits, group_size=group_size, dtype=dtype, device=device)
    return cuda.LAYOUT


@torch.library.custom_op("pronghorn::w4a16_matmul", mutates_args=())
def _w4a16_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    layout: str,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    arguments = (qweight, scales, qzeros, layout, bits, group_size, out_features)
    if use_triton("w4a16_matmul", x) and x.dtype != torch.float64:
        if layout == cuda.LAYOUT and qzeros is not None:
            obstacle = cuda.obstacle(x.device, x.dtype, scales.dtype, bits, group_size)
            if use_cuda("w4a16_matmul", obstacle):
                return cuda.w4a16_matmul(x, qweight, scales, qzeros, bits, group_size, out_features)
        from pronghorn.kernels.w4a16_matmul import triton

        return triton.w4a16_matmul(x.contiguous(), *arguments)
    return reference.w4a16_matmul(x, *arguments)


@_w4a16_matmul.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    layout: str,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scales, qzeros, *arguments = inputs
    ctx.save_for_backward(qweight, scales, qzeros)
    ctx.in_features, ctx.arguments = x.shape[1], arguments


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, scales, qzeros = ctx.saved_tensors
    layout, bits, group_size, out_features = ctx.arguments
    weight = torch.ops.pronghorn.dequantize_weight(
        qweight, scales, qzeros, layout, bits, group_size, out_features, ctx.in_features, grad.dtype
    )
    return without_autocast(torch.matmul)(grad, weight), None, None, None, None, None, None, None


_w4a16_matmul.register_autograd(_backward, setup_context=_setup_context)
