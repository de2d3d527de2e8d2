"""What a loader of files is to the tests of faults, and the table of all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        warns: by pattern of files, what a log at WARNING says where damage to them is no error: an end that a crash may
            have cut off is left out; the host takes a checkpoint whose configuration no longer says that it is
            quantized for one that is not, and asks us nothing.
        vllm: whether it imports vLLM.
        slow: whether a load takes too long for many of them in the push run.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    unnamed: tuple[str, ...] = ()
    warns: Mapping[str, str] = field(default_factory=dict)
    vllm: bool = False
    slow: bool = False

    def paths(self, folder: Path) -> list[Path]:
        """Files that it reads."""
        return sorted({path for pattern in self.files for path in folder.glob(pattern)})

    def warned(self, path: Path, said: str) -> bool:
        """Whether a log says what it may say of this file in place of an error."""
        return any(path.match(pattern) and text in said for pattern, text in self.warns.items())


def loader(name: str, *files: str, **options: Any) -> Callable[[type], type]:
    """Takes a class with `write(folder)` and `read(folder)` into the table."""

    def taken(kind: type) -> type:
        LOADERS[name] = Loader(kind.write, kind.read, files, **options)
        return kind

    return taken


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
