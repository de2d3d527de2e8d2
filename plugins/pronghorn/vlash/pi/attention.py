"""The attentions of inference: a prefix alone, and a suffix against it. That of training is the kernel itself."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.shared_observation_attention import shared_observation_attention
from pronghorn.kernels.suffix_attention import suffix_attention


def attend_prefix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Images and text among themselves: a shared observation whose one branch is padding, which costs nothing.

    Args:
        query: [batch, tokens, heads, head_dim].
        key: [batch, tokens, key/value heads, head_dim].
        value: likewise.
        mask: bool [batch, tokens], False for padding, which nobody sees.

    Returns:
        [batch, tokens, heads, head_dim], zeros for padding.
    """
    return shared_observation_attention(
        query, key, value, query[:, None, :1], key[:, None, :1], value[:, None, :1], mask, torch.zeros_like(mask[:, :1])
    )[0]


def attend_suffix(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, key: Tensor, value: Tensor, prefix_mask: Tensor,
    state_tokens: int,
) -> Tensor:  # fmt: skip
    """A suffix against the prefix and itself; arguments as in the kernel `suffix_attention`.

    Real-time chunking through the network's Jacobian differentiates it, which that kernel does not: then the suffix is
    one branch of a shared observation, whose prefix asks nothing.
    """
    if not (torch.is_grad_enabled() and query.requires_grad):
        return suffix_attention(query, prefix_key, prefix_value, key, value, prefix_mask, state_tokens=state_tokens)
    idle = query.new_zeros(*prefix_key.shape[:2], *query.shape[2:])
    return shared_observation_attention(
        idle, prefix_key, prefix_value, query[:, None], key[:, None], value[:, None], prefix_mask,
        torch.ones_like(prefix_mask[:, :1]), state_tokens=state_tokens,
    )[1][:, 0]  # fmt: skip
