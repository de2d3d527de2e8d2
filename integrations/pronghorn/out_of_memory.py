"""What this machine says when it has too little memory, and what its user can do."""

from __future__ import annotations

import sys
from typing import Any

REMEDY = "close other programs, or ask for less at once: smaller batches, shorter inputs, a smaller model"
ALLOCATORS = ("can't allocate memory", "CUDA error: out of memory")  # torch on a CPU, and CUDA itself, have no class


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that this machine, or its GPU, has too little memory."""
    torch: Any = sys.modules.get("torch")  # not imported for an error that cannot be its own
    kinds = (MemoryError, torch.OutOfMemoryError) if hasattr(torch, "OutOfMemoryError") else (MemoryError,)
    return isinstance(error, kinds) or any(said in str(error) for said in ALLOCATORS)
