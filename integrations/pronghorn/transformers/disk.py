"""What a calibration has on disk while it runs: tensors that lie there without a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pronghorn.files.atomic import write_atomically, write_part

__all__ = ["mapped_copy", "write_atomically"]


def mapped_copy(tensor: Tensor, directory: Path) -> Tensor:
    """A copy of a tensor in a memory-mapped file that has no name, so that the end of the process removes it.

    Raises:
        OSError: no room or no permission; nothing is left behind.
    """
    content = tensor.detach().cpu().contiguous()
    # Written, not only mapped: a page that finds no room on the disk would end the process with SIGBUS.
    array: Any = content.view(-1).view(torch.uint8).numpy()
    path = write_part(directory, "activations", memoryview(array), sync=False)
    try:
        return torch.from_file(str(path), shared=True, size=content.numel(), dtype=content.dtype).view(content.shape)
    finally:
        path.unlink()
