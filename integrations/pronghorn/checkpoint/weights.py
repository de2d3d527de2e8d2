"""The weights of a checkpoint's folder: whole safetensors, an index that says what is there, finite numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pronghorn.checkpoint import Checkpoint, Finding, failed, ok, skipped
from pronghorn.checkpoint.files import read_json
from pronghorn.files.sealed import INDEX as SEAL
from pronghorn.files.sealed import check_seal
from pronghorn.files.tensor_files import opened

INDEX = ".safetensors.index.json"
NUMBERS_AT_ONCE = 1 << 24
COUNTS_LAYERS = re.compile(r"(^|_)n?(um)?(_hidden)?_?(layers?|blocks)$|^depth$")
COUNTS_CHANNELS = re.compile(r"(hidden|vocab|intermediate|embed|embedding)_(size|dim)$|^(d_model|n_embd|ffn_dim)$")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where, and its shape."""

    file: Path
    shape: tuple[int, ...]


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
    yield _check_sizes(checkpoint, stored)
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
    """Names and shapes in a safetensors file.

    Raises:
        ValueError: it is not a whole one.
    """
    with opened(path) as file:
        return {name: Stored(path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118 - not a dict


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


def _check_sizes(checkpoint: Checkpoint, stored: dict[Path, dict[str, Stored]]) -> Finding:
    """That no size is beyond what the weights can fill: a library would build all of it before it compares."""
    shapes = [tensor.shape for held in stored.values() for tensor in held.values()]
    numbers = sum(int(torch.Size(shape).numel()) for shape in shapes) * 32  # a packed number is a bit at least
    for name, value in checkpoint.text_config.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        most = len(shapes) if COUNTS_LAYERS.search(name) else numbers if COUNTS_CHANNELS.search(name) else None
        if most is not None and value > most:
            what = f"{len(shapes)} tensors" if most == len(shapes) else f"tensors of at most {most} numbers"
            return failed("sizes", f"{name}: the configuration says {value}, the weights are {what}",
                          "take the configuration that belongs to these weights")  # fmt: skip
    return ok("sizes", "of the configuration are within what is stored")


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
