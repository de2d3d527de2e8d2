"""Round a weight to the grid of its groups of input channels, in floating point or as codes."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_bits, check_tensor, resolve_group_size
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels.group_fake_quantize import reference

__all__ = ["group_fake_quantize", "group_quantize"]


def group_fake_quantize(
    weight: Tensor, *, bits: int, group_size: int, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize and dequantize a weight, group by group along its input channels.

    Args:
        weight: [N, K] in fp16, bf16, fp32 or fp64; every step is rounded in this dtype.
        bits: 2, 3, 4 or 8.
        group_size: input channels a scale, a divisor of K; -1 for whole rows.
        symmetric: signed codes around 0 instead of a zero point.

    Returns:
        The rounded weight [N, K], scales and zero points [N, K/group_size], all in the weight's dtype.

    Raises:
        ValueError, TypeError: an argument has the wrong shape or dtype, or K is not a multiple of `group_size`.

    Source: llm-awq's `pseudo_quantize_tensor`; the symmetric rule is AutoAWQ's.
    """
    check_tensor("weight", weight, dim=2, floating=True)
    check_bits(bits)
    group_size = resolve_group_size(group_size, weight.shape[1])
    fake, scales, zeros = torch.ops.pronghorn.group_fake_quantize(weight, bits, group_size, symmetric)
    return fake, scales, zeros


def group_quantize(
    weight: Tensor, *, bits: int, group_size: int, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes behind `group_fake_quantize`, for packing; same arguments and errors.

    Returns:
        Codes uint8 [N, K], scales [N, K/group_size] in the weight's dtype, zero points uint8 [N, K/group_size].
        Symmetric codes are stored with a zero point of 2^(bits-1).
    """
    check_tensor("weight", weight, dim=2, floating=True)
    check_bits(bits)
    group_size = resolve_group_size(group_size, weight.shape[1])
    codes, scales, zeros = reference.quantize(weight, bits, group_size, symmetric)
    middle = 2 ** (bits - 1) if symmetric else 0
    return (codes + middle).to(torch.uint8), scales, (zeros + middle).to(torch.uint8)


@torch.library.custom_op("pronghorn::group_fake_quantize", mutates_args=())
def _group_fake_quantize(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    if use_triton("group_fake_quantize", weight) and weight.dtype != torch.float64:
        from pronghorn.kernels.group_fake_quantize import triton

        return triton.group_fake_quantize(weight.contiguous(), bits, group_size, symmetric)
    return reference.group_fake_quantize(weight.contiguous(), bits, group_size, symmetric)


@_group_fake_quantize.register_fake
def _(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    groups = (weight.shape[0], weight.shape[1] // group_size)
    shape = tuple(weight.shape)
    return weight.new_empty(shape), weight.new_empty(groups), weight.new_empty(groups)
