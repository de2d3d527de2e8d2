"""Where a checkpoint of a `vlash` policy lies, and what lies beside its weights."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

PROCESSORS = "base"
ADAPTERS = "lora_adapters"


def checkpoint_folder(path: str | Path, revision: str | None) -> Path:
    """The folder of a checkpoint, with all but its weights.

    Args:
        path: a folder, or a repository of the Hub.
        revision: of the repository.

    Raises:
        ValueError: it is no checkpoint of a `vlash` policy.
    """
    folder = Path(path)
    if not folder.is_dir():
        wanted = [f"{PROCESSORS}/*", f"{ADAPTERS}/*"]
        folder = Path(snapshot_download(str(path), revision=revision, allow_patterns=wanted))
    if not (folder / PROCESSORS).is_dir():
        raise ValueError(
            f"{path}: there is no folder {PROCESSORS}, so this is no policy of type vlash; name another policy's "
            "checkpoint as --policy.base_path"
        )
    return folder
