"""How tensors lie in memory: tokens outside of heads; a pixel's channels side by side, or a channel's pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def tokens_outside(tensor: Tensor) -> Tensor:
    """Empty [batch, heads, tokens, head_dim] that lies in memory as [batch, tokens, heads, head_dim].

    Layers bring queries and want results so; there the heads join without a copy.
    """
    batch, heads, tokens, size = tensor.shape
    return tensor.new_empty(batch, tokens, heads, size).transpose(1, 2)


def dense(x: Tensor) -> Tensor:
    """[batch, channels, height, width], contiguous or in the channels_last format; a copy only of what is neither.

    Args:
        x: of any strides. Where its channels are adjacent they stay so.
    """
    if x.is_contiguous() or channels_inside(x):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


def dense_format(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """What `dense` gives, and its memory format: where the host's time counts, with the fewest questions."""
    if channels_inside(x):
        return x, torch.channels_last
    if x.is_contiguous():
        return x, torch.contiguous_format
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return x.contiguous(memory_format=layout), layout


def channels_inside(x: Tensor) -> bool:
    """Whether it is in the channels_last format; of one pixel or one channel an image is in both."""
    return x.is_contiguous(memory_format=torch.channels_last)


def as_dense(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor in the format of a dense one."""
    return tensor.contiguous(memory_format=torch.channels_last if channels_inside(like) else torch.contiguous_format)
