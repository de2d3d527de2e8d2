"""Times and memory of prompts and decoding, with DuoAttention and without."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.transformers.graphs import OPTIONS, GraphedForward


@dataclass(frozen=True)
class Speed:
    """One length of context.

    Attributes:
        context: tokens of the prompt.
        prefill_seconds: until it is read.
        decode_seconds: of one token after it, the median.
        cache_bytes: keys and values after it.
    """

    context: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int


@torch.no_grad()
def measure(
    model: Any,
    make_cache: Callable[[int], Any],
    context: int,
    *,
    prefill_chunk_size: int = 32000,
    decode_steps: int = 20,
    graphs: bool = False,
    seed: int = 0,
) -> Speed:
    """Read a random prompt, then decode.

    Args:
        model: a causal language model of transformers.
        make_cache: makes an empty cache with room for so many tokens.
        context: tokens of the prompt.
        prefill_chunk_size: tokens read at once.
        decode_steps: tokens to decode.
        graphs: decode with CUDA graphs, for which the cache must be a static one.
        seed: of the prompt.

    Raises:
        ValueError: a number is not positive.
    """
    numbers = {"context": context, "prefill_chunk_size": prefill_chunk_size, "decode_steps": decode_steps}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, wanted a positive number")
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, context), generator=torch.Generator().manual_seed(seed)).to(model.device)
    cache = make_cache(context + decode_steps)
    start = _now(model)
    for place, tokens in zip(range(0, context, prefill_chunk_size), ids.split(prefill_chunk_size, dim=1), strict=True):
        token = _next(model, tokens, cache, place)
    read = _now(model) - start
    size = cache_bytes(cache)
    times = []
    with GraphedForward(model) if graphs else nullcontext():
        for step in range(decode_steps):
            start = _now(model)
            token = _next(model, token, cache, context + step)
            times.append(_now(model) - start)
    return Speed(context, read, sorted(times)[len(times) // 2], size)


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values in a cache of transformers."""
    total = 0
    for layer in cache.layers:
        own = getattr(layer, "nbytes", None)
        total += own if own is not None else layer.keys.nbytes + layer.values.nbytes
    return total


def _next(model: Any, tokens: Tensor, cache: Any, place: int) -> Tensor:
    positions = torch.arange(place, place + tokens.shape[1], device=tokens.device)[None]
    output = model(input_ids=tokens, position_ids=positions, past_key_values=cache, **OPTIONS)
    return output.logits[:, -1:].argmax(-1)


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
