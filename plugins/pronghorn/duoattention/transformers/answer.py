"""Greedy answers to long prompts, as the evaluations ask for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from pronghorn.duoattention.transformers import DuoAttention


class Answer:
    """Reads a prompt in chunks and continues it greedily.

    Args:
        model: a causal language model of transformers.
        duo: what `apply_duo` returned; None for the model as it is.
        prefill_chunk_size: tokens read at once (paper: 32000).
        stop: token ids that end an answer; the model's end of sequence by default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        duo: DuoAttention | None = None,
        *,
        prefill_chunk_size: int = 32000,
        stop: list[int] | None = None,
    ) -> None:
        if prefill_chunk_size < 1:
            raise ValueError(f"prefill_chunk_size: got {prefill_chunk_size}, wanted a positive number of tokens")
        self.model, self.prefill_chunk_size = model, prefill_chunk_size
        self._new_cache: Callable[[], Cache] = DynamicCache if duo is None else duo.make_cache
        ends: Any = model.generation_config.eos_token_id if stop is None else stop
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    @torch.no_grad()
    def __call__(self, prompt_ids: Tensor, max_new_tokens: int, decoding_simulation_length: int = 0) -> Tensor:
        """New token ids [tokens].

        Args:
            prompt_ids: [1, tokens].
            max_new_tokens: most of them.
            decoding_simulation_length: last tokens of the prompt that are read one by one, as if they were decoded.
        """
        cache = self._new_cache()
        whole = max(prompt_ids.shape[1] - decoding_simulation_length, 1)
        logits = None
        for tokens in (*prompt_ids[:, :whole].split(self.prefill_chunk_size, 1), *prompt_ids[:, whole:].split(1, 1)):
            if tokens.shape[1]:
                logits = self._last(tokens, cache)
        found: list[int] = []
        while len(found) < max_new_tokens and logits is not None:
            token = int(logits.argmax())
            if token in self._ends:
                break
            found.append(token)
            logits = self._last(torch.tensor([[token]]), cache) if len(found) < max_new_tokens else None
        return torch.tensor(found, dtype=torch.long)

    def _last(self, tokens: Tensor, cache: Cache) -> Tensor:
        output: Any = self.model(tokens.to(self.model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1]
        return logits
