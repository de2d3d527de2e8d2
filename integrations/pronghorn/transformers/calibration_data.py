"""Calibration text and token ids: checked before any work starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

HELD_OUT = 5  # every fifth topic of the built-in text is for evaluation


def builtin_text(part: Literal["calibration", "evaluation"] = "calibration") -> str:
    """English prose and code that comes with every Python: the language reference's topics (`pydoc_data`).

    The same text on every machine with the same Python; the two parts have no topic in common.
    """
    from pydoc_data.topics import topics

    wanted = part == "evaluation"
    chosen = [topics[name] for index, name in enumerate(sorted(topics)) if (index % HELD_OUT == 0) is wanted]
    return "\n\n".join(chosen)


def calibration_samples(
    data: str | Iterable[Any] | Callable[[], Iterable[Any]],
    tokenizer: Any = None,
    *,
    n_samples: int = 128,
    seq_len: int = 512,
    vocab_size: int | None = None,
) -> list[Tensor]:
    """Token ids for a calibration run.

    Args:
        data: "builtin", texts, token ids (lists of int, or int tensors [tokens] or [batch, tokens]), or a callable
            that returns either.
        tokenizer: needed for text. Texts are joined in order and cut into pieces of `seq_len` tokens; a shorter rest
            is used only where there is nothing else. Token ids are used as they are given.
        n_samples: at most so many sequences.
        seq_len: tokens a sequence, of text.
        vocab_size: of the model, to check ids against.

    Returns:
        int64 tensors [batch, tokens].

    Raises:
        ValueError, TypeError: no data, no tokenizer for text, neither text nor ids, ids not in the vocabulary.
    """
    for name, count in (("n_samples", n_samples), ("seq_len", seq_len)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, wanted at least 1")
    if isinstance(data, str):
        if data != "builtin":
            raise ValueError(f"calibration: got the string {data[:40]!r}, wanted 'builtin' or a list of texts")
        data = [builtin_text()]
    entries = _read(data() if callable(data) else data)
    first = next(entries, None)
    if first is None:
        raise ValueError("calibration: empty, at least one text or sequence of token ids is needed")
    entries = itertools.chain([first], entries)
    if isinstance(first, str):
        samples = _tokenize(entries, tokenizer, n_samples, seq_len)
    else:
        samples = [_as_ids(index, entry) for index, entry in enumerate(itertools.islice(entries, n_samples))]
    if vocab_size is not None:
        check_token_ids(samples, vocab_size)
    return samples


def check_token_ids(samples: Sequence[Tensor], vocab_size: int) -> None:
    """Raise TypeError or ValueError unless every sample is ids [batch, tokens] below `vocab_size`."""
    if not samples:
        raise ValueError("calibration: empty, at least one text or sequence of token ids is needed")
    for index, ids in enumerate(samples):
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"calibration: sample {index} is {got}, wanted an int64 tensor of token ids")
        if ids.dim() != 2 or ids.numel() == 0:
            raise ValueError(f"calibration: sample {index} has shape {tuple(ids.shape)}, wanted [batch, tokens]")
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= vocab_size:
            raise ValueError(
                f"calibration: sample {index} has token ids from {least} to {most}, the model's vocabulary ends at "
                f"{vocab_size - 1}: is this the model's tokenizer?"
            )


def _read(data: Any) -> Iterator[Any]:
    """The entries one by one, so that an endless source is read only as far as it is needed."""
    if isinstance(data, Tensor):
        yield data
        return
    if not isinstance(data, Iterable):
        raise TypeError(f"calibration: got {type(data).__name__}, wanted texts, token ids, a callable or 'builtin'")
    iterator = iter(data)
    for index in itertools.count():
        try:
            entry = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"calibration: reading sample {index} failed: {error}") from error
        yield entry


def _tokenize(texts: Iterable[Any], tokenizer: Any, n_samples: int, seq_len: int) -> list[Tensor]:
    if tokenizer is None:
        raise ValueError("calibration: texts need the model's tokenizer, which is not there; give token ids instead")
    ids: list[int] = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"calibration: sample {index} is {type(text).__name__}, wanted text as in sample 0")
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= n_samples * seq_len:
            break
    if not ids:
        raise ValueError("calibration: the texts have no tokens")
    pieces = torch.tensor(ids, dtype=torch.long).split(seq_len)
    whole = [piece[None] for piece in pieces if len(piece) == seq_len]
    return (whole or [pieces[0][None]])[:n_samples]


def _as_ids(index: int, entry: Any) -> Tensor:
    if isinstance(entry, dict) and "input_ids" in entry:
        entry = entry["input_ids"]
    try:
        ids = torch.as_tensor(entry)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"calibration: sample {index} is {type(entry).__name__}, wanted text or token ids") from error
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise TypeError(f"calibration: sample {index} is {ids.dtype} {tuple(ids.shape)}, wanted ids [tokens]")
    if ids.numel() == 0:
        raise ValueError(f"calibration: sample {index} is empty")
    return ids.long().view(-1, ids.shape[-1])
