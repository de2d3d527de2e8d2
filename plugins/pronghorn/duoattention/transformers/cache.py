"""Cache layers that keep all tokens for retrieval heads, and the first and last ones for streaming heads.

What `update` hands to the attention function is no tensor but the layer with the new tokens: a streaming head sees
more than it keeps, so attention comes before the rest is forgotten.
"""

from __future__ import annotations

import copy
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from pronghorn.duoattention.config import DuoAttentionConfig
from pronghorn.duoattention.heads import HeadSplit
from pronghorn.kernels.cache_append import cache_append
from pronghorn.kernels.decode_attention import CachedHeads, decode_attention
from pronghorn.kernels.kv_quantize import kv_dequantize, kv_quantize

# What a layer here gives as the offset of its keys: the mask function cannot see the cache, and knows it by this.
KEY_OFFSET = -(2**31)
UNPACKED_BYTES = 2**30  # of keys and values that are unpacked at once, if one head has no more


class NewTokens:
    """Keys and values of new tokens, and the cache layer that they are for; stands in for both in attention.

    Attributes:
        layer: the cache layer.
        key: [batch, key/value heads, tokens, head_dim].
        value: the same.
    """

    def __init__(self, layer: DuoLayer, key: Tensor, value: Tensor) -> None:
        self.layer, self.key, self.value = layer, key, value

    def __getattr__(self, name: str) -> NoReturn:
        raise TypeError(
            f"past_key_values: a DuoAttention cache was given to a model with another attention, which asked for its "
            f"{name!r}; call model.set_attn_implementation('duo')"
        )


class DuoLayer(CacheLayerMixin):
    """What the growing and the static layer share.

    Args:
        split: the layer's heads.
        settings: sizes, bits and windows.
        owner: configuration of the model that the cache is for.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, split: HeadSplit, settings: DuoAttentionConfig, owner: PreTrainedConfig) -> None:
        super().__init__()
        self.split, self.settings = split, settings
        self.owner = weakref.ref(owner)  # copies of the cache are for the same model
        self.full: list[Tensor] = []  # each [batch, heads of the kind, slots, …]: key, value, or codes, scale and zero
        self.streaming: list[Tensor] = []
        self.padding: Tensor | None = None  # [batch]: tokens before the first real one; None where no row has any
        self.started = False  # whether there are tokens; known without asking the device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take over dtype and device, and make room."""
        self.dtype, self.device, self.head_dim = key_states.dtype, key_states.device, key_states.shape[-1]
        self.is_initialized = True
        self._allocate(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The new tokens and this layer, for the attention function, which stores them.

        Raises:
            ValueError: they have another number of heads than the pattern.
        """
        if key_states.shape[1] != len(self.split):
            raise ValueError(
                f"past_key_values: the cache was made for {len(self.split)} key/value heads in this layer, "
                f"the model has {key_states.shape[1]}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = NewTokens(self, key_states, value_states)
        return tokens, tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the mask, and a mark that it is for this cache."""
        return self.get_seq_length() + query_length, KEY_OFFSET

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that hold keys and values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.full, *self.streaming))

    # What attention needs, in the order it asks for it.

    @abstractmethod
    def filled(self) -> int:
        """Tokens seen so far; waits for the device where only it knows how many."""

    def note_padding(self, mask: Tensor | None, tokens: int) -> None:
        """Learn from a mask [batch, 1, 1, ≥ seen + tokens] how many tokens on the left are none.

        Raises:
            ValueError: there is padding elsewhere.
        """
        if mask is None:
            return
        seen = mask[:, 0, 0, : self.filled() + tokens]
        if bool(seen.all()):
            return
        if bool((seen[:, 1:] < seen[:, :-1]).any()):
            raise ValueError("attention_mask: has zeros after ones; only padding on the left is supported")
        self.padding = seen.logical_not().sum(dim=1).to(torch.int32)

    @abstractmethod
    def store(self, key: Tensor, value: Tensor) -> None:
        """Keep new tokens, and forget what streaming heads no longer need."""

    @abstractmethod
    def stored_full(self) -> list[Tensor]:
        """Encoded tensors of full heads, [batch, full heads, tokens, …]."""

    def parts_of_full(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Full heads, some at a time, with keys and values of all that is stored: [batch, heads, tokens, head_dim].

        As codes take four times the memory when they are unpacked, which a long context may not leave, not all heads
        are at the same time.
        """
        stored = self.stored_full()
        batch, heads, tokens = stored[0].shape[:3]
        together = heads
        if self.settings.kv_bits != 16:
            bytes_of_head = 2 * batch * tokens * self.head_dim * self.dtype.itemsize
            together = max(1, UNPACKED_BYTES // max(1, bytes_of_head))
        for first in range(0, heads, together):
            part = slice(first, min(heads, first + together))
            yield part, *self.decoded([tensor[:, part] for tensor in stored])

    @abstractmethod
    def window(self) -> tuple[list[Tensor], Tensor | None]:
        """Encoded tensors of streaming heads in the order of time, and the first slot [batch] of no padding."""

    @abstractmethod
    def decode(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float) -> Tensor:
        """Attention of one new token, which is stored."""

    def encoded(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """Keys and values as they are stored."""
        if self.settings.kv_bits == 16:
            return [key, value]
        return [*kv_quantize(key, bits=self.settings.kv_bits), *kv_quantize(value, bits=self.settings.kv_bits)]

    def decoded(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What `encoded` was given, up to rounding."""
        if self.settings.kv_bits == 16:
            return tensors[0], tensors[1]
        options: dict[str, Any] = {"bits": self.settings.kv_bits, "dtype": self.dtype}
        return kv_dequantize(*tensors[:3], **options), kv_dequantize(*tensors[3:], **options)

    def _attend(
        self,
        query: Tensor,
        full: CachedHeads,
        streaming: CachedHeads,
        extra: tuple[Tensor, Tensor] | None,
        scale: float | None,
        softcap: float,
    ) -> Tensor:
        key, value = extra or (None, None)
        return decode_attention(
            query, full, streaming, self.split.index(query.device), key=key, value=value, scale=scale,
            softcap=softcap, bits=self.settings.kv_bits,
        )  # fmt: skip

    def _cached(self, tensors: list[Tensor], lengths: Tensor, start: Tensor | None) -> CachedHeads:
        if self.settings.kv_bits == 16:
            return CachedHeads(tensors[0], tensors[1], lengths, start)
        key, key_scale, key_zero, value, value_scale, value_zero = tensors
        return CachedHeads(
            key, value, lengths, start, key_scale=key_scale, key_zero=key_zero,
            value_scale=value_scale, value_zero=value_zero,
        )  # fmt: skip

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        empty = self.encoded(key_states[:, :, :0], value_states[:, :, :0])
        self.full = [self.split.of_kind(tensor, True) for tensor in empty]
        self.streaming = [self.split.of_kind(tensor, False) for tensor in empty]

    # What generation does to a cache.

    def _in_place_of_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.full, self.streaming = [change(t) for t in self.full], [change(t) for t in self.streaming]
            self.padding = None if self.padding is None else change(self.padding)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Exchange the sequences of the batch, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        self._in_place_of_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self._in_place_of_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move what is stored to the CPU."""
        self._in_place_of_batch(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move it back."""
        self._in_place_of_batch(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _tokens_to_crop(self, tokens_to_remove: int) -> int:
        if not self.is_initialized:
            return 0
        seen = self.filled()
        # A positive number is how many to keep, which transformers phases out.
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, seen - tokens_to_remove)
        if removed > seen:
            raise ValueError(f"crop: {removed} tokens are to be removed, {seen} are stored")
        kept = self.window()[0][0].shape[2]
        if self.split.streaming and kept < seen and removed > kept - self.settings.sink_size:
            raise ValueError(
                f"crop: {removed} tokens are to be removed, but streaming heads have only the last "
                f"{kept - self.settings.sink_size}, and what came before them is gone"
            )
        return removed


class DuoDynamicLayer(DuoLayer):
    """Grows with every token; holds just what is kept.

    Streaming heads have their slots in the order of time, at the right end where rows have unequal lengths.
    """

    def __init__(self, split: HeadSplit, settings: DuoAttentionConfig, owner: PreTrainedConfig) -> None:
        super().__init__(split, settings, owner)
        self.cumulative_length: int = 0
        self._real: Tensor | None = None  # [batch]: slots of streaming heads that are no padding; None: all of them

    def filled(self) -> int:
        """Tokens seen so far."""
        return self.cumulative_length

    def get_seq_length(self) -> int:
        """Tokens seen so far, from which positions are counted."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    def store(self, key: Tensor, value: Tensor) -> None:
        """Keep new tokens, and forget what streaming heads no longer need."""
        self.started = True
        tokens = self.encoded(key, value)
        self.full = [_joined(old, self.split.of_kind(new, True)) for old, new in zip(self.full, tokens, strict=True)]
        seen = [_joined(old, self.split.of_kind(new, False)) for old, new in zip(self.streaming, tokens, strict=True)]
        self.cumulative_length += key.shape[2]
        self.streaming = self._kept(seen, key.shape[2])

    def _kept(self, seen: list[Tensor], tokens: int) -> list[Tensor]:
        sink, recent = self.settings.sink_size, self.settings.recent_size
        slots = seen[0].shape[2]
        size = min(slots, sink + recent)
        if self.padding is None:
            if slots == size:
                return seen
            return [torch.cat([tensor[:, :, :sink], tensor[:, :, -recent:]], dim=2) for tensor in seen]
        before = torch.full_like(self.padding, slots - tokens) if self._real is None else self._real
        real = before + tokens
        real = torch.minimum(real, (self.cumulative_length - self.padding).clamp(min=0))  # padding among the new ones
        kept = real.clamp(max=sink + recent)
        order = torch.arange(size, device=real.device) - (size - kept)[:, None]
        from_end = kept[:, None] - order
        source = torch.where(from_end <= recent, slots - from_end, slots - real[:, None] + order).clamp(0, slots - 1)
        self._real = kept
        return [tensor.gather(2, _expanded(source, tensor)) for tensor in seen]

    def stored_full(self) -> list[Tensor]:
        """Encoded tensors of full heads."""
        return self.full

    def window(self) -> tuple[list[Tensor], Tensor | None]:
        """Encoded tensors of streaming heads in the order of time, and the first slot that is none's padding."""
        return self.streaming, None if self._real is None else self.streaming[0].shape[2] - self._real

    def decode(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float) -> Tensor:
        """Attention of one new token, which is stored."""
        token = None
        if self.settings.decode_window == "mask":
            self.store(key, value)
        else:
            token = key, value
        streaming, start = self.window()
        full = torch.full((query.shape[0],), self.cumulative_length, dtype=torch.int32, device=query.device)
        full_heads = self._cached(self.full, full, self.padding)
        streaming_heads = self._cached(streaming, torch.full_like(full, streaming[0].shape[2]), start)
        result = self._attend(query, full_heads, streaming_heads, token, scale, softcap)
        if token is not None:
            self.store(key, value)
        return result

    def _in_place_of_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._in_place_of_batch(change)
        self._real = None if self._real is None else change(self._real)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; streaming heads then have so many less, until new ones come.

        Raises:
            ValueError: they are more than streaming heads still have.
        """
        removed = self._tokens_to_crop(tokens_to_remove)
        if not removed:
            return
        self.cumulative_length -= removed
        self.full, self.streaming = (
            [tensor[:, :, :-removed] for tensor in kind] for kind in (self.full, self.streaming)
        )
        self._real = None if self._real is None else (self._real - removed).clamp(min=0)

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized, self.started, self.cumulative_length = False, False, 0
        self.full, self.streaming, self.padding, self._real = [], [], None, None


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
        ordered = [tensor.gather(2, _expanded(slot, tensor)) for tensor in self.streaming]
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
            buffer[:, :, :size] = tensor.gather(2, _expanded(source.clamp(max=size - 1), tensor))
        self.written.copy_(kept)
        self.lengths.sub_(removed)
        self._counted = self.filled()

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.padding, self.started, self._counted = None, False, 0
        if self.is_initialized:
            self.lengths.zero_()
            self.written.zero_()


def _joined(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat([old, new], dim=2) if old.shape[2] else new.contiguous()


def _zeros(like: Tensor, slots: int) -> Tensor:
    return like.new_zeros((*like.shape[:2], slots, *like.shape[3:]))


def _expanded(index: Tensor, tensor: Tensor) -> Tensor:
    """[batch, slots] as an index into the slots of [batch, heads, slots, size]."""
    return index.long()[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
