"""The weights of a checkpoint's folder: whole safetensors, an index that says what is there, finite numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pronghorn.checkpoint import Checkpoint, Finding, failed, ok, skipped
from pronghorn.checkpoint.files import read_json
from pronghorn.checkpoint.sizes import check_sizes
from pronghorn.files.sealed import INDEX as SEAL
from pronghorn.files.sealed import check_seal
from pronghorn.files.tensor_files import opened

INDEX = ".safetensors.index.json"
NUMBERS_AT_ONCE = 1 << 24
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where, its shape, and its dtype as safetensors call it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def check_weights(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What can be said of the weights without a model; reads all of them once, a part at a time."""
    folder = checkpoint.folder
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        yield failed("safetensors", f"{folder}: there are none", "save the model with save_pretrained")
        return
    stored: dict[Path, dict[str, Stored]] = {}
    for path in files:
        try:
            stored[path] = tensors_of(path)
        except ValueError as error:
            yield failed("safetensors", str(error), "fetch or save the file again: it was cut off or changed")
            return
    count = sum(map(len, stored.values()))
    yield ok("safetensors", f"{count} tensors in {len(files)} files")
    yield from _check_seals(checkpoint)
    for root in sorted({path.parent for path in files}):
        together = checkpoint.ecosystem in ("transformers", "vllm")  # others keep statistics beside weights
        yield from _check_folder(root, {path: held for path, held in stored.items() if path.parent == root}, together)
    shapes = {path: [tensor.shape for tensor in held.values()] for path, held in stored.items()}
    yield check_sizes(folder, shapes)
    yield _check_finite(stored)


def _check_seals(checkpoint: Checkpoint) -> Iterator[Finding]:
    """That files have the digests that they were sealed with, where they were."""
    for index in sorted(checkpoint.folder.rglob(SEAL)):
        try:
            check_seal(index.parent)
        except (ValueError, OSError) as error:
            yield failed("digests", str(error), "fetch them again, or `pronghorn seal` what you changed on purpose")
            return
        yield ok("digests", f"the files are those that {SEAL} has")


def tensors_of(path: Path) -> dict[str, Stored]:
    """Names, shapes and dtypes in a safetensors file.

    Raises:
        ValueError: it is not a whole one.
    """
    with opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return {name: Stored(path, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


def stored_shapes(folder: Path) -> list[tuple[int, ...]]:
    """Of all tensors that lie in a folder itself.

    Raises:
        ValueError: a file is not whole.
    """
    return [tensor.shape for tensor in _tensors_in(folder)]


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of most floating numbers that lie in a folder itself; None where there are none that compute.

    Raises:
        ValueError: a file is not whole.
    """
    numbers: Counter[str] = Counter()
    for tensor in _tensors_in(folder):
        numbers[tensor.dtype] += math.prod(tensor.shape)
    return next((DTYPES[name] for name, _ in numbers.most_common() if name in DTYPES), None)


def _tensors_in(folder: Path) -> list[Stored]:
    return [tensor for path in sorted(folder.glob("*.safetensors")) for tensor in tensors_of(path).values()]


def _check_folder(folder: Path, stored: dict[Path, dict[str, Stored]], together: bool) -> Iterator[Finding]:
    """That shards and their index agree; files of one model without an index have no tensor twice."""
    owners = Counter(name for held in stored.values() for name in held)
    indexes = sorted(folder.glob(f"*{INDEX}"))
    again = "save the model again, into an empty folder"
    if not indexes:
        twice = [name for name, times in owners.items() if times > 1]
        if twice and together:
            yield failed("index", f"{folder.name}: {twice[0]} lies in several files, and no index tells which", again)
        return
    for index in indexes:
        content = read_json(index)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            yield failed("index", f"{index.name}: wanted a weight_map of tensors and files", again)
            continue
        outside = [place for place in places.values() if Path(place).name != place or "\\" in place]
        if outside:
            yield failed("index", f"{index.name}: {outside[0]!r} is no name of a file beside it", again)
            continue
        named = set(places.values())
        missing = sorted(name for name in named if folder / name not in stored)
        if missing:
            yield failed("index", f"{index.name}: there is no {missing[0]}", "fetch or save the missing file")
            continue
        held = {name: path.name for path, tensors in stored.items() if path.name in named for name in tensors}
        wrong = sorted(name for name in held.keys() | places.keys() if held.get(name) != places.get(name))
        if wrong:
            where = f"in {held[wrong[0]]}" if wrong[0] in held else "in no file"
            said = places.get(wrong[0], "no file")
            yield failed("index", f"{index.name}: {wrong[0]} lies {where}, the index says {said}", again)
            continue
        yield ok("index", f"{index.name}: {len(places)} tensors in {len(named)} files")


def _check_finite(stored: dict[Path, dict[str, Stored]]) -> Finding:
    counted = 0
    for path, held in stored.items():
        with opened(path) as file:
            for name in held:
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    continue
                if tensor.element_size() == 1:
                    tensor = tensor.float()
                for part in tensor.reshape(-1).split(NUMBERS_AT_ONCE):
                    if not bool(part.isfinite().all()):
                        return failed("finite numbers", f"{path.name}: {name} holds NaN or Inf",
                                      "quantize or train again: a model with it answers nothing")  # fmt: skip
                counted += tensor.numel()
    return ok("finite numbers", f"{counted} numbers") if counted else skipped("finite numbers", "no floating numbers")
