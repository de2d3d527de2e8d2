"""What the ranks of data-parallel training tell each other: a minibatch is all of theirs."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(Protocol):
    """Several processes, each with some of the minibatch's groups."""

    @property
    def count(self) -> int:
        """How many there are."""

    def gather(self, values: Tensor) -> Tensor:
        """[own] of every rank to [all], in the order of ranks; each has as many as it likes."""

    def add(self, sums: Tensor) -> None:
        """Make a tensor the sum of all ranks', in place."""


class Alone:
    """One process."""

    count = 1

    def gather(self, values: Tensor) -> Tensor:
        """What is there."""
        return values

    def add(self, sums: Tensor) -> None:
        """The sum is there."""


class ProcessGroup:
    """The ranks of a `torch.distributed` group.

    Args:
        device: where its backend communicates.
        group: of processes; None is all.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self._device, self._group = device, group
        self.count = dist.get_world_size(group)

    def gather(self, values: Tensor) -> Tensor:
        """[own] of every rank to [all], in the order of ranks."""
        sizes = torch.zeros(self.count, dtype=torch.long, device=self._device)
        sizes[dist.get_rank(self._group)] = len(values)
        dist.all_reduce(sizes, group=self._group)
        longest = int(sizes.max())
        padded = torch.zeros(longest, dtype=values.dtype, device=self._device)
        padded[: len(values)] = values
        found = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(found, padded, group=self._group)
        return torch.cat([part[:size] for part, size in zip(found, sizes.tolist(), strict=True)]).to(values.device)

    def add(self, sums: Tensor) -> None:
        """All-reduce."""
        dist.all_reduce(sums, group=self._group)
