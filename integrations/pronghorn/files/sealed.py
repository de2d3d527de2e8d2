"""Folders of ours whose files other libraries write: an index of digests, written last, seals what lies there.

A folder without `pronghorn.json` is read as it is: someone else's, or one from before there were seals. One that has it
is read only if each file in it is the one that was sealed, none is missing, and none was added to its weights.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pronghorn.files.json_files import load_json, save_json

logger = logging.getLogger(__name__)

INDEX = "pronghorn.json"
FORMAT = 2
WEIGHTS = "*.safetensors"
# What numbers depend on. Tokenizer, generation settings and model card are the user's to edit.
SEALED = (WEIGHTS, "config.json", "*.index.json")


def seal(folder: str | os.PathLike[str], patterns: Iterable[str] = SEALED) -> None:
    """Write the index of a folder that is complete, or write it anew after files were changed on purpose.

    What an index of before has beside the patterns, as a method's own files, stays sealed; what was removed does not.

    Args:
        folder: the checkpoint.
        patterns: of the files' names, below the folder; weights of all kinds, their index and configuration by default.

    Raises:
        ValueError: no file has such a name.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    found = {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    kept = {name for name in _sealed_before(folder) if (folder / name).is_file()}
    names = sorted((found | kept) - {INDEX})
    if not names:
        raise ValueError(f"{folder}: has nothing to seal; wanted files like {', '.join(patterns)}")
    save_json(folder / INDEX, {"files": _digests(folder, names)}, format=FORMAT)


def check_seal(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is sealed; each file is then read once.

    Raises:
        ValueError: a file is not the one that was sealed, or is there beside those that were; it is named.
        FileNotFoundError: a file is missing.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        return False
    sealed = _read_index(folder)
    missing = [name for name in sealed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]}: is missing, {INDEX} has it; the checkpoint is not whole")
    added = sorted(path.name for path in folder.glob(WEIGHTS) if path.name not in sealed)
    if added and any(Path(name).match(WEIGHTS) for name in sealed):
        raise ValueError(f"{folder / added[0]}: {INDEX} does not have it; {_REMEDY}")
    found = _digests(folder, list(sealed))
    other = [name for name, digest in sealed.items() if found[name] != digest]
    if other:
        raise ValueError(f"{folder / other[0]}: damaged or changed, it is not the file that {INDEX} has; {_REMEDY}")
    return True


_REMEDY = f"bring back a copy; or, if it was changed on purpose, `pronghorn seal` the folder or delete {INDEX}"


def _read_index(folder: Path) -> dict[str, str]:
    """Digests by the files' names.

    Raises:
        ValueError: the index is damaged, or names what is not in the folder.
    """
    content = load_json(folder / INDEX, newest=FORMAT)
    sealed = content.get("files") if isinstance(content, dict) else None
    if not isinstance(sealed, dict) or not all(_is_inside(name) for name in sealed):
        raise ValueError(f"{folder / INDEX}: damaged, or none that a checkpoint was sealed with; {_REMEDY}")
    return sealed


def _sealed_before(folder: Path) -> list[str]:
    """Names that an index has which is there; none of a damaged one, which is what sealing anew mends."""
    if not (folder / INDEX).is_file():
        return []
    try:
        return list(_read_index(folder))
    except ValueError as error:
        logger.warning("what was sealed before is not known, the usual files are sealed: %s", error)
        return []


def _is_inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
