"""A list of tensors that moves from memory to disk when it grows beyond a budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


class ActivationStore:
    """Tensors in order, on the CPU; those that do not fit `budget` bytes of memory are memory-mapped files.

    Args:
        budget: bytes to keep in memory.
        directory: where the files go; they are removed by `clear`.
    """

    _numbers = itertools.count()

    def __init__(self, budget: int, directory: Path) -> None:
        self.budget = budget
        self.directory = directory
        self._tensors: list[Tensor] = []
        self._files: list[Path] = []
        self._in_memory = 0

    def append(self, tensor: Tensor) -> None:
        """Add a tensor; it is copied."""
        size = tensor.numel() * tensor.element_size()
        if self._in_memory + size <= self.budget:
            self._in_memory += size
            self._tensors.append(tensor.to("cpu", copy=True))
            return
        path = self.directory / f"activations-{next(self._numbers)}"
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        self._files.append(path)
        self._tensors.append(mapped.copy_(tensor))

    def clear(self) -> None:
        """Drop all tensors and remove their files."""
        self._tensors.clear()
        self._in_memory = 0
        for path in self._files:
            path.unlink(missing_ok=True)
        self._files.clear()

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors)
