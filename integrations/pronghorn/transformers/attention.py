"""Attention implementations for transformers: `attn_implementation="pronghorn_cached"`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pronghorn.kernels.cached_attention import cached_attention

ATTENTION = "pronghorn_cached"


def cached_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over a static cache, given its boolean mask, in one pass; all else is `sdpa`'s.

    `sdpa` copies keys and values for every head of a group where there is a mask, and reads the whole capacity.

    Args:
        module: the attention layer.
        query: [batch, heads, tokens, head size].
        key: [batch, key/value heads, capacity, head size].
        value: as `key`.
        attention_mask: bool [batch or 1, 1, tokens, capacity], or what else `sdpa` takes.
        dropout: of attention weights.
        scaling: of scores.
        **options: those of `sdpa`.

    Returns:
        [batch, tokens, heads, head size], and None for the weights.
    """
    fits = (
        attention_mask is not None
        and attention_mask.dtype == torch.bool
        and attention_mask.shape[-3:-1] == (1, query.shape[2])
        and key.shape[2] > query.shape[2]
        and key.shape == value.shape
        and not dropout
        and not torch.is_grad_enabled()
        and all(options.get(name) is None for name in ("position_bias", "cache", "s_aux", "softcap"))
    )
    if attention_mask is None or not fits:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    return cached_attention(query, key, value, attention_mask, scale=scaling), None


AttentionInterface.register(ATTENTION, cached_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
