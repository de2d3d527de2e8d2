"""What a Gemma layer computes before and after its attention, whoever built the layer.

What a layer adds to the residual is added by the norm that follows, in one pass with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels.adaptive_rms_norm import adaptive_rms_norm
from pronghorn.kernels.geglu import geglu
from pronghorn.vlash.pi.rotation import Rotation, rotate


class Modulation(NamedTuple):
    """What an adaptive norm takes from its condition, each [rows, width]."""

    scale: Tensor
    shift: Tensor
    gate: Tensor


Condition = Tensor | Modulation | None
"""[rows, condition_width]; or what a norm made of it already; or None for a plain norm."""


class Residual(NamedTuple):
    """x + update * gate, still to be added up: [rows, tokens, width] twice and [rows, width]."""

    x: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None


class Attending(NamedTuple):
    """Queries, keys and values [rows, tokens, heads, head_dim], what came in, and the gate of what goes out."""

    query: Tensor
    key: Tensor
    value: Tensor
    x: Tensor
    gate: Tensor | None


def normalized(norm: Any, residual: Residual, condition: Condition) -> tuple[Tensor, Tensor, Tensor | None]:
    """The RMS norm of a residual, the residual itself, and the gate of what follows (None from a plain norm).

    Args:
        norm: plain, with `weight`, whose offset from 1 it is, and `eps`; or adaptive, with `dense` and `eps`.
        residual: [rows, tokens, width].
        condition: of an adaptive norm.
    """
    scale, shift, gate = _modulated_by(norm, residual.x, condition)
    update = residual.update if residual.update is None else residual.update.to(residual.x.dtype)  # from autocast's
    out, x = adaptive_rms_norm(residual.x, scale, shift, update=update, gate=residual.gate, eps=norm.eps)
    return out, x, gate


def modulation(norm: Any, condition: Tensor) -> Modulation:
    """What an adaptive norm makes of [..., condition_width]."""
    return Modulation(*norm.dense(condition).chunk(3, dim=-1))


def _modulated_by(norm: Any, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale, shift and gate; those of a plain norm are the same for all rows, and there is no gate."""
    if condition is None:
        scale = norm.weight.expand(len(x), -1)
        return scale, torch.zeros_like(scale), None
    return condition if isinstance(condition, Modulation) else modulation(norm, condition)


def before_attention(layer: Any, residual: Residual, by: Rotation, condition: Condition = None) -> Attending:
    """Norm, projections (fused or not) and rotation of [rows, tokens, width]."""
    normed, x, gate = normalized(layer.input_layernorm, residual, condition)
    query, key, value = _projected(layer.self_attn, normed)
    return Attending(*rotate(query, key, by), value, x, gate)


def after_attention(layer: Any, attending: Attending, attended: Tensor, condition: Condition = None) -> Residual:
    """Output projection, norm and feed-forward.

    Args:
        layer: the layer.
        attending: of `before_attention`.
        attended: [rows, tokens, heads, head_dim].
        condition: of its second norm.

    Returns:
        [rows, tokens, width].
    """
    residual = Residual(attending.x, layer.self_attn.o_proj(attended.flatten(2)), attending.gate)
    normed, x, gate = normalized(layer.post_attention_layernorm, residual, condition)
    return Residual(x, _feed_forward(layer.mlp, normed), gate)


def _projected(attention: Any, x: Tensor) -> list[Tensor]:
    if hasattr(attention, "qkv_proj"):
        joined = attention.qkv_proj(x)
        queries = attention.o_proj.in_features
        rest = (joined.shape[-1] - queries) // 2
        parts = joined.split([queries, rest, rest], dim=-1)
    else:
        parts = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
    return [part.unflatten(-1, (-1, attention.head_dim)) for part in parts]


def _feed_forward(mlp: Any, x: Tensor) -> Tensor:
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    result: Tensor = mlp.down_proj(geglu(gate, up))
    return result
