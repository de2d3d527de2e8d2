"""The cache of streaming heads, as vLLM's scheduler sees it: which blocks are kept, and which can be taken over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from pronghorn.vllm.prefix_hits import blocks_of_hit


class SinkWindowManager(SlidingWindowManager):
    """Gives back the blocks between the sink and the window, and takes over a prefix that has both."""

    kv_cache_spec: SinkWindowSpec

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """None: a sequence never loses its first block."""
        return 0

    def remove_skipped_blocks(self, request_id: str, num_computed_tokens: int, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Give back the blocks whose tokens no later token sees."""
        before_window = super().get_num_skipped_tokens(num_computed_tokens)
        self._remove_blocks_in_range(request_id, self.kv_cache_spec.sink_blocks, before_window // self.block_size)

    @classmethod
    def find_longest_cache_hit(  # type: ignore[override]
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **parallel: Any,
    ) -> Any:
        """The longest prefix whose sink and whose last window are cached."""
        find: Any = partial(
            super().find_longest_cache_hit,
            block_hashes=block_hashes,
            kv_cache_group_ids=kv_cache_group_ids,
            block_pool=block_pool,
            **parallel,
        )
        tokens = kv_cache_spec.sink_blocks * kv_cache_spec.block_size
        sinks = blocks_of_hit(
            find(
                max_length=min(max_length, tokens),
                kv_cache_spec=replace(kv_cache_spec, sliding_window=tokens + 1),  # one window over the whole sink
                drop_eagle_block=False,
                alignment_tokens=kv_cache_spec.block_size,
            )
        )
        if len(sinks[0]) < kv_cache_spec.sink_blocks:
            max_length = min(max_length, len(sinks[0]) * kv_cache_spec.block_size)
        hit = find(
            max_length=max_length,
            kv_cache_spec=kv_cache_spec,
            drop_eagle_block=drop_eagle_block,
            alignment_tokens=alignment_tokens,
        )
        for blocks, sink in zip(blocks_of_hit(hit), sinks, strict=True):
            blocks[: len(sink)] = sink[: len(blocks)]
        return hit

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: Any,
        *arguments: Any,
        **options: Any,
    ) -> list[bool] | None:
        """Which of some blocks are worth caching; None for all. The sink is part of every prefix."""
        mask = super().reachable_block_mask(
            start_block, end_block, alignment_tokens, kv_cache_spec, *arguments, **options
        )
        if mask is None:
            return None
        return [kept or block < kv_cache_spec.sink_blocks for block, kept in enumerate(mask, start_block)]


@register_kv_cache_spec(manager_class=SinkWindowManager)
@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """Keys and values of heads that see a sink and a window.

    Attributes:
        sink_size: first tokens, which all others see.
    """

    sink_size: int

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold the sink."""
        return -(-self.sink_size // self.block_size)

    def max_admission_blocks_per_request(self, *arguments: Any, **options: Any) -> int:
        """Most blocks that a sequence holds at a time."""
        return super().max_admission_blocks_per_request(*arguments, **options) + self.sink_blocks
