"""A cache layer that grows with every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pronghorn.duoattention.config import DuoAttentionConfig
from pronghorn.duoattention.heads import HeadSplit
from pronghorn.duoattention.transformers.cache import DuoLayer, expanded


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
        return [tensor.gather(2, expanded(source, tensor)) for tensor in seen]

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


def _joined(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat([old, new], dim=2) if old.shape[2] else new.contiguous()
