"""DuoAttention in transformers: `attn_implementation="duo"` and its caches."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicSlidingWindowLayer,
    StaticSlidingWindowLayer,
)

from pronghorn.duoattention.config import DuoAttentionConfig
from pronghorn.duoattention.heads import HeadSplit
from pronghorn.duoattention.transformers.attention import ATTENTION, register
from pronghorn.duoattention.transformers.dynamic_cache import DuoDynamicLayer
from pronghorn.duoattention.transformers.static_cache import DuoStaticLayer

__all__ = ["DuoAttention", "apply_duo", "register"]

REORDERED = "_duoattention_reordered"
FULL, SLIDING = "full_attention", "sliding_attention"


class DuoAttention:
    """A model with DuoAttention; makes its caches.

    Attributes:
        model: the model.
        config: the settings.
        full_heads: for each layer, for each key/value head in the order of the weights, whether it keeps all tokens.
    """

    def __init__(self, model: PreTrainedModel, config: DuoAttentionConfig, full_heads: list[list[bool]]) -> None:
        self.model, self.config, self.full_heads = model, config, full_heads

    def make_cache(self, *, static: bool = False, max_len: int | None = None) -> Cache:
        """A cache for one batch; give it to the model or to `generate` as `past_key_values`.

        Args:
            static: allocate once, for `max_len` tokens: decoding can then be compiled.
            max_len: tokens that a static cache has room for.

        Raises:
            ValueError: `max_len` is missing, or given for a cache that grows.
        """
        if static != (max_len is not None):
            raise ValueError(f"max_len: got {max_len} with static={static}; a static cache needs it, no other takes it")
        if max_len is not None and max_len < 1:
            raise ValueError(f"max_len: got {max_len}, wanted a positive number of tokens")
        config: Any = self.model.config.get_text_config()
        window: Any = getattr(config, "sliding_window", None)
        layers: list[Any] = []
        for kind, full in zip(layer_types(config), self.full_heads, strict=True):
            if kind == SLIDING:
                layers.append(
                    DynamicSlidingWindowLayer(sliding_window=window) if max_len is None
                    else StaticSlidingWindowLayer(max_cache_len=max_len, sliding_window=window)
                )  # fmt: skip
            elif max_len is None:
                layers.append(DuoDynamicLayer(HeadSplit(full), self.config, config))
            else:
                layers.append(DuoStaticLayer(HeadSplit(full), self.config, config, max_len))
        return Cache(layers=layers)


def apply_duo(model: PreTrainedModel, config: DuoAttentionConfig, *, reorder: bool = False) -> DuoAttention:
    """Prepare a model for DuoAttention.

    Args:
        model: any causal language model of transformers whose attention goes through its attention interface, or the
            language tower of a multimodal one. Layers with a sliding window stay as they are.
        config: which heads are full, and the sizes.
        reorder: permute the rows and columns of the projections so that full heads come first, instead of picking
            heads at every call. The model computes the same, with or without.

    Returns:
        What makes caches for it.

    Raises:
        ValueError: the pattern's shape is not the model's, it lets heads of a layer with a sliding window stream, or
            the attention is of a kind that has no key/value heads (MLA, linear attention), or the model's heads were
            reordered before, so that no pattern fits them but the one that this gave.
        TypeError: no model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, wanted a language model of transformers")
    if getattr(model, REORDERED, False):
        raise ValueError(
            "model: its heads were reordered by an apply_duo before, and patterns are for the order they had; use "
            "what that gave, or load the model anew"
        )
    text: Any = model.config.get_text_config()
    _check_attention(model, text)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    shape = (text.num_hidden_layers, heads)
    full_heads = config.full_heads() or [[True] * heads for _ in range(shape[0])]
    if (len(full_heads), len(full_heads[0])) != shape:
        raise ValueError(
            f"gates: the pattern is for {len(full_heads)} layers of {len(full_heads[0])} key/value heads, "
            f"{type(model).__name__} has {shape[0]} of {shape[1]}"
        )
    for index, kind in enumerate(layer_types(text)):
        if kind == SLIDING and not all(full_heads[index]):
            raise ValueError(
                f"gates: heads of layer {index} are to stream, but it has a sliding window already; "
                "give its heads gates of 1 and a threshold below"
            )
    register()
    model.set_attn_implementation(ATTENTION)
    if reorder:
        from pronghorn.duoattention.reorder import reorder_heads

        full_heads = reorder_heads(model, full_heads)
        setattr(model, REORDERED, True)
    return DuoAttention(model, config, full_heads)


def layer_types(config: Any) -> list[str]:
    """For each layer, "full_attention" or "sliding_attention"."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return list(types)
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return [SLIDING if sliding else FULL] * config.num_hidden_layers


def _check_attention(model: PreTrainedModel, text: Any) -> None:
    name = type(model).__name__
    if getattr(text, "is_encoder_decoder", False):
        raise ValueError(f"model: {name} is an encoder-decoder; only decoder-only language models are supported")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise ValueError(f"model: {name} has multi-head latent attention, whose cache has no heads that could stream")
    kinds = set(layer_types(text)) - {FULL, SLIDING}
    if kinds:
        raise ValueError(f"model: {name} has layers of {', '.join(sorted(kinds))}, for which there is no DuoAttention")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"model: {name} does not use transformers' attention interface")
