"""Finding the parts of a pi0 or pi0.5 in a model, by the names of its attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pronghorn.vlash.pi.model import PiModel, Prefix
from pronghorn.vlash.pi.rotation import inverse_frequencies


def pi_model(model: Any, *, dtype: torch.dtype | None = None, state_dtype: torch.dtype | None = None) -> PiModel:
    """See a model's modules as a pi0 or pi0.5.

    It looks at the model anew when it computes, so that LoRA may be put around layers, or merged, meanwhile; after
    moving the model to another device or dtype call it again.

    Args:
        model: LeRobot's PI0Pytorch or PI05Pytorch, or our `layers.PiNetwork`.
        dtype: in which the layers compute; by default that of their weights, which quantized layers do not tell.
        state_dtype: to which pi0's state token is rounded; the authors' code has bfloat16, LeRobot's none.

    Returns:
        The model, over the same parameters.

    Raises:
        TypeError: it is neither, or its layers are quantized and `dtype` is not given.
    """
    if hasattr(model, "paligemma_with_expert"):
        experts = model.paligemma_with_expert
        prefix_expert, expert = experts.paligemma.model.language_model, experts.gemma_expert.model
        return PiModel(
            prefix_expert, expert, suffix=model, readout=model, frequencies=prefix_expert.rotary_emb.inv_freq,
            dtype=_dtype(expert, dtype), periods=(model.config.min_period, model.config.max_period),
            state_dtype=state_dtype, gradient_checkpointing=model.gradient_checkpointing_enabled and model.training,
        )  # fmt: skip
    if hasattr(model, "suffix_embedder"):
        expert, sizes = model.action_expert["model"], model.sizes
        device = model.action_out_proj.weight.device
        return PiModel(
            model.language_model, expert, suffix=model.suffix_embedder, readout=model, dtype=_dtype(expert, dtype),
            frequencies=inverse_frequencies(sizes.head_dim, sizes.rope_theta, device), state_dtype=state_dtype,
        )  # fmt: skip
    raise TypeError(f"model: got {type(model).__name__}, wanted LeRobot's PI0Pytorch or PI05Pytorch, or a PiNetwork")


def embed_prefix(
    model: Any, images: Sequence[Tensor], image_masks: Sequence[Tensor], tokens: Tensor, token_mask: Tensor
) -> Prefix:
    """Images and text through the encoders of LeRobot's model, all cameras in one batch.

    Args:
        model: LeRobot's PI0Pytorch or PI05Pytorch.
        images: [batch, 3, height, width] in -1 ... 1, one for each camera.
        image_masks: bool [batch], whether the camera's image is there.
        tokens: int64 [batch, L], of the text.
        token_mask: bool [batch, L].

    Raises:
        ValueError: there is no image, or not one mask for each.
    """
    if not images:
        raise ValueError("images: got none, wanted at least one camera")
    experts = model.paligemma_with_expert
    embedded = experts.embed_image(torch.cat(list(images))).chunk(len(images))
    return Prefix.join(embedded, image_masks, experts.embed_language_tokens(tokens), token_mask)


def without_padding(tokens: Tensor, token_mask: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """A text without columns at its end that are padding in all rows, so far as a multiple of `step` remains.

    Nobody sees padding, so results are the same; a prompt is padded to many times its length. Waits for the device.

    Args:
        tokens: int64 [batch, L].
        token_mask: bool [batch, L], False for padding.
        step: columns.

    Returns:
        Both, [batch, at least 1 step, or L].
    """
    words = token_mask.any(0).cpu().nonzero()  # one operation there: a GPU that waits for the host takes long for many
    used = int(words[-1]) + 1 if len(words) else 1
    kept = -(-used // step) * step
    return tokens[:, :kept], token_mask[:, :kept]


def _dtype(expert: Any, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    found: torch.dtype = expert.layers[0].self_attn.o_proj.weight.dtype
    if not found.is_floating_point:
        raise TypeError(f"dtype: got None for layers whose weights are quantized ({found}); say in which they compute")
    return found
