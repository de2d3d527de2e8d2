"""How results lie in memory."""

from __future__ import annotations

from torch import Tensor


def tokens_outside(tensor: Tensor) -> Tensor:
    """Empty [batch, heads, tokens, head_dim] that lies in memory as [batch, tokens, heads, head_dim].

    Layers bring queries and want results so; there the heads join without a copy.
    """
    batch, heads, tokens, size = tensor.shape
    return tensor.new_empty(batch, tokens, heads, size).transpose(1, 2)
