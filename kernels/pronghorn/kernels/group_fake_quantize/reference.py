"""Definition of group quantization: round to nearest on a grid of 2^bits points for every group of input channels.

Every step is rounded in the weight's own dtype, because that is what published checkpoints were made with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_RANGE = 1e-5


class Quantized(NamedTuple):
    """Integer codes and their grid, each in the weight's dtype: codes [N, K], scales and zeros [N, K/group_size]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def quantize(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Quantized:
    """Codes, scales and zero points; symmetric codes are signed and have zero points of 0."""
    groups = weight.unflatten(-1, (-1, group_size))
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        scales = _divided(groups.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_RANGE), largest)
        zeros = torch.zeros_like(scales)
        codes = (groups / scales).round().clamp(-largest - 1, largest)
    else:
        largest = 2**bits - 1
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scales = _divided((high - low).clamp(min=SMALLEST_RANGE), largest)
        zeros = (-(low / scales).round()).clamp(0, largest)
        # The zero point is added to the rounded quotient: a group without negative weights saturates.
        codes = ((groups / scales).round() + zeros).clamp(0, largest)
    return Quantized(codes.flatten(-2), scales.squeeze(-1), zeros.squeeze(-1))


def _divided(tensor: Tensor, number: int) -> Tensor:
    # By a tensor: CUDA would multiply by a number's reciprocal, one bit off, and a clipped group's lowest weight lies
    # exactly between two zero points.
    return tensor / torch.full_like(tensor, number)


def group_fake_quantize(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The quantized weight in floating point, [N, K], with its scales and zeros."""
    codes, scales, zeros = quantize(weight, bits, group_size, symmetric)
    grouped = codes.unflatten(-1, (-1, group_size))
    return ((grouped - zeros[..., None]) * scales[..., None]).flatten(-2), scales, zeros
