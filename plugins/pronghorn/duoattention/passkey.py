"""Synthetic retrieval: passkeys hidden in a long text, and questions for them at its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

WORDS = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima",
    "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray",
    "yankee", "zulu",
)  # fmt: skip
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth",
)  # fmt: skip
# As the authors' code has them, typo included: gates were published that were trained on these very strings.
PREFIX = "<|im_start|> This is a very long story book: <book> "
NEEDLE = "Remeber this sequence of words, it's the {} passkey to the vault: "
SUFFIX = " </book>.\n\n"
QUESTION = "Based on the content of the book, what is the {} passkey to the vault?\nPasskey: "
SEPARATOR = "\n\n"
MULTIPLE = 16  # of a sample's length
IGNORED = -100


class MultiPasskeyDataset(Dataset[dict[str, Tensor]]):
    """Samples for `find_heads`: text with passkeys in it, then every question with its answer, which are the labels.

    Passkeys and depths are drawn from torch's global generator whenever a sample is read.

    Args:
        tokenizer: a tokenizer of transformers.
        haystack: texts, of which as many are used as are needed.
        context_length_min: tokens of the shortest text.
        context_length_max: tokens that the longest sample stays below.
        context_lengths_num_intervals: samples, of lengths between these two.
        depth_ratio_num_intervals: depths to choose from.
        min_depth_ratio: earliest place of a passkey, as a share of the text.
        max_depth_ratio: latest.
        num_passkeys: passkeys in a sample, at most 20.
        passkey_length: words of each.
        buffer_size: tokens that the longest sample leaves free.

    Raises:
        ValueError: a number makes no sense, or there is too little text.

    Source: DuoAttention (arXiv 2410.10819), section 2.2; strings and order of draws are those of the authors' code.
    """

    def __init__(
        self,
        tokenizer: Any,
        haystack: Iterable[str],
        *,
        context_length_min: int = 1000,
        context_length_max: int = 32000,
        context_lengths_num_intervals: int = 50,
        depth_ratio_num_intervals: int = 1000,
        min_depth_ratio: float = 0.05,
        max_depth_ratio: float = 0.95,
        num_passkeys: int = 10,
        passkey_length: int = 32,
        buffer_size: int = 300,
    ) -> None:
        if not 1 <= num_passkeys <= min(len(ORDINALS), depth_ratio_num_intervals):
            raise ValueError(
                f"num_passkeys: got {num_passkeys}, wanted 1 to {min(len(ORDINALS), depth_ratio_num_intervals)} "
                "(there is an ordinal and a depth for each)"
            )
        if not 1 <= context_length_min <= context_length_max:
            raise ValueError(
                f"context_length_min: got {context_length_min}, wanted 1 to context_length_max, {context_length_max}"
            )
        if not 0 <= min_depth_ratio <= max_depth_ratio <= 1:
            raise ValueError(
                f"min_depth_ratio, max_depth_ratio: got {min_depth_ratio} and {max_depth_ratio}, wanted 0 to 1 in order"
            )
        for name, value in (
            ("passkey_length", passkey_length), ("context_lengths_num_intervals", context_lengths_num_intervals),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name}: got {value}, wanted a positive number")
        self._tokenizer = tokenizer
        self.num_passkeys, self.passkey_length = num_passkeys, passkey_length
        self.lengths = [
            int(n) for n in torch.linspace(context_length_min, context_length_max, context_lengths_num_intervals)
        ]
        self.depths = torch.linspace(min_depth_ratio, max_depth_ratio, depth_ratio_num_intervals)
        self._prefix = list(tokenizer.encode(PREFIX))
        self._suffix, self._separator = self._encoded(SUFFIX), self._encoded(SEPARATOR)
        self._needles = [self._encoded(NEEDLE.format(ordinal)) for ordinal in ORDINALS[:num_passkeys]]
        self._questions = [self._encoded(QUESTION.format(ordinal)) for ordinal in ORDINALS[:num_passkeys]]
        tokens = _read(haystack, self._encoded, context_length_max)
        self.haystack = self._fitting(tokens, context_length_max - buffer_size)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` and `labels` [tokens], -100 where nothing is asked."""
        text = self.haystack[: self.lengths[index]]
        order = torch.randperm(len(self.depths))[: self.num_passkeys]
        places = [int(len(text) * float(depth)) for depth in self.depths[order].sort().values]
        passkeys = [self._passkey() for _ in places]
        body, at = [*self._prefix], 0
        for place, needle, passkey in zip(places, self._needles, passkeys, strict=True):
            body += text[at:place] + self._separator + needle + passkey + self._separator
            at = place
        body += text[at:]
        tail = [
            token
            for question, passkey in zip(self._questions, passkeys, strict=True)
            for token in (*question, *passkey, *self._separator)
        ]
        # A sample that is a multiple already gets as many tokens more: so did those that the gates were trained on.
        missing = MULTIPLE - (len(body) + len(self._suffix) + len(tail)) % MULTIPLE
        body += self.haystack[-missing:] + self._suffix
        ids = torch.tensor(body + tail)
        labels = ids.clone()
        labels[: len(body)] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _passkey(self) -> list[int]:
        drawn = torch.randint(0, len(WORDS), (self.passkey_length,))
        return self._encoded(" ".join(WORDS[word] for word in drawn.tolist()))

    def _fitting(self, haystack: list[int], limit: int) -> list[int]:
        """The text without what would make the longest sample too long.

        Counted as in the authors' code, with the first needle, the first question and one drawn passkey for all.
        """
        of_one = len(self._needles[0]) + len(self._questions[0]) + 2 * (len(self._passkey()) + len(self._separator))
        needed = len(self._prefix) + len(self._suffix) + self.num_passkeys * of_one
        if needed >= limit:
            raise ValueError(
                f"context_length_max: passkeys and questions take {needed} tokens, there are {limit} with buffer_size "
                "taken off; allow more, or take fewer or shorter passkeys"
            )
        return haystack[: limit - needed]


def pad_collate(samples: Sequence[dict[str, Tensor]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Samples as one batch [samples, tokens], filled up on the right; what fills up has no label."""
    return {
        name: torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], True, filler)
        for name, filler in (("input_ids", pad_token_id), ("labels", IGNORED))
    }


def replay_items(golden: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Names, ours and theirs, of a data set that the authors' code made with a tokenizer of single bytes."""
    options = (
        "num_passkeys", "passkey_length", "context_length_min", "context_length_max", "context_lengths_num_intervals",
        "depth_ratio_num_intervals", "min_depth_ratio", "max_depth_ratio", "buffer_size",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(golden["seed"])
        data = MultiPasskeyDataset(
            _Bytes(), golden["haystack_texts"], **{name: golden[name] for name in options if name in golden}
        )
        if "haystack_tokens_len" in golden:
            yield "haystack", len(data.haystack), golden["haystack_tokens_len"]
        if "context_length_intervals" in golden:
            yield "lengths", data.lengths, golden["context_length_intervals"]
        for item in golden["items"]:
            sample = data[item["index"]]
            start, labels = item["labels_start"], sample["labels"]
            yield f"item {item['index']}: ids", sample["input_ids"].tolist(), item["input_ids"]
            yield f"item {item['index']}: no labels", labels[:start].tolist(), [IGNORED] * start
            yield f"item {item['index']}: labels", labels[start:].tolist(), item["input_ids"][start:]


class _Bytes:
    """Ids are bytes; 256 begins a text."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [256] * add_special_tokens + list(text.encode())


def _read(texts: Iterable[str], encode: Any, wanted: int) -> list[int]:
    found: list[int] = []
    for text in texts:
        found += encode(text)
        if len(found) >= wanted:
            return found[:wanted]
    raise ValueError(
        f"haystack: holds {len(found)} tokens, wanted {wanted}; give more text or a smaller context_length_max"
    )
