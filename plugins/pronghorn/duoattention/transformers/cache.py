"""What cache layers share that keep all tokens for retrieval heads, and the first and last ones for streaming heads.

What `update` hands to the attention function is no tensor but the layer with the new tokens: a streaming head sees
more than it keeps, so attention comes before the rest is forgotten.
"""

from __future__ import annotations

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


def expanded(index: Tensor, tensor: Tensor) -> Tensor:
    """[batch, slots] as an index into the slots of [batch, heads, slots, size]."""
    return index.long()[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
