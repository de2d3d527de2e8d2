"""Scores of answers against references, from 0 to 1, as LongBench and the needle test count them."""

from __future__ import annotations

import difflib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence


def rouge_1(answer: str, reference: str) -> float:
    """F1 of the words that both have."""
    return _overlap(_words(answer), _words(reference))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words."""
    return _common(answer.split(), reference.split())


def rouge_l_zh(answer: str, reference: str) -> float:
    """The same of Chinese words."""
    return _common(_chinese_words(answer), _chinese_words(reference))


def qa_f1(answer: str, reference: str) -> float:
    """F1 of the words that both have, without case, punctuation and articles."""
    return _overlap(_normalized(answer), _normalized(reference))


def qa_f1_zh(answer: str, reference: str) -> float:
    """The same of Chinese words."""

    def kept(text: str) -> list[str]:
        cut = (word.lower() for word in _chinese_words(text))
        words = ("".join(c for c in word if unicodedata.category(c)[0] not in "PS") for word in cut)
        return [word for word in words if word.strip()]

    return _overlap(kept(answer), kept(reference))


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 shared by all classes that the answer names, if the right one is among them."""
    named = [name for name in classes if name in answer]
    named = [name for name in named if name == reference or name not in reference]
    return 1 / len(named) if reference in named else 0.0


def count(answer: str, reference: str) -> float:
    """Share of the answer's numbers that are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference.strip()) / len(numbers) if numbers else 0.0


def retrieval(answer: str, reference: str) -> float:
    """The same for a reference such as "Paragraph 7"."""
    return count(answer, _number_after("Paragraph ", reference))


def retrieval_zh(answer: str, reference: str) -> float:
    """The same for a reference such as "段落7"."""
    return count(answer, _number_after("段落", reference))


def code_similarity(answer: str, reference: str) -> float:
    """How alike the first line of code is."""
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(difflib.SequenceMatcher(None, code, reference).ratio(), 2)


def _number_after(word: str, reference: str) -> str:
    found = re.search(rf"{word}(\d+)", reference)
    if found is None:
        raise ValueError(f"reference: got {reference!r}, wanted {word!r} and a number")
    return found[1]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _normalized(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _chinese_words(text: str) -> list[str]:
    try:
        import jieba
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Chinese texts are cut into words by jieba: pip install jieba", name=error.name
        ) from None
    return list(jieba.cut(text, cut_all=False))


def _overlap(answer: list[str], reference: list[str]) -> float:
    return _f1(sum((Counter(answer) & Counter(reference)).values()), len(answer), len(reference))


def _common(answer: list[str], reference: list[str]) -> float:
    lengths = [0] * (len(reference) + 1)
    for word in answer:
        before = 0
        for place, other in enumerate(reference, 1):
            before, lengths[place] = (
                lengths[place],
                (before + 1 if word == other else max(lengths[place], lengths[place - 1])),
            )
    return _f1(lengths[-1], len(answer), len(reference))


def _f1(common: int, answer: int, reference: int) -> float:
    return 2 * common / (answer + reference) if common else 0.0
