"""What a loader of files is to the tests of faults, and the table of all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LOADERS: dict[str, "Loader"] = {}


@dataclass(frozen=True)
class Loader:
    """One way from files to what runs.

    Attributes:
        write: makes the files in a folder that is there.
        read: what is loaded of them; raises where that is not what was written.
        files: what it reads, as patterns below the folder.
        unnamed: of those, what errors need not name: a message, and what the host reads before any code of ours, whose
            errors are its own.
        warns: what a log at WARNING says where something is left out: an end that a crash may have cut off, or the
            weights of a checkpoint whose configuration, to the host, no longer says that they are quantized.
        vllm: whether it imports vLLM.
        slow: whether a load takes too long for many of them in the push run.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    unnamed: tuple[str, ...] = ()
    warns: str = ""
    vllm: bool = False
    slow: bool = False

    def paths(self, folder: Path) -> list[Path]:
        """Files that it reads."""
        return sorted({path for pattern in self.files for path in folder.glob(pattern)})


def loader(name: str, *files: str, **options: Any) -> Callable[[type], type]:
    """Takes a class with `write(folder)` and `read(folder)` into the table."""

    def taken(kind: type) -> type:
        LOADERS[name] = Loader(kind.write, kind.read, files, **options)
        return kind

    return taken


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
