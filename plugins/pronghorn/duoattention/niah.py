"""Needle in a haystack: one sentence in a long text, by length of the text and depth of the sentence."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pronghorn.duoattention import kept_answers
from pronghorn.duoattention.kept_answers import KeptAnswers
from pronghorn.duoattention.metrics import rouge_1
from pronghorn.duoattention.plot import plot_needles
from pronghorn.estimate import Estimate, peak_bytes

NEEDLE = (
    "\n\nRemember, the best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n\n"
)
PREFIX = "<|im_start|> This is a very long story book: <book> "
SUFFIX = (
    " </book>.\n\nQuestion: Based on the content of the book, what is the best thing to do in San Francisco?\n\n"
    "Answer: The best thing to do in San Francisco is"
)
BUFFER = 200  # tokens of a context that are left free, for the question and the answer
NEW_TOKENS = 50
BEST = 10.0


@dataclass(frozen=True)
class NeedleGrid:
    """The cells of the test.

    Attributes:
        lengths: of contexts, in tokens.
        depths: of the needle, from 0 to 1.
    """

    lengths: list[int]
    depths: list[float]

    @classmethod
    def between(cls, shortest: int, longest: int, lengths: int = 13, depths: int = 10) -> NeedleGrid:
        """Equal steps of length, and of depth from the beginning to the end.

        Raises:
            ValueError: a number makes no sense.
        """
        if not BUFFER < shortest <= longest:
            raise ValueError(f"lengths: got {shortest} to {longest}, wanted more than {BUFFER}, in order")
        if lengths < 1 or depths < 1:
            raise ValueError(f"lengths, depths: got {lengths} and {depths}, wanted positive numbers")
        steps = torch.linspace(shortest, longest, lengths, dtype=torch.float64).round().long()
        return cls(steps.tolist(), torch.linspace(0, 1, depths, dtype=torch.float64).tolist())


def run_grid(
    answer: Callable[[Tensor, int], Tensor],
    tokenizer: Any,
    haystack: Iterable[str],
    grid: NeedleGrid,
    *,
    path: Path,
    settings: dict[str, Any],
) -> list[list[float]]:
    """Ask in every cell.

    Args:
        answer: prompt ids [1, tokens] and a number of new tokens to their ids, such as `Answer`.
        tokenizer: of the model.
        haystack: texts, repeated until they are long enough.
        grid: the cells.
        path: of a JSON file that keeps the answers; the same call goes on where it was.
        settings: what the answers depend on, for that file.

    Returns:
        Scores [depths][lengths], 0 to 10: ten times ROUGE-1's F of answer and needle.

    Raises:
        ValueError: the file is of other settings, or there is no text.
    """
    text = _repeated(haystack, tokenizer, max(grid.lengths))
    kept = KeptAnswers(path, {**settings, "lengths": grid.lengths, "depths": grid.depths})
    scores = [[0.0] * len(grid.lengths) for _ in grid.depths]
    cells = [(row, column) for column in range(len(grid.lengths)) for row in range(len(grid.depths))]
    for row, column in tqdm(cells, desc="needles", disable=None):
        length, depth = grid.lengths[column], grid.depths[row]
        found = kept.get(f"{length} {depth:g}")
        if found is None:
            found = _found(answer, tokenizer, text, length, depth)
            kept.keep(f"{length} {depth:g}", found)
        scores[row][column] = BEST * rouge_1(found, NEEDLE)
    return scores


def rehearse(
    answer: Callable[[Tensor, int], Tensor],
    tokenizer: Any,
    haystack: Iterable[str],
    grid: NeedleGrid,
    *,
    settings: dict[str, Any],
    device: torch.device,
) -> Estimate:
    """What all cells and their files take, from cells of a few lengths.

    Args:
        answer: as for `run_grid`, as all others are.
        tokenizer: likewise.
        haystack: likewise.
        grid: likewise.
        settings: likewise.
        device: of the model.
    """
    started = time.perf_counter()
    text = _repeated(haystack, tokenizer, max(grid.lengths))
    seconds = time.perf_counter() - started
    cells = [(length, depth) for length in grid.lengths for depth in grid.depths]
    found = kept_answers.rehearse(
        [length for length, _ in cells], lambda index: _found(answer, tokenizer, text, *cells[index]),
        {**settings, "lengths": grid.lengths, "depths": grid.depths}, device, "cells",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "niah.png"
        plot_needles([[0.0] * len(grid.lengths) for _ in grid.depths], grid.lengths, grid.depths, path)
        disk = found.disk_bytes + path.stat().st_size
    return replace(found, memory_bytes=peak_bytes(device), disk_bytes=disk, seconds=seconds + found.seconds)


def _found(
    answer: Callable[[Tensor, int], Tensor], tokenizer: Any, text: list[int], length: int, depth: float
) -> str:  # fmt: skip
    """What is answered in a cell."""
    ids = needle_prompt(tokenizer, text, length, depth)
    return str(tokenizer.decode(answer(ids, NEW_TOKENS), skip_special_tokens=True))


def needle_prompt(tokenizer: Any, text: list[int], length: int, depth: float) -> Tensor:
    """Prompt ids [1, tokens]: the needle after the end of a sentence, at about this depth."""
    needle = tokenizer.encode(NEEDLE, add_special_tokens=False)
    context = text[: max(length - BUFFER - len(needle), 0)]
    place = len(context) if depth >= 1 else int(len(context) * depth)
    stops = set(tokenizer.encode(".", add_special_tokens=False))
    while 0 < place < len(context) and context[place - 1] not in stops:
        place -= 1
    context = context[:place] + needle + context[place:]
    suffix = tokenizer.encode(SUFFIX, add_special_tokens=False)
    return torch.tensor([[*tokenizer.encode(PREFIX), *context, *suffix]])


def _repeated(haystack: Iterable[str], tokenizer: Any, wanted: int) -> list[int]:
    ids = [token for text in haystack for token in tokenizer.encode(text, add_special_tokens=False)]
    if not ids:
        raise ValueError("haystack: holds no text")
    return ids * -(-wanted // len(ids))
