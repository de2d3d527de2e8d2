"""A quantized policy learns by an adapter, whose sum with packed weights nobody can hand to a sampler."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig


def refuse_quantized(model: Any, reason: str) -> None:
    """Raise ValueError if the model, or the checkpoint that a string names, is quantized.

    Args:
        model: a model, with adapters or without, or a checkpoint's name.
        reason: what asks for whole weights, and begins the message.
    """
    if isinstance(model, str):
        quantized = getattr(AutoConfig.from_pretrained(model), "quantization_config", None) is not None
    else:
        quantized = bool(getattr(model, "is_quantized", False))
    if quantized:
        raise ValueError(
            f"{reason}; this model is quantized, and its adapter cannot be merged into packed weights; wanted "
            "transformers' own sampling (VCPOTrainer without use_vllm), or a model that is not quantized"
        )
