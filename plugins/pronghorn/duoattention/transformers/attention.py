"""`attn_implementation="duo"`: attention over a cache whose heads are of two kinds; anything else is "sdpa"'s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from pronghorn.duoattention.transformers.cache import KEY_OFFSET, DuoLayer, NewTokens
from pronghorn.kernels.head_sparse_attention import head_sparse_attention

ATTENTION = "duo"


def register() -> None:
    """Register the attention and its mask; again is fine."""
    AttentionInterface.register(ATTENTION, duo_attention)
    AttentionMaskInterface.register(ATTENTION, duo_mask)


def duo_mask(
    *args: Any, kv_offset: int = 0, mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:  # fmt: skip
    """For a DuoAttention cache the padding alone, [batch, 1, 1, tokens seen]; else the mask of "sdpa".

    Raises:
        ValueError: the model wants another mask than a causal one over such a cache.
    """
    if kv_offset != KEY_OFFSET:
        if getattr(options.get("config"), "attn_logit_softcapping", None) is not None:
            options["allow_is_causal_skip"] = False  # only "sdpa" itself knows what a missing mask stands for
        options |= {"kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask}
        return sdpa_mask(*args, **options)
    if mask_function is not causal_mask_function:
        raise ValueError("attention_mask: DuoAttention's cache takes causal attention with padding on the left only")
    return None if attention_mask is None else attention_mask[:, None, None, :]


def duo_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of new tokens, which are stored, over a DuoAttention cache.

    Args:
        module: the attention layer.
        query: [batch, heads, tokens, head_dim].
        key: what `DuoLayer.update` returned; a tensor goes to "sdpa".
        value: the same.
        attention_mask: what `duo_mask` made.
        dropout: must be 0.
        scaling: of scores.
        softcap: scores become softcap * tanh(scores / softcap).
        **options: those of "sdpa".

    Returns:
        [batch, tokens, heads, head_dim], and None for the weights.

    Raises:
        ValueError: the cache is another model's, or there is dropout, or padding elsewhere than on the left.
    """
    if not isinstance(key, NewTokens):
        if softcap is not None and attention_mask is not None:
            return _capped(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    _check(module, key.layer, dropout, options)
    output = attend(key.layer, query, key.key, key.value, attention_mask, scaling, softcap or 0.0)
    return output.transpose(1, 2).contiguous(), None


def attend(
    layer: DuoLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """[batch, heads, tokens, head_dim]; the first call, later chunks and single tokens differ (paper, section 2.3)."""
    tokens = query.shape[2]
    if tokens == 1 and layer.started:
        return layer.decode(query, key, value, scale, softcap)
    first = not layer.started
    layer.note_padding(mask, tokens)
    if first:
        layer.store(key, value)
        return _first_chunk(layer, query, key, value, scale, softcap)
    return _later_chunk(layer, query, key, value, scale, softcap)


def _first_chunk(
    layer: DuoLayer, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float
) -> Tensor:
    settings = layer.settings
    if settings.prefill == "dense_first" or not layer.split.streaming:
        return dense_attention(query, key, value, layer.padding, scale, softcap)
    return head_sparse_attention(
        query, key, value, layer.split.types(query.shape[1] // key.shape[1], query.device),
        sink_size=settings.sink_size, recent_size=settings.recent_size, block_size=settings.block_size,
        start=layer.padding, softcap=softcap, scale=scale,
    )  # fmt: skip


def _later_chunk(
    layer: DuoLayer, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float
) -> Tensor:
    split, settings = layer.split, layer.settings
    (before, start), new = layer.window(), layer.encoded(key, value)
    layer.store(key, value)
    full = split.of_kind(query, True)
    if split.full:
        group = full.shape[1] // len(split.full)
        parts = [
            dense_attention(full[:, of.start * group : of.stop * group], keys, values, layer.padding, scale, softcap)
            for of, keys, values in layer.parts_of_full()
        ]
        full = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    streaming = split.of_kind(query, False)
    if split.streaming:
        joined = [torch.cat([old, split.of_kind(n, False)], dim=2) for old, n in zip(before, new, strict=True)]
        start = _start(layer, start, before[0].shape[2], query.shape[2])
        seen = layer.decoded(joined)
        if settings.prefill == "dense_first":
            streaming = dense_attention(streaming, *seen, start, scale, softcap)
        else:
            # What lies between sink and recent tokens is gone; distances among the others are what they were.
            types = torch.full((streaming.shape[1],), -1, dtype=torch.int32, device=query.device)
            streaming = head_sparse_attention(
                streaming, *seen, types, sink_size=settings.sink_size, recent_size=settings.recent_size,
                start=start, softcap=softcap, scale=scale,
            )  # fmt: skip
    return split.joined(full, streaming)


def _start(layer: DuoLayer, start: Tensor | None, before: int, tokens: int) -> Tensor | None:
    """First slot that is no padding, of what streaming heads had and the new tokens."""
    if layer.padding is None:
        return None
    if start is None:
        start = torch.full_like(layer.padding, 0)
    new_padding = (layer.padding - (layer.filled() - tokens)).clamp(min=0)
    return torch.where(new_padding > 0, before + new_padding, start).to(torch.int32)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """Causal attention, the last query at the last key; [batch, heads, tokens, head_dim].

    Args:
        query: [batch, heads, tokens, head_dim].
        key: [batch, key/value heads, ≥ tokens, head_dim].
        value: the same.
        start: int32 [batch], first key that is no padding.
        scale: 1 / sqrt(head_dim) by default.
        softcap: scores become softcap * tanh(scores / softcap) if it is not 0.
    """
    tokens, length = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if start is not None or softcap:
        if query.is_cuda:
            dense = torch.zeros(query.shape[1], dtype=torch.int32, device=query.device)
            return head_sparse_attention(
                query, key, value, dense, sink_size=0, recent_size=1, start=start, softcap=softcap, scale=scale
            )
        slot = torch.arange(length, device=query.device)
        mask = slot <= slot[-tokens:, None]
        if start is not None:
            mask = mask & (slot >= start[:, None, None, None])
        if softcap:
            return _capped(query, key, value, mask, scale, softcap)
        result = scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)
        return result.masked_fill(~mask.any(dim=-1, keepdim=True), 0)  # a row that is padding sees nothing
    if tokens == length:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    bias = causal_lower_right(tokens, length)
    return scaled_dot_product_attention(query, key, value, bias, scale=scale, enable_gqa=grouped)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, softcap: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.repeat_interleave(group, dim=1).mT).float() * scale
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).nan_to_num()  # softmax of nothing is NaN
    return weights.to(value.dtype) @ value.repeat_interleave(group, dim=1)


def _check(module: nn.Module, layer: DuoLayer, dropout: float, options: dict[str, Any]) -> None:
    if getattr(module, "config", layer.owner()) is not layer.owner():
        raise ValueError("past_key_values: the cache was made for another model; make one with its own make_cache()")
    if dropout:
        raise ValueError(f"dropout: got {dropout}; with a DuoAttention cache there is none")
    if options.get("sliding_window") is not None:
        raise ValueError("past_key_values: a layer with a sliding window was given a DuoAttention cache")
    if options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise ValueError("attention with sinks of its own or with a position bias has no DuoAttention")
