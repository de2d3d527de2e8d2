"""An attention backend of vLLM for heads that see a sink and a window, on every device.

Decoded tokens attend to the cache where it lies. A prompt's chunk sees few keys before its own, whatever the context:
the sink and a window. They are gathered from the cache's blocks, so blocks may be of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
)

from pronghorn.kernels.cache_write import cache_write
from pronghorn.kernels.decode_attention import CachedHeads, decode_attention
from pronghorn.kernels.head_sparse_attention import STREAMING, head_sparse_attention


class SinkWindowBackend(AttentionBackend):
    """Given to layers directly, so it needs no registration; vLLM wants one of its own names."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """The name that vLLM keeps for others' backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SinkWindowImpl]:
        """What attends."""
        return SinkWindowImpl

    @staticmethod
    def get_builder_cls() -> type[SinkWindowBuilder]:
        """What prepares a step."""
        return SinkWindowBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """As newer versions have it for all backends: a head's keys and values side by side."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Blocks outermost, which lets older versions pad them."""
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)


@dataclass
class Decoded:
    """Requests of which one token is computed.

    Attributes:
        lengths: int32 [requests], tokens of each, the computed one among them.
        block_table: int32 [requests, blocks].
        rows: [requests], where among the step's queries each is; None where they are the first ones, in order.
    """

    lengths: Tensor
    block_table: Tensor
    rows: Tensor | None


@dataclass
class Chunk:
    """A request of which several tokens are computed, and where the keys are that they may see.

    Attributes:
        rows: of the step's queries.
        blocks: [keys], of the sink, of a window before the chunk, and of the chunk; the last ones of a long sequence.
        offsets: [keys], in their blocks.
        start: int32 [1], the first of them that is one: a short sequence has fewer.
    """

    rows: slice
    blocks: Tensor
    offsets: Tensor
    start: Tensor


@dataclass
class SinkWindowMetadata(AttentionMetadata):
    """A step; the same for all layers that share blocks."""

    decoded: Decoded | None
    chunks: list[Chunk]


class SinkWindowBuilder(AttentionMetadataBuilder[SinkWindowMetadata]):
    """Finds out what a step computes; sizes come from the host, so nothing waits for the device."""

    # Steps that only decode use no more than tensors that vLLM keeps in place.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        self.sink_size, self.window = kv_cache_spec.sink_size, kv_cache_spec.sliding_window

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> SinkWindowMetadata:
        """What a step computes."""
        batch = common_attn_metadata
        if batch.max_query_len == 1:
            return SinkWindowMetadata(Decoded(batch.seq_lens, batch.block_table_tensor, None), [])
        firsts = batch.query_start_loc_cpu
        counts = firsts.diff()
        single = (counts == 1).nonzero().flatten()
        decoded = None
        if len(single):
            requests = single.to(batch.seq_lens.device, non_blocking=True)
            rows = batch.query_start_loc[requests].long()
            decoded = Decoded(batch.seq_lens[requests], batch.block_table_tensor[requests], rows)
        several = [
            (request, int(firsts[request]), int(counts[request])) for request in (counts > 1).nonzero().flatten()
        ]
        return SinkWindowMetadata(decoded, [self._chunk(batch, *chunk) for chunk in several])

    def _chunk(self, batch: Any, request: int, first: int, tokens: int) -> Chunk:
        before = self.sink_size + self.window - 1
        computed = batch.seq_lens[request].long() - tokens
        place = torch.arange(before + tokens, device=computed.device) - (before - computed).clamp(min=0)
        place = place + (place >= self.sink_size) * (computed - before).clamp(min=0)
        place = place.clamp(min=0)  # not seen: it lies before the start
        blocks = batch.block_table_tensor[request].long()[place // self.block_size]
        start = (before - computed).clamp(min=0).to(torch.int32)[None]
        return Chunk(slice(first, first + tokens), blocks, place % self.block_size, start)


class SinkWindowImpl(AttentionImpl[SinkWindowMetadata]):
    """Attention of one layer's streaming heads."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sink_size: int = 0,
        window: int = 1,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sink_size, self.window = sink_size, window
        self._index: Tensor | None = None

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store keys and values [tokens, heads, head_dim]; a slot of -1 is padding."""
        tokens = slot_mapping.shape[0]
        cache_write(key[:tokens], value[:tokens], *self._halves(kv_cache), slot_mapping.long())

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SinkWindowMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Queries [tokens, heads, head_dim] over the cache, into `output`."""
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        output = output.view(query.shape)
        if attn_metadata.decoded is not None:
            self._decode(query, kv_cache, attn_metadata.decoded, output)
        for chunk in attn_metadata.chunks:
            self._read(query[chunk.rows], kv_cache, chunk, output[chunk.rows])
        return output

    def _decode(self, query: Tensor, kv_cache: Tensor, decoded: Decoded, output: Tensor) -> None:
        rows, count = decoded.rows, min(decoded.lengths.shape[0], query.shape[0])
        own = query[:count] if rows is None else query[rows]
        keys, values = self._halves(kv_cache)
        cache = CachedHeads(
            keys, values, decoded.lengths[:count], block_table=decoded.block_table[:count],
            sink_size=self.sink_size, recent_size=self.window,
        )  # fmt: skip
        none = keys.new_empty(count, 0, 1, self.head_size)
        no_heads = CachedHeads(none, none, cache.lengths)
        result = decode_attention(own[:, :, None], no_heads, cache, self._head_index(query.device), scale=self.scale)
        if rows is None:
            output[:count] = result[:, :, 0]
        else:
            output[rows] = result[:, :, 0]

    def _read(self, query: Tensor, kv_cache: Tensor, chunk: Chunk, output: Tensor) -> None:
        gathered = kv_cache[chunk.blocks, :, chunk.offsets].transpose(0, 1)[None]
        keys, values = gathered.split(self.head_size, dim=-1)
        types = torch.full((self.num_heads,), STREAMING, dtype=torch.int32, device=query.device)
        result = head_sparse_attention(
            query.transpose(0, 1)[None], keys, values, types, sink_size=self.sink_size, recent_size=self.window,
            start=chunk.start, scale=self.scale,
        )  # fmt: skip
        output.copy_(result[0].transpose(0, 1))

    def _halves(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [blocks, heads, block size, head_dim]."""
        return kv_cache[..., : self.head_size], kv_cache[..., self.head_size :]

    def _head_index(self, device: torch.device) -> Tensor:
        if self._index is None:
            self._index = torch.arange(-1, -1 - self.num_kv_heads, -1, dtype=torch.int32, device=device)
        return self._index
