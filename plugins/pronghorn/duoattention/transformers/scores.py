"""Scores heads without training: how much of what a head adds to the model comes from tokens that it would not see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pronghorn.kernels.head_sparse_attention import head_sparse_attention

ATTENTION = "duo_scores"


class HeadScores:
    """Compares, while the model runs as it always does, what each head adds with what it would add if it streamed.

    Args:
        shape: layers and key/value heads.
        mask: `sink_size`, `recent_size` and `block_size` of the streaming heads.
    """

    def __init__(self, shape: tuple[int, int], mask: dict[str, Any]) -> None:
        self.mask = mask
        self.chosen = torch.zeros(0, dtype=torch.bool)  # [tokens] where something is asked
        self.difference = torch.zeros(shape, dtype=torch.float64)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, heads, tokens, head_dim], with all tokens seen."""
        dense = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        types = torch.full((query.shape[1],), -1, dtype=torch.int32, device=query.device)
        streaming = head_sparse_attention(query, key, value, types, scale=scale, **self.mask)
        missing = (dense - streaming)[0, :, self.chosen.to(query.device)].float()  # [heads, asked, head_dim]
        projection: Any = module.o_proj
        weight = projection.weight.float().unflatten(1, (query.shape[1], -1))  # [hidden, heads, head_dim]
        layer: Any = module.layer_idx
        for head, part in enumerate(missing.unflatten(0, (key.shape[1], -1)).unbind()):
            group = slice(head * part.shape[0], (head + 1) * part.shape[0])
            added = torch.einsum("gtd,hgd->th", part, weight[:, group])
            self.difference[layer, head] += float(added.square().sum())
        return dense


@torch.no_grad()
def head_scores(
    model: PreTrainedModel, samples: Iterable[dict[str, Tensor]], shape: tuple[int, int], **mask: Any
) -> list[list[float]]:
    """Scores from 0 to 1, [layers][key/value heads]: 1 for the head that changes most if it streams.

    Args:
        model: a causal language model of transformers.
        samples: `input_ids` [tokens] and `labels` [tokens], -100 where nothing is asked.
        shape: layers and key/value heads.
        **mask: `sink_size`, `recent_size` and `block_size` of streaming heads.

    Raises:
        ValueError: activations that are not finite.
    """
    AttentionInterface.register(ATTENTION, _score_attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **options: None)
    scores, before = HeadScores(shape, mask), model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    decoder: Any = model.get_decoder()
    try:
        for number, sample in enumerate(samples):
            scores.chosen = sample["labels"] != -100
            decoder(input_ids=sample["input_ids"][None].to(model.device), use_cache=False, head_scores=scores)
            if not scores.difference.isfinite().all():
                layer = int((~scores.difference.isfinite()).any(dim=1).nonzero()[0])
                raise ValueError(f"sample {number}: the attention of layer {layer} gives NaN or Inf; try bfloat16")
    finally:
        model.set_attn_implementation(before)
    return (scores.difference / scores.difference.max().clamp(min=1e-30)).sqrt().tolist()


def _score_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    head_scores: HeadScores | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if head_scores is None or options.get("sliding_window") is not None or options.get("softcap") is not None:
        raise ValueError("model: its attention cannot be scored: it has a sliding window, a soft cap, or no arguments")
    if not isinstance(getattr(module, "o_proj", None), nn.Linear):
        raise ValueError(f"model: {type(module).__name__} has no linear `o_proj`; take method='optimise'")
    return head_scores.attend(module, query, key, value, scaling).transpose(1, 2).contiguous(), None
