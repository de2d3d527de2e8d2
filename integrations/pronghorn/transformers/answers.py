"""What a language model answers, kept to be compared with another one's when it is no longer in memory."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pronghorn.transformers.calibration_data import builtin_text, calibration_samples
from pronghorn.transformers.decoder import find_decoder_blocks

WINDOW = 256  # tokens
MAX_TOKENS = 1024
MAX_BYTES = 256 << 20  # of log-probabilities
PROMPT, NEW_TOKENS = 32, 32
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class NotFiniteError(ValueError):
    """A logit is NaN or Inf."""


@dataclass(frozen=True)
class Answers:
    """A model's answers to a text.

    Attributes:
        ids: int64 [1, tokens] a window.
        log_probs: float32 [tokens, vocabulary] of each, on the CPU.
        layers: each decoder layer's output [1, tokens, hidden] for the first window, by the layer's name.
        generated: token ids that greedy decoding adds to the first `PROMPT` tokens.
        seconds: that all of it took.
    """

    ids: list[Tensor]
    log_probs: list[Tensor]
    layers: dict[str, Tensor]
    generated: list[int]
    seconds: float


@dataclass(frozen=True)
class Agreement:
    """How far a model's answers are from those of its source.

    Attributes:
        top1: share of tokens after which both have the same likeliest one.
        kl: mean Kullback-Leibler divergence of the model from its source, in nats a token.
        tokens: that were compared.
        layers: |model - source| / |source| of each decoder layer's output.
    """

    top1: float
    kl: float
    tokens: int
    layers: dict[str, float]


def windows(
    tokenizer: Any,
    vocab_size: int,
    *,
    longest: int | None = None,
    length: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> list[Tensor]:
    """Token ids to ask models with: text that calibration does not see, or random ids where there is no tokenizer.

    Args:
        tokenizer: of the models, or None.
        vocab_size: of the models.
        longest: positions that they have, if that is limited.
        length: tokens of one, `WINDOW` by default; fewer where the models or `max_tokens` do not allow it.
        max_tokens: most tokens in all.

    Returns:
        int64 [1, tokens] each.
    """
    tokens = max(2, min(max_tokens, MAX_BYTES // (4 * vocab_size)))
    length = max(2, min(tokens, length or WINDOW, longest or tokens))
    if tokenizer is None:
        return [torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(0))]
    text = [builtin_text("evaluation")]
    return calibration_samples(text, tokenizer, n_samples=tokens // length, seq_len=length, vocab_size=vocab_size)


@torch.no_grad()
def observe(
    model: Any, ids: list[Tensor], *, make_cache: Callable[[], Any] | None = None, chunk: int | None = None
) -> Answers:
    """Read the windows and continue the first one.

    Args:
        model: a causal language model of transformers, or an encoder-decoder, both of which read the text.
        ids: int64 [1, tokens] each.
        make_cache: of a method that changes the cache: it is read through one.
        chunk: tokens that are read at once into that cache.

    Raises:
        NotFiniteError: a logit is NaN or Inf.
        ValueError: a continuation is not of the vocabulary.
    """
    start = time.perf_counter()
    found: list[Tensor] = []
    layers: dict[str, Tensor] = {}
    for index, part in enumerate(ids):
        with _recorded(model, layers) if index == 0 else contextlib.nullcontext():
            logits = _read(model, part.to(model.device), make_cache, chunk)
        if not bool(logits.isfinite().all()):
            raise NotFiniteError(f"{type(model).__name__}: the logits of window {index} hold NaN or Inf")
        found.append(F.log_softmax(logits, -1).cpu())
    prompt = ids[0][:, : min(PROMPT, ids[0].shape[1])].to(model.device)
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False,
        pad_token_id=model.generation_config.pad_token_id or 0,
        **({} if make_cache is None else {"past_key_values": make_cache()}),
    )  # fmt: skip
    # An encoder-decoder says what it adds alone, after the token that its decoder starts with.
    new = made[0, 1 if model.config.is_encoder_decoder else prompt.shape[1] :].tolist()
    if not new or not all(0 <= token < found[0].shape[1] for token in new):
        raise ValueError(f"{type(model).__name__}: generated {new[:8]}, wanted ids below {found[0].shape[1]}")
    return Answers(ids, found, layers, new, time.perf_counter() - start)


def agreement(source: Answers, model: Answers) -> Agreement:
    """Compare two models' answers to the same windows.

    Raises:
        ValueError: the windows or the vocabularies differ.
    """
    same = len(source.ids) == len(model.ids) and all(map(torch.equal, source.ids, model.ids))
    if not same or source.log_probs[0].shape != model.log_probs[0].shape:
        shapes = [tuple(answers.log_probs[0].shape) for answers in (source, model)]
        raise ValueError(
            f"source: its log-probabilities are {shapes[0]}, the model's {shapes[1]}; wanted the same text"
        )
    equal, divergence, tokens = 0, 0.0, 0
    for theirs, ours in zip(source.log_probs, model.log_probs, strict=True):
        equal += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        divergence += float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
        tokens += len(theirs)
    layers = {
        name: float((model.layers[name].float() - output.float()).norm() / output.float().norm().clamp_min(1e-30))
        for name, output in source.layers.items()
        if name in model.layers
    }
    return Agreement(equal / tokens, max(0.0, divergence / tokens), tokens, layers)


def positions_of(text_config: Mapping[str, Any]) -> int | None:
    """Positions that a language model has, None where its configuration does not say."""
    return next((int(text_config[name]) for name in POSITIONS if text_config.get(name)), None)


def digest(ids: list[Tensor]) -> str:
    """SHA-256 of token ids, to tell whether two reports read the same text."""
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in ids)).hexdigest()


def _read(model: Any, ids: Tensor, make_cache: Callable[[], Any] | None, chunk: int | None) -> Tensor:
    """Logits float32 [tokens, vocabulary] of ids [1, tokens]."""
    if make_cache is None:
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        whole: Tensor = model(input_ids=ids, **decoder, use_cache=False).logits[0].float()
        return whole
    cache = make_cache()
    parts = ids.split(chunk or ids.shape[1], 1)
    return torch.cat([model(input_ids=p, past_key_values=cache, use_cache=True).logits[0].float() for p in parts])


@contextlib.contextmanager
def _recorded(model: Any, into: dict[str, Tensor]) -> Iterator[None]:
    """Keep the outputs of the decoder's layers, where the model has such."""
    try:
        blocks = find_decoder_blocks(model)
    except ValueError:  # another architecture: its logits are compared all the same
        blocks = []

    def keep(name: str, output: Any) -> None:
        part = (output[0] if isinstance(output, tuple) else output).detach().cpu()
        into[name] = torch.cat([into[name], part], 1) if name in into else part

    hooks = [
        block.module.register_forward_hook(lambda _m, _a, output, name=block.name: keep(name, output))
        for block in blocks
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
