"""The two halves of an EfficientViT block, with the kernels of this library; also of a part of an image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor
from torch.nn import functional

from pronghorn.dcae.diffusers.convolution import convolved
from pronghorn.kernels.channel_rms_norm import channel_rms_norm
from pronghorn.kernels.gated_depthwise_conv import gated_depthwise_conv


def qkv_weight(attn: SanaMultiscaleLinearAttention) -> Tensor:
    """Weight of the convolution that makes queries, keys and values, [3 * inner, channels, 1, 1]."""
    return torch.cat([layer.weight for layer in (attn.to_q, attn.to_k, attn.to_v)])[:, :, None, None]


def queries_keys_values(attn: SanaMultiscaleLinearAttention, x: Tensor, weight: Tensor) -> list[tuple[Tensor, ...]]:
    """Of features [batch, channels, height, width] and each scale, three of [batch, heads, places, head_dim].

    They are views of what the convolutions gave.
    """
    qkv = functional.conv2d(x, weight)
    # Each head's channels are its queries, then its keys, then its values.
    heads = qkv.flatten(2).unflatten(1, (-1, 3, attn.attention_head_dim)).transpose(3, 4)
    scales = [heads, *[_at_scale(scale, qkv, attn.attention_head_dim) for scale in attn.to_qkv_multiscale]]
    return [tuple(scale.unbind(2)) for scale in scales]


def _at_scale(scale: Any, qkv: Tensor, head_dim: int) -> Tensor:
    """[batch, heads, 3, places, head_dim] of queries, keys and values that see their neighbours.

    The grouped convolution is a product of matrices, one for each group: cuDNN takes many times as long.
    """
    batch, channels, *size = qkv.shape
    near = scale.proj_in(qkv).permute(0, 2, 3, 1).reshape(-1, channels // head_dim, head_dim)
    weight = scale.proj_out.weight.view(-1, head_dim, head_dim)
    found = torch.bmm(near.transpose(0, 1), weight.transpose(1, 2))
    return found.view(-1, 3, batch, size[0] * size[1], head_dim).permute(2, 0, 1, 3, 4)


def attention_output(attn: SanaMultiscaleLinearAttention, attended: list[Tensor], x: Tensor) -> Tensor:
    """What follows attention: projection, norm and sum.

    Args:
        attn: the module.
        attended: [batch, heads, places, head_dim] of each scale.
        x: [batch, channels, height, width], what went in.
    """
    scales = [y.transpose(2, 3).flatten(1, 2).unflatten(2, tuple(x.shape[2:])) for y in attended]
    y = scales[0] if len(scales) == 1 else torch.cat(scales, dim=1)
    y = functional.conv2d(y, attn.to_out.weight[:, :, None, None])
    residual = x if attn.residual_connection else None
    if isinstance(attn.norm_out, RMSNorm):
        return normed(y, attn.norm_out, residual)
    y = attn.norm_out(y)
    return y if residual is None else y + residual


def gated(glu: GLUMBConv, x: Tensor) -> Tensor:
    """The gated convolution, with its norm and sum in one kernel."""
    y = convolved(glu.conv_inverted, x)
    y = glu.conv_point(gated_depthwise_conv(y, glu.conv_depth.weight, glu.conv_depth.bias))
    residual = x if glu.residual_connection else None
    if glu.norm is not None:
        return normed(y, glu.norm, residual)
    return y if residual is None else y + residual


def normed(x: Tensor, norm: Any, residual: Tensor | None) -> Tensor:
    """A norm over channels, and a sum."""
    y: Tensor = channel_rms_norm(x, norm.weight, norm.bias, eps=norm.eps, residual=residual)
    return y
