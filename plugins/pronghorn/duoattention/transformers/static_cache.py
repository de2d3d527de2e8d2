"""A cache layer with room for a fixed number of tokens, whose decoding steps can be compiled and replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pronghorn.duoattention.config import DuoAttentionConfig
from pronghorn.duoattention.heads import HeadSplit
from pronghorn.duoattention.transformers.cache import KEY_OFFSET, DuoLayer, expanded
from pronghorn.kernels.cache_append import cache_append
from pronghorn.kernels.decode_attention import CachedHeads


class DuoStaticLayer(DuoLayer):
    """Room for a fixed number of tokens, written in place; decoding steps can be compiled and be CUDA graphs.

    Streaming heads have a ring: token p of a row lies in slot p while it is one of the first `sink_size`, else in slot
    sink_size + (p - sink_size) mod recent_size.
    """

    is_compileable = True

    def __init__(
        self, split: HeadSplit, settings: DuoAttentionConfig, owner: PreTrainedConfig, max_cache_len: int
    ) -> None:
        super().__init__(split, settings, owner)
        self.max_cache_len = max_cache_len
        self._counted = 0  # tokens, where the device need not be asked; behind while steps are compiled or replayed

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        super()._allocate(key_states, value_states)
        batch, window = key_states.shape[0], self.settings.window
        self.full = [_zeros(tensor, self.max_cache_len) for tensor in self.full]
        self.streaming = [_zeros(tensor, min(window, self.max_cache_len)) for tensor in self.streaming]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)  # tokens seen, padding included
        self.written = torch.zeros_like(self.lengths)  # real tokens that went into the ring
        if not torch.compiler.is_compiling():
            for tensor in (*self.full, *self.streaming, self.lengths, self.written):
                torch._dynamo.mark_static_address(tensor)

    def filled(self) -> int:
        """Tokens seen so far; waits for the device."""
        return int(self.lengths[0])

    def get_seq_length(self) -> Any:
        """Tokens seen so far, from which positions are counted."""
        return self.lengths[0] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the mask, and a mark that it is for this cache."""
        return self.max_cache_len, KEY_OFFSET

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self.max_cache_len

    def store(self, key: Tensor, value: Tensor) -> None:
        """Keep new tokens, and forget what streaming heads no longer need.

        Raises:
            ValueError: there is no room for them.
        """
        tokens, seen = key.shape[2], self.filled()
        self._counted = seen
        self._count(tokens)
        self.started = True
        encoded = self.encoded(key, value)
        for buffer, new in zip(self.full, encoded, strict=True):
            buffer[:, :, seen : seen + tokens] = self.split.of_kind(new, True)
        self.lengths.add_(tokens)
        real = torch.full_like(self.written, tokens)
        if self.padding is not None:
            real = torch.minimum(real, (seen + tokens - self.padding).clamp(min=0))
        # Of many new tokens only those are written that stay: two for one slot would be written in any order.
        fresh = [self.split.of_kind(new, False) for new in encoded]
        offset = torch.arange(tokens, device=self.device) - (tokens - real)[:, None]
        position = self.written[:, None] + offset
        total = self.written + real
        stays = (offset >= 0) & (
            (position < self.settings.sink_size) | (position >= (total - self.settings.recent_size)[:, None])
        )
        row, token = stays.nonzero(as_tuple=True)
        slot = self._slot(position)[row, token]
        for buffer, new in zip(self.streaming, fresh, strict=True):
            buffer[row, :, slot] = new[row, :, token]
        self.written.copy_(total)

    def _slot(self, position: Tensor) -> Tensor:
        sink, recent = self.settings.sink_size, self.settings.recent_size
        return torch.where(position < sink, position, sink + (position - sink) % recent)

    def stored_full(self) -> list[Tensor]:
        """Encoded tensors of full heads."""
        seen = self.filled()
        return [tensor[:, :, :seen] for tensor in self.full]

    def window(self) -> tuple[list[Tensor], Tensor | None]:
        """Encoded tensors of streaming heads in the order of time, and the first slot that is none's padding."""
        kept = self.written.clamp(max=self.settings.window)
        size = int(kept.max())
        order = torch.arange(size, device=self.device) - (size - kept)[:, None]
        from_end = kept[:, None] - order
        position = torch.where(from_end <= self.settings.recent_size, self.written[:, None] - from_end, order)
        slot = self._slot(position.clamp(min=0))
        ordered = [tensor.gather(2, expanded(slot, tensor)) for tensor in self.streaming]
        return ordered, None if self.padding is None else size - kept

    def decode(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float) -> Tensor:
        """Attention of one new token, which is stored; nothing here waits for the device."""
        if not torch.compiler.is_compiling():
            self._count(1)
        token = None
        if self.settings.decode_window == "mask":
            self._append(key, value)
        else:
            token = key, value
        full, streaming = self._heads()
        result = self._attend(query, full, streaming, token, scale, softcap)
        if token is not None:
            self._append(key, value)
        return result

    # What replaying steps asks for (pronghorn.transformers.graphs.SteppedLayer).

    def step_memory(self) -> tuple[Tensor | None, ...] | None:
        """What a decoding step reads and writes; None before the first token."""
        if not self.started:
            return None
        return (*self.full, *self.streaming, self.lengths, self.written, self.padding)

    def for_steps(self) -> DuoStaticLayer:
        """A stand-in with the same memory, which counts no tokens on the host."""
        layer = copy.copy(self)
        layer._counted = -(1 << 60)
        return layer

    def count_step(self) -> None:
        """Count a token that is replayed.

        Raises:
            ValueError: there is no room for it.
        """
        self._count(1)

    def _heads(self) -> tuple[CachedHeads, CachedHeads]:
        return self._cached(self.full, self.lengths, self.padding), self._cached(self.streaming, self.written, None)

    def _append(self, key: Tensor, value: Tensor) -> None:
        settings = self.settings
        cache_append(
            key, value, *self._heads(), self.split.index(key.device), sink_size=settings.sink_size,
            recent_size=settings.recent_size, bits=settings.kv_bits,
        )  # fmt: skip

    def _count(self, tokens: int) -> None:
        if self._counted + tokens > self.max_cache_len:
            raise ValueError(
                f"past_key_values: {self._counted} tokens are stored and {tokens} more are to be, "
                f"there is room for {self.max_cache_len}; make_cache(max_len=…) sets it"
            )
        self._counted += tokens

    def _in_place_of_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._in_place_of_batch(change)
        if self.is_initialized:
            self.lengths, self.written = change(self.lengths), change(self.written)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; streaming heads then have so many less, until new ones come.

        Raises:
            ValueError: they are more than streaming heads still have.
        """
        removed = self._tokens_to_crop(tokens_to_remove)
        if not removed:
            return
        ordered, _ = self.window()
        kept = (self.written.clamp(max=self.settings.window) - removed).clamp(min=0)
        size = ordered[0].shape[2]
        # In the order of time from slot 0 on, as if no more tokens than these had ever come.
        source = torch.arange(size, device=self.device) + (size - self.written.clamp(max=self.settings.window))[:, None]
        for buffer, tensor in zip(self.streaming, ordered, strict=True):
            buffer[:, :, :size] = tensor.gather(2, expanded(source.clamp(max=size - 1), tensor))
        self.written.copy_(kept)
        self.lengths.sub_(removed)
        self._counted = self.filled()

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.padding, self.started, self._counted = None, False, 0
        if self.is_initialized:
            self.lengths.zero_()
            self.written.zero_()


def _zeros(like: Tensor, slots: int) -> Tensor:
    return like.new_zeros((*like.shape[:2], slots, *like.shape[3:]))
