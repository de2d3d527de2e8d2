"""Definition of codes for keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-8  # added, so that equal values have a scale


def kv_quantize(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero of [..., head_dim]."""
    levels = 2**bits - 1
    groups = x.float().unflatten(-1, (x.shape[-1] // group_size, group_size))
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    # Divided by a tensor: on a GPU a number would be inverted first, and round differently.
    scale = (high - low) / torch.full_like(high, levels) + SMALLEST_SCALE
    codes = ((groups - low) / scale + 0.5).floor().clamp(0, levels).to(torch.uint8).flatten(-2)
    if bits == 4:
        codes = codes[..., ::2] << 4 | codes[..., 1::2]
    return codes, scale[..., 0].half(), low[..., 0].half()


def codes_of(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., head_dim] of bytes that hold one or two codes."""
    return codes if bits == 8 else torch.stack([codes >> 4, codes & 15], dim=-1).flatten(-2)


def kv_dequantize(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """[..., head_dim]."""
    wide = dtype if dtype in (torch.float16, torch.float64) else torch.float32
    values = codes_of(codes, bits).to(wide)
    values = values.unflatten(-1, (scale.shape[-1], values.shape[-1] // scale.shape[-1]))
    result: Tensor = (values * scale[..., None].to(wide) + zero[..., None].to(wide)).flatten(-2).to(dtype)
    return result
