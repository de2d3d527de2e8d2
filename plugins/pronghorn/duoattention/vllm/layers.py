"""Attention layers of vLLM for the two kinds of heads of one layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention

from pronghorn.duoattention.heads import HeadSplit
from pronghorn.duoattention.vllm.backend import SinkWindowBackend
from pronghorn.duoattention.vllm.kv_cache import SinkWindowSpec


class SinkWindow(NamedTuple):
    """What a token sees: the first `sink_size` tokens and the last `window`, itself among them."""

    sink_size: int
    window: int


class SplitAttention(nn.Module):
    """In place of an attention layer: one for its full heads and one for its streaming heads, each with its own cache.

    Args:
        layer: the layer that is replaced.
        split: its key/value heads.
        seen: what streaming heads see.
        most_full_heads: of any layer of the model.
        cache_config: vLLM's.
    """

    order: Tensor
    streaming_heads: Tensor
    full_heads: Tensor

    def __init__(
        self, layer: Attention, split: HeadSplit, seen: SinkWindow, most_full_heads: int, cache_config: Any
    ) -> None:
        super().__init__()
        self.heads, group = layer.num_kv_heads, layer.num_heads // layer.num_kv_heads
        common = {"head_size": layer.head_size, "scale": layer.impl.scale, "cache_config": cache_config}
        self.full: Attention | None = None
        if split.full:
            self.full = Attention(
                num_heads=len(split.full) * group,
                num_kv_heads=len(split.full),
                quant_config=layer.quant_config,
                prefix=f"{layer.layer_name}.full",
                **common,
            )
        self.streaming = StreamingAttention(
            seen,
            most_full_heads,
            num_heads=len(split.streaming) * group,
            num_kv_heads=len(split.streaming),
            quant_config=layer.quant_config,
            prefix=f"{layer.layer_name}.streaming",
            **common,
        )
        order = split.full + split.streaming
        back = [order.index(head) for head in range(len(order))]
        for name, heads in (("full_heads", split.full), ("streaming_heads", split.streaming), ("order", back)):
            self.register_buffer(name, torch.tensor(heads) if split.full else None, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[tokens, heads * head_dim] each, and so is the result."""
        if self.full is None:
            return self.streaming(query, key, value)
        # The query heads of a key/value head go where it goes.
        parts = [part.unflatten(-1, (self.heads, -1)) for part in (query, key, value)]
        full = self.full(*(part.index_select(1, self.full_heads).flatten(1) for part in parts))
        streaming = self.streaming(*(part.index_select(1, self.streaming_heads).flatten(1) for part in parts))
        size = parts[0].shape[-1]
        both = torch.cat([full.unflatten(-1, (-1, size)), streaming.unflatten(-1, (-1, size))], dim=1)
        return both.index_select(1, self.order).flatten(1)


class StreamingAttention(Attention):
    """Attention of streaming heads, whose cache is the sink and the window.

    Args:
        seen: what a token sees.
        most_full_heads: of any layer of the model.
        **options: those of `Attention`.
    """

    def __init__(self, seen: SinkWindow, most_full_heads: int, **options: Any) -> None:
        super().__init__(attn_backend=SinkWindowBackend, **seen._asdict(), **options)
        self.seen, self.most_full_heads = seen, most_full_heads

    def get_kv_cache_spec(self, vllm_config: Any) -> SinkWindowSpec:
        """Blocks of which those between sink and window are given back."""
        return SinkWindowSpec(
            block_size=self._block_size(vllm_config.cache_config.block_size),
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            sliding_window=self.seen.window,
            sink_size=self.seen.sink_size,
        )

    def _block_size(self, block_size: int) -> int:
        # vLLM makes all blocks of one size in bytes, by longer blocks or, where that does not go, by padding. If there
        # is to be padding, then that of the short caches of streaming heads.
        full, size = self.most_full_heads * block_size, block_size
        while full and size % 2 == 0 and self.num_kv_heads * size > full and self.num_kv_heads * size % full:
            size //= 2
        return size
