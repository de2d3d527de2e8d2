"""Perplexity of a causal language model on a text."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pronghorn.estimate import Estimate, of_pieces


@dataclass(frozen=True)
class Evaluation:
    """What `perplexity` measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per predicted token.
        bits_per_byte: the same likelihood per byte of text; comparable between tokenizers, which perplexity is not.
        tokens: number of predicted tokens.
        seconds: wall-clock time.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    seconds: float


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    window: int = 512,
    max_windows: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Perplexity over consecutive, non-overlapping windows of `text`, as AWQ and GPTQ report it.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        text: the evaluation text.
        window: tokens a window.
        max_windows: stop after so many windows.
        progress: show a bar.

    Raises:
        ValueError: the text is shorter than two tokens.
    """
    windows = _windows(tokenizer, text, window, max_windows)
    start = time.perf_counter()
    loss, count = 0.0, 0
    for part in tqdm(windows, desc="perplexity", disable=not progress, unit="window"):
        loss += _loss(model, part)
        count += len(part) - 1
    seconds = time.perf_counter() - start
    read = tokenizer.decode(torch.cat(windows), skip_special_tokens=True)
    bits = loss / math.log(2) / len(read.encode())
    return Evaluation(math.exp(loss / count), bits, count, seconds)


@torch.no_grad()
def perplexity_estimate(
    model: nn.Module, tokenizer: Any, text: str, *, window: int = 512, max_windows: int | None = None
) -> Estimate:
    """What `perplexity` takes, from a few windows; arguments and errors as there."""
    started = time.perf_counter()
    windows = _windows(tokenizer, text, window, max_windows)
    tokenizer.decode(torch.cat(windows), skip_special_tokens=True)
    of_text = time.perf_counter() - started

    def work(index: int) -> int:
        _loss(model, windows[index])
        return 0

    found = of_pieces([len(part) for part in windows], work, next(model.parameters()).device, "windows")
    return replace(found, seconds=of_text + found.seconds)


def _windows(tokenizer: Any, text: str, window: int, most: int | None) -> list[Tensor]:
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = [part for part in ids.split(window) if len(part) > 1][:most]
    if not windows:
        raise ValueError(f"text: {len(ids)} tokens are too few for a perplexity, at least 2 are needed")
    return windows


def _loss(model: nn.Module, ids: Tensor) -> float:
    """Negative log-likelihood of a window's tokens after the first, summed."""
    tokens = ids[None].to(next(model.parameters()).device)
    logits = model(tokens, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
