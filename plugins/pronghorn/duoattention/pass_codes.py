"""A small test of retrieval: a pass code in the middle of sentences that say nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WORDS = (
    "the", "old", "oak", "near", "a", "quiet", "river", "while", "seven", "lazy", "foxes", "watch", "brown", "dogs",
    "run", "over", "green", "hills", "and", "wise", "owls", "sleep", "under", "tall", "trees",
)  # fmt: skip


@dataclass(frozen=True)
class PassCode:
    """A prompt that asks for a pass code.

    Attributes:
        prompt: the text, which ends just before the code is to be said again.
        code: four digits.
    """

    prompt: str
    code: str


def pass_codes(count: int, *, before: int = 6, after: int = 60, seed: int = 0) -> list[PassCode]:
    """Prompts with a code each.

    Args:
        count: how many.
        before: sentences before the code.
        after: sentences after it.
        seed: of words and codes.
    """
    draw = random.Random(seed)  # noqa: S311 - words, not secrets

    def sentences(number: int) -> str:
        return "".join(
            " ".join(draw.choice(WORDS) for _ in range(draw.randint(7, 10))).capitalize() + ". " for _ in range(number)
        )

    found = []
    for _ in range(count):
        code = str(draw.randint(1000, 9999))
        text = f"{sentences(before)}The pass code is {code}. Remember it. {sentences(after)}"
        found.append(PassCode(f"{text}\n\nThe pass code is", code))
    return found


def retrieved(answer: Callable[[Tensor, int], Tensor], tokenizer: Any, codes: list[PassCode]) -> int:
    """How many codes an answer holds.

    Args:
        answer: prompt ids [1, tokens] and a number of new tokens to their ids, such as `Answer`.
        tokenizer: of the model.
        codes: the prompts.
    """
    right = 0
    for case in codes:
        ids = torch.tensor([tokenizer.encode(case.prompt)])
        right += case.code in tokenizer.decode(answer(ids, 8))
    return right
