"""Definition of residual autoencoding: a shortcut without parameters between grids of two sizes, and a sum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def shuffle_shortcut(
    x: Tensor, main: Tensor | None, bias: Tensor | None, channels: int, factor: int, up: bool, scale: float
) -> Tensor:
    """main + bias + scale * shortcut of x, [batch, channels, height, width]; in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y: Tensor = (duplicated if up else averaged)(x.to(wide), channels, factor) * scale
    if main is None:
        return y
    if bias is not None:
        main = main.to(wide) + bias[:, None, None]
    if main.shape != y.shape:
        main = functional.pixel_shuffle(main, factor) if up else functional.pixel_unshuffle(main, factor)
    return main + y


def averaged(x: Tensor, channels: int, factor: int) -> Tensor:
    """Fewer places, more channels: places become channels, and groups of these that follow each other their mean."""
    means: Tensor = functional.pixel_unshuffle(x, factor).unflatten(1, (channels, -1)).mean(dim=2)
    return means


def duplicated(x: Tensor, channels: int, factor: int) -> Tensor:
    """More places, fewer channels: every channel is repeated, and channels become places."""
    return functional.pixel_shuffle(x.repeat_interleave(channels * factor**2 // x.shape[1], dim=1), factor)


def empty(x: Tensor, main: Tensor | None, channels: int, factor: int, up: bool, channels_last: bool) -> Tensor:
    """What the result is written to: [batch, channels, height, width], in the dtype of `main` if there is one."""
    batch, _, height, width = x.shape
    return torch.empty(
        (batch, channels, *((size * factor if up else size // factor) for size in (height, width))),
        dtype=x.dtype if main is None else main.dtype, device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip
