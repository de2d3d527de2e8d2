"""Definition of attention over a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast


@without_autocast
def cached_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[batch, tokens, heads, size]; in float32 or better, and rounded once."""
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    key, value = (cached.to(wide).repeat_interleave(groups, dim=1) for cached in (key, value))
    scores = (query.to(wide) @ key.mT * scale).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1).masked_fill(~mask.any(dim=-1, keepdim=True), 0)  # softmax of nothing is NaN
    return (weights @ value).to(query.dtype).transpose(1, 2).contiguous()
