"""Multi-turn chat whose history stays in the key/value cache, so that a follow-up prefills its new tokens only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StaticCache, TextStreamer
from transformers.cache_utils import StaticLayer

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}


@dataclass(frozen=True)
class Turn:
    """One answer and what it cost.

    Attributes:
        text: the answer.
        prompt_tokens: tokens of the whole conversation up to the answer.
        reused_tokens: how many of them were in the cache already.
        new_tokens: tokens of the answer.
        first_token_seconds: time to the first token.
        tokens_per_second: decoding speed after the first token.
    """

    text: str
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float


class Chat:
    """A conversation with a causal language model that has a chat template.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        system: system prompt, if any.
        max_new_tokens: the longest answer.
        capacity: tokens that a static cache holds; on a GPU transformers then compiles the decoding step and replays
            it as a CUDA graph. Without it the cache grows as it must.
        generation: arguments of `generate`; the defaults are TinyChat's sampling.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        capacity: int | None = None,
        **generation: Any,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"tokenizer: {tokenizer.name_or_path!r} has no chat template; chat needs an instruct model"
            )
        self.model = model
        self.tokenizer = tokenizer
        how = generation or SAMPLING
        # One object: for loose arguments `generate` builds a default model configuration at every call.
        self.generation = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **how)
        self.messages = [{"role": "system", "content": system}] if system else []
        self.capacity = capacity
        self._forget()

    def _forget(self) -> None:
        config = self.model.config
        self._cache: Any = (
            StaticCache(config=config, max_cache_len=self.capacity) if self.capacity else DynamicCache(config=config)
        )
        self._cached = torch.empty(0, dtype=torch.long)

    def ask(self, message: str, on_text: Callable[[str], None] = lambda text: None) -> Turn:
        """Send a message; `on_text` receives the answer piece by piece.

        Raises:
            ValueError: the message is empty, or the conversation does not fit the static cache any more.
        """
        if not message.strip():
            raise ValueError("message: empty")
        messages = [*self.messages, {"role": "user", "content": message}]
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        longest = prompt.shape[1] + self.generation.max_new_tokens
        if self.capacity and longest > self.capacity:
            raise ValueError(
                f"message: with its answer the conversation may take {longest} tokens, capacity is {self.capacity}"
            )
        reused = self._rewind(prompt[0])
        streamer = _Streamer(self.tokenizer, on_text)
        start = time.perf_counter()
        output = self.model.generate(
            prompt.to(self.model.device),
            attention_mask=torch.ones_like(prompt).to(self.model.device),
            past_key_values=self._cache,
            streamer=streamer,
            generation_config=self.generation,
        )[0].cpu()
        end = time.perf_counter()
        answer = output[prompt.shape[1] :]
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        self._cached = output[: int(self._cache.get_seq_length())]
        self.messages = [*messages, {"role": "assistant", "content": text}]
        first = streamer.first_token - start
        speed = (len(answer) - 1) / (end - streamer.first_token) if len(answer) > 1 else 0.0
        return Turn(text, prompt.shape[1], reused, len(answer), first, speed)

    def _rewind(self, prompt: torch.Tensor) -> int:
        """Keep the cached prefix that the new prompt shares: a template may rewrite a past answer."""
        # The last token is always run again: its logits start the answer.
        limit = min(len(self._cached), len(prompt) - 1)
        differs = (self._cached[:limit] != prompt[:limit]).nonzero()
        kept = int(differs[0]) if len(differs) else limit
        # Not counted from the known tokens: a turn that was interrupted left more behind.
        surplus = int(self._cache.get_seq_length()) - kept
        if surplus and not self._drop(surplus):
            self._forget()
            return 0
        return kept

    def _drop(self, surplus: int) -> bool:
        """Take the last tokens out of the cache; False where it cannot, as beyond a sliding window."""
        if not self.capacity:
            try:
                self._cache.crop(-surplus)
            except RuntimeError:
                return False
            return True
        if any(type(layer) is not StaticLayer for layer in self._cache.layers):
            return False
        for layer in self._cache.layers:
            layer.cumulative_length -= surplus  # what lies behind is masked, and written over
        return True


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.first_token = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt and then with each token."""
        if not self.next_tokens_are_prompt and not self.first_token:
            self.first_token = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass printable text on."""
        self.on_text(text)
