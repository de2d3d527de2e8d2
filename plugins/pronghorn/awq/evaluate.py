"""Perplexity of a causal language model on a text."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm


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
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = [part for part in ids.split(window) if len(part) > 1][:max_windows]
    if not windows:
        raise ValueError(f"text: {len(ids)} tokens are too few for a perplexity, at least 2 are needed")
    device = next(model.parameters()).device
    start = time.perf_counter()
    loss, count = 0.0, 0
    for part in tqdm(windows, desc="perplexity", disable=not progress, unit="window"):
        tokens = part[None].to(device)
        logits = model(tokens, use_cache=False).logits[0, :-1].float()
        loss += F.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        count += len(part) - 1
    seconds = time.perf_counter() - start
    read = tokenizer.decode(torch.cat(windows), skip_special_tokens=True)
    bits = loss / math.log(2) / len(read.encode())
    return Evaluation(math.exp(loss / count), bits, count, seconds)
