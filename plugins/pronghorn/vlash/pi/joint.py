"""Two experts, one attention: tokens of a prefix and of N branches through a stack of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pronghorn.kernels.shared_observation_attention import shared_observation_attention
from pronghorn.kernels.suffix_layers import suffix_layers
from pronghorn.vlash.pi.attention import attend_prefix, attend_suffix
from pronghorn.vlash.pi.fused import fused_layers
from pronghorn.vlash.pi.gemma import Condition, Residual, after_attention, before_attention, normalized
from pronghorn.vlash.pi.rotation import Rotation

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of a prefix, [batch, Lp, key/value heads, head_dim], for every layer."""


@dataclass(frozen=True)
class Layout:
    """Where tokens stand and which of them are real.

    Attributes:
        prefix_mask: bool [batch, Lp].
        branch_mask: bool [batch, N].
        prefix_rotation: of the prefix's tokens.
        branch_rotation: of the branches' tokens, whose rows are batch x N.
        state_tokens: first tokens of a branch, which do not see the others.
    """

    prefix_mask: Tensor
    branch_mask: Tensor
    prefix_rotation: Rotation
    branch_rotation: Rotation
    state_tokens: int


def joint_forward(
    prefix_expert: Any, expert: Any, prefix: Tensor, suffix: Tensor, condition: Condition, layout: Layout, *,
    gradient_checkpointing: bool = False,
) -> Tensor:  # fmt: skip
    """Prefix and branches through all layers, for training.

    Args:
        prefix_expert: has `layers`, which see images and text.
        expert: has `layers` and `norm`, for actions.
        prefix: [batch, Lp, prefix_width].
        suffix: [batch x N, Ls, width], the branches of a sample side by side.
        condition: of the adaptive norms, [batch x N, width], or None.
        layout: of the tokens.
        gradient_checkpointing: compute each layer again in the backward pass instead of keeping what it computed.

    Returns:
        [batch x N, Ls, width] after the last norm. Of a branch that is padding it means nothing.

    Raises:
        ValueError: the experts have different numbers of layers.
    """
    _check_depth(prefix_expert, expert)
    last = len(expert.layers) - 1
    seen, own = Residual(prefix), Residual(suffix)
    for index, pair in enumerate(zip(prefix_expert.layers, expert.layers, strict=True)):
        arguments = (*pair, seen, own, condition, layout, index == last)
        if gradient_checkpointing:
            seen, own = checkpoint(_joint_layer, *arguments, use_reentrant=False)
        else:
            seen, own = _joint_layer(*arguments)
    return normalized(expert.norm, own, condition)[0]


def prefix_cache(prefix_expert: Any, prefix: Tensor, mask: Tensor, rotation: Rotation) -> Cache:
    """The prefix alone through all layers.

    Args:
        prefix_expert: has `layers`.
        prefix: [batch, Lp, prefix_width].
        mask: bool [batch, Lp].
        rotation: of its tokens.

    Returns:
        Its keys and values in every layer.
    """
    cache: Cache = []
    residual = Residual(prefix)
    for index, layer in enumerate(prefix_expert.layers):
        attending = before_attention(layer, residual, rotation)
        # A part of what a fused projection gave would be copied in every step.
        cache.append((attending.key.contiguous(), attending.value.contiguous()))
        if index + 1 < len(prefix_expert.layers):
            attended = attend_prefix(attending.query, attending.key, attending.value, mask)
            residual = after_attention(layer, attending, attended)
    return cache


def suffix_forward(
    expert: Any, suffix: Tensor, cache: Cache, prefix_mask: Tensor, conditions: Sequence[Condition], rotation: Rotation,
    state_tokens: int,
) -> Tensor:  # fmt: skip
    """One suffix through all layers, against the keys and values of its prefix.

    Args:
        expert: has `layers` and `norm`, for actions.
        suffix: [batch, Ls, width].
        cache: of `prefix_cache`; nothing is added to it.
        prefix_mask: bool [batch, Lp].
        conditions: one of each norm: two a layer, and the last.
        rotation: of the suffix's tokens.
        state_tokens: first tokens of the suffix, which do not see the others.

    Returns:
        [batch, Ls, width] after the last norm.
    """
    layers = fused_layers(expert, suffix, cache, conditions, state_tokens)
    if layers is not None:
        cos, sin = (part[0] for part in rotation)
        eps = expert.layers[0].input_layernorm.eps
        residual = Residual(suffix_layers(suffix[0], layers, prefix_mask[0], cos, sin, eps=eps)[None])
        return normalized(expert.norm, residual, conditions[-1])[0]
    residual = Residual(suffix)
    for index, (layer, seen) in enumerate(zip(expert.layers, cache, strict=True)):
        first, second = conditions[2 * index : 2 * index + 2]
        own = before_attention(layer, residual, rotation, first)
        attended = attend_suffix(own.query, *seen, own.key, own.value, prefix_mask, state_tokens)
        residual = after_attention(layer, own, attended, second)
    return normalized(expert.norm, residual, conditions[-1])[0]


def _joint_layer(
    prefix_layer: Any, layer: Any, prefix: Residual, suffix: Residual, condition: Condition, layout: Layout, last: bool
) -> tuple[Residual, Residual]:
    shape = layout.branch_mask.shape
    seen = before_attention(prefix_layer, prefix, layout.prefix_rotation)
    own = before_attention(layer, suffix, layout.branch_rotation, condition)
    query, key, value = (part.unflatten(0, shape) for part in (own.query, own.key, own.value))
    prefix_attended, attended = shared_observation_attention(
        seen.query, seen.key, seen.value, query, key, value, layout.prefix_mask, layout.branch_mask,
        state_tokens=layout.state_tokens,
    )  # fmt: skip
    suffix = after_attention(layer, own, attended.flatten(0, 1), condition)
    if not last:  # of the last layer nothing but keys and values of the prefix is used
        prefix = after_attention(prefix_layer, seen, prefix_attended)
    return prefix, suffix


def _check_depth(prefix_expert: Any, expert: Any) -> None:
    if len(prefix_expert.layers) != len(expert.layers):
        raise ValueError(
            f"expert: got {len(expert.layers)} layers, wanted those of the prefix's expert, {len(prefix_expert.layers)}"
        )
