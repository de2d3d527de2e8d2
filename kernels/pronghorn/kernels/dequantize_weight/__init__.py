"""Dequantize a group-quantized weight from any of its memory layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_tensor, resolve_group_size
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels.dequantize_weight import reference
from pronghorn.kernels.dequantize_weight.layouts import get_layout

__all__ = ["check_quantized_weight", "dequantize_weight"]


def dequantize_weight(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    *,
    layout: str,
    bits: int = 4,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight that a checkpoint's packed tensors stand for.

    Args:
        qweight: packed codes; shape and dtype as `LAYOUTS[layout].shapes` says.
        scales: fp16, bf16 or fp32, in the layout's own order.
        qzeros: zero points in the layout's own form; None for symmetric layouts.
        layout: "gemm", "gemv", "gemv_fast", "exllama", "marlin", "fragments" or "natural".
        bits: 2, 3, 4 or 8, as far as the layout holds them.
        group_size: input channels a scale; -1 for whole rows.
        out_features: N.
        in_features: K.
        dtype: of the result, by default that of `scales`.

    Returns:
        [N, K], the sum and product taken in float32 and rounded once.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or does not fit the layout.

    Source: Lin et al. (arXiv 2306.00978), section 4; the layouts' sources stand in `layouts.py`.
    """
    group_size = check_quantized_weight(qweight, scales, qzeros, layout, bits, group_size, out_features, in_features)
    weight: Tensor = torch.ops.pronghorn.dequantize_weight(
        qweight, scales, qzeros, layout, bits, group_size, out_features, in_features, dtype or scales.dtype
    )
    return weight


def check_quantized_weight(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    layout: str,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
) -> int:
    """Check packed tensors against their layout; returns the group size with -1 resolved."""
    given = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    chosen = get_layout(layout)
    group_size = resolve_group_size(group_size, in_features)
    for name, (shape, dtype) in chosen.shapes(out_features, in_features, group_size, bits).items():
        tensor = given[name]
        if tensor is None:
            raise ValueError(f"{name}: missing; layout {layout!r} holds {', '.join(chosen.tensors)}")
        check_tensor(name, tensor, floating=dtype is None, like=qweight)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, layout {layout!r} has {shape}")
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, layout {layout!r} has {dtype}")
    if qzeros is not None and "qzeros" not in chosen.tensors:
        raise ValueError(f"qzeros: layout {layout!r} is symmetric and has none")
    return group_size


@torch.library.custom_op("pronghorn::dequantize_weight", mutates_args=())
def _dequantize_weight(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    layout: str,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    arguments = (layout, bits, group_size, out_features, in_features, dtype)
    if use_triton("dequantize_weight", qweight):
        from pronghorn.kernels.dequantize_weight import triton

        return triton.dequantize_weight(qweight, scales, qzeros, *arguments)
    return reference.dequantize_weight(qweight, scales, qzeros, *arguments).contiguous()


@_dequantize_weight.register_fake
def _(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    layout: str,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return scales.new_empty(out_features, in_features, dtype=dtype)
