"""A list of tensors that moves from memory to disk when it grows beyond a budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from pronghorn.transformers.disk import mapped_copy


class ActivationStore:
    """Tensors in order, on the CPU; those that do not fit `budget` bytes of memory are memory-mapped files.

    Args:
        budget: bytes to keep in memory.
        directory: where the files go; they have no name and vanish with their tensors, or with the process.
    """

    def __init__(self, budget: int, directory: Path) -> None:
        self.budget = budget
        self.directory = directory
        self._tensors: list[Tensor] = []
        self._in_memory = 0
        self.spilled = 0

    def append(self, tensor: Tensor) -> None:
        """Add a tensor; it is copied.

        Raises:
            OSError: the disk has no room.
        """
        size = tensor.numel() * tensor.element_size()
        if self._in_memory + size <= self.budget:
            self._in_memory += size
            self._tensors.append(tensor.to("cpu", copy=True))
        else:
            self._tensors.append(mapped_copy(tensor, self.directory))
            self.spilled += size

    def clear(self) -> None:
        """Drop all tensors."""
        self._tensors.clear()
        self._in_memory = self.spilled = 0

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors)
