"""Definition of attention of new tokens over a cached prefix and over themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast


@without_autocast
def suffix_attention(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, key: Tensor, value: Tensor, prefix_mask: Tensor,
    state_tokens: int, scale: float,
) -> Tensor:  # fmt: skip
    """In the shape of the query."""
    tokens, groups = key.shape[1:3]
    group = query.shape[2] // groups
    rows = _rows(query, groups)
    scores = torch.cat([rows @ _rows(prefix_key, groups).mT, rows @ _rows(key, groups).mT], dim=-1) * scale
    first = torch.arange(tokens, device=query.device) < state_tokens
    own = ~(first[:, None] & ~first).repeat_interleave(group, dim=0)
    seen = torch.cat([prefix_mask[:, None].expand(-1, own.shape[0], -1), own.expand(query.shape[0], -1, -1)], dim=-1)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
    of_prefix, of_own = weights.split([prefix_key.shape[1], tokens], dim=-1)
    out = of_prefix @ _rows(prefix_value, groups) + of_own @ _rows(value, groups)
    unfolded: Tensor = out.unflatten(2, (tokens, group)).transpose(1, 2).reshape(query.shape)
    return unfolded.to(query.dtype)


def _rows(tensor: Tensor, groups: int) -> Tensor:
    """[batch, tokens, heads, head_dim] to [batch, groups, tokens * heads / groups, head_dim], wide."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    # Contiguous, because on a CPU the way a product is added up, and with it the last bit, depends on strides.
    rows: Tensor = wide.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)
    return rows.contiguous()
