"""Where an expert's layers can be computed by the kernel `suffix_layers`, and what it takes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.kernels.suffix_layers import SuffixLayer, runs_fused
from pronghorn.vlash.pi.gemma import Condition, Modulation


def fused_layers(
    expert: Any, suffix: Tensor, cache: Sequence[tuple[Tensor, Tensor]], conditions: Sequence[Condition],
    state_tokens: int,
) -> list[SuffixLayer] | None:  # fmt: skip
    """Arguments of the kernel, or None where it cannot run; as in `joint.suffix_forward`.

    It takes one sequence, without gradients, whose layers have fused projections (`fusion.fuse`) and adaptive norms.
    """
    if torch.is_grad_enabled() or len(suffix) != 1 or state_tokens:
        return None
    eps = expert.layers[0].input_layernorm.eps
    found: list[SuffixLayer] = []
    for index, (layer, (key, value)) in enumerate(zip(expert.layers, cache, strict=True)):
        weights, modulations = _weights(layer), conditions[2 * index : 2 * index + 2]
        if weights is None or any(weight.dtype != suffix.dtype for weight in weights) or key.shape[2] != 1:
            return None
        if any(norm.eps != eps for norm in (layer.input_layernorm, layer.post_attention_layernorm)):
            return None
        if not all(isinstance(modulation, Modulation) for modulation in modulations):
            return None
        vectors = [part[0].to(suffix.dtype) for modulation in modulations for part in modulation]
        found.append(SuffixLayer._make([*weights, *vectors, key[0, :, 0], value[0, :, 0]]))
        if not index and not runs_fused(suffix[0], found[0]):
            return None
    return found


def _weights(layer: Any) -> list[Tensor] | None:
    """Of the four fused projections, or None where one is missing, or more than a product with a weight."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [
        getattr(attention, "qkv_proj", None), attention.o_proj, getattr(mlp, "gate_up_proj", None), mlp.down_proj
    ]  # fmt: skip
    return [linear.weight for linear in linears] if all(map(_is_plain, linears)) else None


def _is_plain(linear: Any) -> bool:
    if type(linear) is not nn.Linear:  # missing, quantized, or inside of LoRA
        return False
    return linear.bias is None and not linear._forward_hooks and not linear._forward_pre_hooks
