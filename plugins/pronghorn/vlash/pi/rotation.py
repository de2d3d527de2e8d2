"""Rotary positions, with the halves that Gemma pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.rotary_embedding import rotary_embedding

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, each [rows, tokens, head_dim], in float32 or better."""


def inverse_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """theta^(-2i / head_dim): float32 [head_dim / 2].

    Source: RoFormer (arXiv 2104.09864), equation 15.
    """
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of tokens.

    Args:
        positions: int64 [rows, tokens].
        frequencies: [head_dim / 2].
        dtype: of what will be rotated; for float64 it is computed in float64, otherwise in float32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions[..., None].to(wide) * frequencies.to(wide)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(query: Tensor, key: Tensor, by: Rotation) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned to where they stand.

    Args:
        query: [rows, tokens, heads, head_dim].
        key: [rows, tokens, key/value heads, head_dim].
        by: of the tokens.

    Returns:
        Both, rounded once to their dtype.
    """
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return _turned(query, by), _turned(key, by)
    turned = rotary_embedding(query.transpose(1, 2), key.transpose(1, 2), *by)
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


def _turned(x: Tensor, by: Rotation) -> Tensor:
    cos, sin = (part[:, :, None] for part in by)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
