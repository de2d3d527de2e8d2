"""How long the first token takes and how fast the next ones come, by length of context and of history."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from pronghorn.estimate import Estimate, now, peak_bytes, times_tried

QUESTION_TOKENS = 32
WARM_UP = 2  # rounds; a static cache's memory and CUDA graphs are there from the second on


@dataclass(frozen=True)
class ContextSpeed:
    """One context length.

    Attributes:
        context: tokens of the prompt.
        first_token_seconds: from the call of `generate` to the first token, of each repeat.
        tokens_per_second: of the tokens after the first, of each repeat.
    """

    context: int
    first_token_seconds: list[float]
    tokens_per_second: list[float]


@dataclass(frozen=True)
class FollowUpSpeed:
    """A question of `QUESTION_TOKENS` tokens after a history.

    Attributes:
        history: tokens before the question.
        kept_seconds: to the first token with the history in the cache, of each repeat.
        recomputed_seconds: to the first token without.
    """

    history: int
    kept_seconds: list[float]
    recomputed_seconds: list[float]


def context_speeds(
    model: PreTrainedModel, contexts: list[int], *, new_tokens: int = 256, repeats: int = 10
) -> Iterator[ContextSpeed]:
    """Prefill and decoding speed at batch 1, as `generate` has them, once it is warm.

    Args:
        model: the language model.
        contexts: lengths of random prompts.
        new_tokens: generated for the decoding speed, at least 2.
        repeats: of each measurement.

    Raises:
        ValueError: a length that is not positive, or beyond what the model was made for.

    Source: TinyChat's benchmark (llm-awq), which has the same lengths and numbers of repeats.
    """
    _check(model, [length + new_tokens for length in contexts], at_least={"new_tokens": (new_tokens, 2)})
    for context in contexts:
        ids = _random_ids(model, context)
        firsts, wholes = [], []
        for _ in range(WARM_UP + repeats):
            firsts.append(_seconds(model, ids, 1))
            wholes.append(_seconds(model, ids, new_tokens))
        firsts, first = firsts[WARM_UP:], mean(firsts[WARM_UP:])
        yield ContextSpeed(context, firsts, [(new_tokens - 1) / (whole - first) for whole in wholes[WARM_UP:]])


def follow_up_speeds(model: PreTrainedModel, histories: list[int], *, repeats: int = 10) -> Iterator[FollowUpSpeed]:
    """Time to the first token of a question after a history, with and without the history's keys and values.

    Raises:
        ValueError: a length that is not positive, or beyond what the model was made for.
    """
    lengths = [length + QUESTION_TOKENS + 1 for length in histories]
    _check(model, lengths)
    for history in histories:
        ids = _random_ids(model, history + QUESTION_TOKENS)
        cache = _chat_cache(model, max(lengths))
        with torch.no_grad():
            model(ids[:, :history], past_key_values=cache, logits_to_keep=1)
        kept, recomputed = [], []
        for _ in range(WARM_UP + repeats):
            kept.append(_seconds(model, ids, 1, past_key_values=cache))
            _rewind(cache, QUESTION_TOKENS)
            recomputed.append(_seconds(model, ids, 1, past_key_values=DynamicCache(config=model.config)))
        yield FollowUpSpeed(history, kept[WARM_UP:], recomputed[WARM_UP:])


def rehearse(
    model: PreTrainedModel, contexts: list[int], histories: list[int], *, new_tokens: int, repeats: int
) -> Estimate:
    """What all of `context_speeds` and `follow_up_speeds` take, from one repeat of each, warm as the others are."""
    for _ in range(times_tried(model.device)):
        torch.compiler.reset()  # a run compiles too, from what lies on the disk
        started = now(model.device)
        speeds = list(context_speeds(model, contexts, new_tokens=new_tokens, repeats=1))
        turns = list(follow_up_speeds(model, histories, repeats=1))
        seconds = now(model.device) - started
    for speed in speeds:
        whole = speed.first_token_seconds[0] + (new_tokens - 1) / speed.tokens_per_second[0]
        seconds += (repeats - 1) * (speed.first_token_seconds[0] + whole)
    seconds += (repeats - 1) * sum(turn.kept_seconds[0] + turn.recomputed_seconds[0] for turn in turns)
    return Estimate(peak_bytes(model.device), 0, seconds, f"one of {repeats} repeats")


def _chat_cache(model: PreTrainedModel, capacity: int) -> Any:
    """A static cache where `generate` would use one, as a chat with a capacity has it."""
    if model.generation_config.cache_implementation == "static":
        return StaticCache(config=model.config, max_cache_len=capacity)
    return DynamicCache(config=model.config)


def _rewind(cache: Any, tokens: int) -> None:
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            layer.cumulative_length -= tokens  # what lies behind is masked, and written over
    else:
        cache.crop(-tokens)


def _check(model: PreTrainedModel, lengths: list[int], at_least: dict[str, tuple[int, int]] | None = None) -> None:
    for name, (value, least) in (at_least or {}).items():
        if value < least:
            raise ValueError(f"{name}: got {value}, wanted at least {least}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for length in lengths:
        if length < 1 or (limit is not None and length > limit):
            raise ValueError(f"lengths: {length} tokens in all; this model takes 1 to {limit}")


def _random_ids(model: PreTrainedModel, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    return torch.randint(0, size, (1, length), generator=generator).to(model.device)


def _seconds(model: PreTrainedModel, ids: Tensor, new_tokens: int, **cache: Any) -> float:
    """Wall time of one call of `generate`; with a cache given, that one is used and none is made."""
    generate: Any = model.generate
    # Given as one object, as a server would: for loose arguments `generate` builds a default model configuration first.
    how = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    start = now(model.device)
    generate(ids, attention_mask=torch.ones_like(ids), generation_config=how, **cache)
    return now(model.device) - start
