"""Keys and values as codes of 4 or 8 bits, with a scale and a zero for each token, head and group of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels.kv_quantize import reference

__all__ = ["kv_dequantize", "kv_quantize"]

BITS = (4, 8)


def kv_quantize(x: Tensor, *, bits: int, group_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of new keys or values: scale = (max - min) / (2^bits - 1) + 1e-8, zero = min, code = (x - zero) / scale.

    Computed in float32 and rounded half away from zero; scale and zero are rounded to fp16 after that. What lies
    outside of fp16 becomes infinite, and NaN makes its group NaN.

    Args:
        x: [..., head_dim] in fp16, bf16 or fp32.
        bits: 4 or 8.
        group_size: channels that share a scale, an even divisor of head_dim; all of them by default.

    Returns:
        Codes uint8 [..., head_dim * bits / 8], of 4 bits the even channel in the high half of a byte; scale and zero
        fp16 [..., head_dim / group_size].

    Raises:
        ValueError, TypeError: an argument has the wrong shape or dtype.

    Source: the demo of 3.3 million tokens that comes with Xiao et al. (arXiv 2410.10819).
    """
    check_tensor("x", x, floating=True)
    group_size = _check_groups(x.shape[-1] if x.dim() else 0, bits, group_size)
    codes, scale, zero = torch.ops.pronghorn.kv_quantize(x, bits, group_size)
    return codes, scale, zero


def kv_dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor, *, bits: int, dtype: torch.dtype = torch.float16
) -> Tensor:
    """What the codes stand for: code * scale + zero.

    Args:
        codes: uint8 [..., head_dim * bits / 8].
        scale: fp16 [..., groups].
        zero: fp16 [..., groups].
        bits: 4 or 8.
        dtype: of the result. In fp16 the product is rounded before the zero is added; in others it is computed in
            float32 and rounded once.

    Returns:
        [..., head_dim].

    Raises:
        ValueError, TypeError: an argument has the wrong shape or dtype.
    """
    check_tensor("codes", codes, floating=False)
    for name, tensor in (("scale", scale), ("zero", zero)):
        check_tensor(name, tensor, floating=True, like=codes)
        check_shape(name, tensor, (*codes.shape[:-1], scale.shape[-1]))
    size = codes.shape[-1] * 8 // bits if bits in BITS else 0
    _check_groups(size, bits, size // max(scale.shape[-1], 1))
    result: Tensor = torch.ops.pronghorn.kv_dequantize(codes, scale, zero, bits, dtype)
    return result


def _check_groups(size: int, bits: int, group_size: int | None) -> int:
    if bits not in BITS:
        raise ValueError(f"bits: got {bits!r}, accepted are {', '.join(map(str, BITS))}")
    group_size = size if group_size is None else group_size
    if size < 1 or group_size < 1 or size % group_size or group_size % 2:
        raise ValueError(f"group_size: got {group_size}, wanted an even divisor of head_dim, which is {size}")
    return group_size


@torch.library.custom_op("pronghorn::kv_quantize", mutates_args=())
def _kv_quantize(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    if use_triton("kv_quantize", x) and x.dtype != torch.float64 and x.numel():
        from pronghorn.kernels.kv_quantize import triton

        return triton.kv_quantize(x, bits, group_size)
    return reference.kv_quantize(x, bits, group_size)


@_kv_quantize.register_fake
def _(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] * bits // 8), dtype=torch.uint8)
    scale = x.new_empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.float16)
    return codes, scale, torch.empty_like(scale)


@torch.library.custom_op("pronghorn::kv_dequantize", mutates_args=())
def _kv_dequantize(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    if use_triton("kv_dequantize", codes) and dtype != torch.float64 and codes.numel():
        from pronghorn.kernels.kv_quantize import triton

        return triton.kv_dequantize(codes, scale, zero, bits, dtype)
    return reference.kv_dequantize(codes, scale, zero, bits, dtype)


@_kv_dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 8 // bits), dtype=dtype)
