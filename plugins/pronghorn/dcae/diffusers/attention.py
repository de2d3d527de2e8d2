"""The two halves of an EfficientViT block, with the kernels of this library; also of a part of an image.

Inner modules and parameters are looked up by name: as attributes they take several times as long, and the time of
small images is the host's.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor

from pronghorn.dcae.diffusers.convolution import convolved
from pronghorn.kernels.channel_rms_norm import channel_rms_norm
from pronghorn.kernels.gated_depthwise_conv import gated_depthwise_conv


def qkv_weight(attn: SanaMultiscaleLinearAttention) -> Tensor:
    """Weight of the convolution that makes queries, keys and values, [3 * inner, channels, 1, 1]."""
    return torch.cat([layer.weight for layer in (attn.to_q, attn.to_k, attn.to_v)])[:, :, None, None]


def out_weight(attn: SanaMultiscaleLinearAttention) -> Tensor:
    """Weight of the convolution after attention, [channels, inner of all scales, 1, 1]."""
    return attn.to_out.weight[:, :, None, None]


def queries_keys_values(attn: SanaMultiscaleLinearAttention, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Of features [batch, channels, height, width], three of [batch, heads of all scales, places, head_dim].

    They are views of what convolutions gave. Each head's channels are its queries, then its keys, then its values.
    """
    qkv, size = torch.conv2d(x, weight), attn.attention_head_dim
    batch, _, height, width = qkv.shape
    scales: Any = attn._modules["to_qkv_multiscale"]
    if len(scales):
        heads = _at_all_scales(scales, qkv, size).view(batch, height * width, -1, 3, size)
        return heads.permute(3, 0, 2, 1, 4).unbind()
    return qkv.reshape(batch, -1, 3, size, height * width).transpose(3, 4).unbind(2)


def _at_all_scales(scales: Any, qkv: Tensor, head_dim: int) -> Tensor:
    """[batch * places, scales, channels] of queries, keys and values, which in all but the first see their neighbours.

    The grouped convolution is a product of matrices, one for each group: cuDNN takes many times as long.
    """
    channels = qkv.shape[1]
    first = qkv.permute(0, 2, 3, 1).reshape(-1, channels)
    found = qkv.new_empty(len(first), 1 + len(scales), channels)
    found[:, 0] = first
    for place, scale in enumerate(scales, 1):
        near = convolved(scale.proj_in, qkv).permute(0, 2, 3, 1).reshape(-1, channels // head_dim, head_dim)
        weight = scale.proj_out.weight.view(-1, head_dim, head_dim)
        to, factors = found[:, place].view(near.shape).transpose(0, 1), (near.transpose(0, 1), weight.transpose(1, 2))
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # neither takes a place to write to
            to.copy_(torch.bmm(*factors))
        else:
            torch.bmm(*factors, out=to)
    return found


def attention_output(attn: SanaMultiscaleLinearAttention, attended: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """What follows attention: projection, norm and sum.

    Args:
        attn: the module.
        attended: [batch, heads of all scales, places, head_dim].
        x: [batch, channels, height, width], what went in.
        weight: `out_weight`.
    """
    batch, _, height, width = x.shape
    y = torch.conv2d(attended.transpose(2, 3).reshape(batch, -1, height, width), weight)
    residual = x if attn.residual_connection else None
    return normed(y, attn._modules["norm_out"], residual)


def gated(glu: GLUMBConv, x: Tensor) -> Tensor:
    """The gated convolution, with its norm and sum in one kernel."""
    inner: Any = glu._modules
    y = convolved(inner["conv_inverted"], x)
    depth = inner["conv_depth"]._parameters
    y = convolved(inner["conv_point"], gated_depthwise_conv(y, depth["weight"], depth["bias"]))
    residual = x if glu.residual_connection else None
    if glu.norm_type == "rms_norm":
        return normed(y, inner["norm"], residual)
    return y if residual is None else y + residual


def normed(x: Tensor, norm: Any, residual: Tensor | None) -> Tensor:
    """A norm, and a sum: one kernel where it is over channels."""
    if not isinstance(norm, RMSNorm):
        y: Tensor = norm(x)
        return y if residual is None else y + residual
    own: Any = norm._parameters
    y = channel_rms_norm(x, own["weight"], own.get("bias"), eps=norm.eps, residual=residual)
    return y
