"""Runs a model twice at once: a teacher that sees everything, and a student whose heads are mixed by gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pronghorn.duoattention.sequence_parallel import SequenceParallel
from pronghorn.kernels.gated_mix import gated_mix
from pronghorn.kernels.head_sparse_attention import head_sparse_attention

ATTENTION = "duo_two_streams"


class TwoStreams:
    """Teacher and student in one forward; the first half of the batch is the teacher.

    While it is open (`with`), the model's attention is exchanged and its weights need no gradients.

    Args:
        model: a causal language model of transformers.
        gates: for each layer, one for each key/value head.
        sink_size: first tokens that the student's streaming branch sees.
        recent_size: last tokens that it sees.
        block_size: granularity of its mask; None for tokens.
        dense_branch: whose attention the gates mix in: the "teacher"'s, as the authors' code does, or the "student"'s
            own over all tokens, which the paper describes.
        parallel: the ranks that share a sequence.
        gradient_checkpointing: keep only what enters each layer, and compute it twice.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: Sequence[Tensor],
        *,
        sink_size: int,
        recent_size: int,
        block_size: int | None = None,
        dense_branch: Literal["teacher", "student"] = "teacher",
        parallel: SequenceParallel | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        if dense_branch not in ("teacher", "student"):
            raise ValueError(f"dense_branch: got {dense_branch!r}, accepted are teacher, student")
        self.model, self.gates, self.dense_branch = model, gates, dense_branch
        self.parallel = parallel or SequenceParallel()
        self._mask: dict[str, Any] = {"sink_size": sink_size, "recent_size": recent_size, "block_size": block_size}
        self._checkpointing = gradient_checkpointing
        self._before: Any = None

    def __enter__(self) -> TwoStreams:
        AttentionInterface.register(ATTENTION, two_stream_attention)
        AttentionMaskInterface.register(ATTENTION, _no_mask)
        model = self.model
        trained = [parameter.requires_grad for parameter in model.parameters()]
        training = {name: module.training for name, module in model.named_modules()}
        self._before = model.config._attn_implementation, trained, training
        model.set_attn_implementation(ATTENTION)
        model.requires_grad_(False)
        model.eval()
        if self._checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():  # transformers checkpoints layers in training only
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        return self

    def __exit__(self, *error: object) -> None:
        attention, trained, training = self._before
        if self._checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.set_attn_implementation(attention)
        for parameter, required in zip(self.model.parameters(), trained, strict=True):
            parameter.requires_grad_(required)
        for name, module in self.model.named_modules():
            module.training = training[name]

    def __call__(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states [batch, tokens, hidden size] of teacher and student, for this rank's tokens."""
        decoder: Any = self.model.get_decoder()
        both = decoder(
            input_ids=torch.cat([input_ids, input_ids]),
            position_ids=self.parallel.positions(input_ids.shape[1], input_ids.device),
            use_cache=False,
            two_streams=self,
        ).last_hidden_state
        teacher, student = both.chunk(2)
        return teacher.detach(), student

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[2 * batch, heads, tokens, head_dim] of both streams."""
        query, key, value = (self.parallel.to_heads(tensor) for tensor in (query, key, value))
        (teacher_q, student_q), (teacher_k, student_k), (teacher_v, student_v) = (
            tensor.chunk(2) for tensor in (query, key, value)
        )
        with torch.no_grad():
            teacher = _dense(teacher_q, teacher_k, teacher_v, scale)
        types = torch.full((query.shape[1],), -1, dtype=torch.int32, device=query.device)
        streaming = head_sparse_attention(student_q, student_k, student_v, types, scale=scale, **self._mask)
        dense = teacher if self.dense_branch == "teacher" else _dense(student_q, student_k, student_v, scale)
        mixed = gated_mix(dense, streaming, self.parallel.own_heads(self.gates[layer]))
        return self.parallel.to_tokens(torch.cat([teacher, mixed]))


def two_stream_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    two_streams: TwoStreams | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of both streams; [2 * batch, tokens, heads, head_dim].

    Raises:
        ValueError: the model does not hand its keyword arguments on to the attention, or its attention has more to it.
    """
    if two_streams is None:
        raise ValueError("model: does not hand keyword arguments on to its attention; gates cannot be optimized in it")
    more = [name for name in ("softcap", "sliding_window", "s_aux", "position_bias") if options.get(name) is not None]
    if more:
        raise ValueError(f"model: its attention has {', '.join(more)}; gates cannot be optimized in it")
    layer: Any = module.layer_idx
    return two_streams.attend(layer, query, key, value, scaling).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **options: Any) -> None:
    return None


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
