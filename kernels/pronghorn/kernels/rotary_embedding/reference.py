"""Definition of rotary position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._memory import tokens_outside


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both, rotated."""
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    out = tokens_outside(x)
    return out.copy_(wide * cos[:, None].to(wide.dtype) + turned * sin[:, None].to(wide.dtype))
