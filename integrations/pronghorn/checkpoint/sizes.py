"""Whether configurations ask for more than the weights could fill: libraries build all of it before they compare."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn.checkpoint import CONFIGS, Finding, failed, ok
from pronghorn.checkpoint.files import read_json

BUILT_FROM = {*CONFIGS, "generation_config.json", "scheduler_config.json"}
# Whose values count nothing: ids, frequencies, rates, seeds, bounds, steps of a trainer, and what Qwen keeps unused.
NO_SIZE = re.compile(
    r"(^|_)(ids?|index|indices|suppress_tokens|seed|theta|base|base_freq|max_period|rate|max_window_layers)$"
    r"|(decay|warmup|training|total|online|offline)_steps$|buffer_capacity$|clip|pad_val(ue)?$|limits?$"
)
POSITIONS = re.compile(r"position|seq(uence)?_?len|(^|_)(length|ctx|window|attention_chunk_size)$")
ITEMS = "items of "
COUNTS_LAYERS = re.compile(rf"(^|_)n?(layers?|blocks|stages)($|_per_)|^(\w*coder_)?depths?$|^{ITEMS}")
COUNTS_PARTS = re.compile(r"(^|_)n?(experts?|labels|classes|heads?|groups?|codebooks|quantizers)($|_per_)")
MOST_POSITIONS = 1 << 24  # the longest context that a model states has ten million
FEW_PARTS = 1024  # experts, labels and heads that may be named without weights: base models keep their classes' number
LONGEST_LIST = 4096  # of numbers; tables of noise have a thousand
NUMBERS_OF_BUFFERS = 1 << 24  # which are not stored, as the masks of old models
CODES_IN_A_NUMBER = 32  # of one bit in an int32


@dataclass(frozen=True)
class Room:
    """What weights could fill.

    Attributes:
        tensors: how many there are.
        widest: the largest dimension of one.
        numbers: in all of them.
    """

    tensors: int
    widest: int
    numbers: int


def room_of(shapes: Iterable[tuple[int, ...]]) -> Room:
    """The room in tensors of these shapes; a tensor without numbers may claim any shape, and has none."""
    filled = [shape for shape in shapes if math.prod(shape)]
    widest = max((max(shape, default=1) for shape in filled), default=0)
    return Room(len(filled), widest, sum(map(math.prod, filled)))


def check_sizes(folder: Path, shapes: dict[Path, list[tuple[int, ...]]]) -> Finding:
    """That no number of a configuration is beyond the weights beside it, or beyond all where there are none beside it.

    Args:
        folder: of the checkpoint.
        shapes: of the tensors in each of its files.
    """
    for path in sorted(path for path in folder.rglob("*.json") if path.name in BUILT_FROM):
        beside = [held for file, held in shapes.items() if path.parent in file.parents]
        room = room_of(shape for held in beside or shapes.values() for shape in held)
        for name, value in numbers_of(read_json(path)):
            most = _most(name, room)
            if value > most:
                what = f"{path.relative_to(folder)}: {name}: the configuration says {str(value)[:24]}"
                return failed(
                    "sizes", f"{what}, the weights have room for {most}",
                    f"take the configuration that belongs to these {room.tensors} tensors",
                )  # fmt: skip
    return ok("sizes", "of the configurations are within what is stored")


def check_model_size(model: Any, shapes: Iterable[tuple[int, ...]], packed: bool) -> Finding | None:
    """What is wrong if a model that was built on "meta" needs more memory than its weights justify.

    Sizes that are each within what is stored can be beyond it together.

    Args:
        model: its parameters and buffers.
        shapes: of the stored tensors.
        packed: whether several codes may lie in one stored number.
    """
    stored = room_of(shapes).numbers
    most = stored * (CODES_IN_A_NUMBER if packed else 2) + NUMBERS_OF_BUFFERS  # twice: tied weights are stored once
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if needed <= most:
        return None
    return failed("sizes", f"the configuration means a model of {needed} numbers, the weights have {stored}",
                  "take the configuration that belongs to these weights")  # fmt: skip


def numbers_of(content: Any) -> Iterator[tuple[str, float]]:
    """Every number with its name, at any depth; a list's are called as it is, and its length counts too."""
    waiting = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
            if len(value) > LONGEST_LIST and isinstance(value[0], (int, float)):
                yield f"{ITEMS}{name}", len(value)  # of widths: a block each
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def _most(name: str, room: Room) -> float:
    if NO_SIZE.search(name):
        return math.inf
    if COUNTS_LAYERS.search(name):
        return room.tensors
    if COUNTS_PARTS.search(name):
        return max(room.tensors, room.widest, FEW_PARTS)
    return max(room.numbers, MOST_POSITIONS if POSITIONS.search(name) else 0)
