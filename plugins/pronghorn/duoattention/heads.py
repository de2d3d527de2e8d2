"""The heads of one layer, by kind: retrieval heads and streaming heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HeadSplit:
    """Which key/value heads of a layer keep the whole cache, and where each is found among those of its kind.

    Args:
        is_full: for each key/value head of the layer, in the model's order.
    """

    def __init__(self, is_full: Sequence[bool]) -> None:
        self.is_full = tuple(bool(full) for full in is_full)
        self.full = [head for head, full in enumerate(self.is_full) if full]
        self.streaming = [head for head, full in enumerate(self.is_full) if not full]
        self._places = [
            self.full.index(h) if full else -1 - self.streaming.index(h) for h, full in enumerate(self.is_full)
        ]
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.is_full)

    def index(self, device: torch.device) -> Tensor:
        """int32 [heads]: i >= 0 is the i-th full head, i < 0 the (-1 - i)-th streaming head."""
        return self._tensor("index", self._places, device, torch.int32)

    def types(self, group: int, device: torch.device) -> Tensor:
        """int32 [heads * group]: 0 for the query heads of a full head, -1 for those of a streaming one."""
        types = [0 if full else -1 for full in self.is_full for _ in range(group)]
        return self._tensor(f"types {group}", types, device, torch.int32)

    def of_kind(self, tensor: Tensor, full: bool) -> Tensor:
        """The key/value heads, or the query heads of their groups, of one kind; [batch, heads of it, tokens, size]."""
        chosen = self.full if full else self.streaming
        if len(chosen) == len(self):
            return tensor
        group = tensor.shape[1] // len(self)
        first = chosen[0] if chosen else 0
        if chosen == list(range(first, first + len(chosen))):
            return tensor.narrow(1, first * group, len(chosen) * group)
        heads = [head * group + i for head in chosen for i in range(group)]
        return tensor.index_select(1, self._tensor(f"{full} {group}", heads, tensor.device))

    def joined(self, full: Tensor, streaming: Tensor) -> Tensor:
        """Query heads of both kinds, each [batch, heads of it, tokens, size], in the model's order."""
        if not self.full or not self.streaming:
            return full if self.full else streaming
        group = (full.shape[1] + streaming.shape[1]) // len(self)
        both = torch.cat([full, streaming], dim=1)
        if self.full == list(range(len(self.full))):
            return both
        order = self.full + self.streaming
        heads = [order.index(head) * group + i for head in range(len(self)) for i in range(group)]
        return both.index_select(1, self._tensor(f"back {group}", heads, both.device))

    def _tensor(self, name: str, content: list[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
        key = (name, device)
        if key not in self._tensors:
            self._tensors[key] = torch.tensor(content, device=device, dtype=dtype)
        return self._tensors[key]
