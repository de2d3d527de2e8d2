"""Residual autoencoding: what a stage passes on beside its convolutions, without parameters."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def averaged(x: Tensor, channels: int, factor: int) -> Tensor:
    """Fewer places, more channels: places become channels, and groups of these that follow each other their mean.

    Args:
        x: [batch, input channels, height, width].
        channels: of the result.
        factor: by which height and width shrink; 1 for the latent itself.

    Returns:
        [batch, channels, height / factor, width / factor].

    Raises:
        ValueError: channels do not divide.

    Source: Chen et al. (arXiv 2410.10733), section 3.2.
    """
    many = x.shape[1] * factor**2
    if many % channels:
        raise ValueError(f"channels: got {channels}, wanted a divisor of {many}")
    return functional.pixel_unshuffle(x, factor).unflatten(1, (channels, -1)).mean(dim=2)


def duplicated(x: Tensor, channels: int, factor: int) -> Tensor:
    """More places, fewer channels: every channel is repeated, and channels become places.

    Args:
        x: [batch, input channels, height, width].
        channels: of the result.
        factor: by which height and width grow.

    Returns:
        [batch, channels, height * factor, width * factor].

    Raises:
        ValueError: channels do not divide.

    Source: Chen et al. (arXiv 2410.10733), section 3.2.
    """
    many = channels * factor**2
    if many % x.shape[1]:
        raise ValueError(
            f"channels: got {channels}, wanted {many} channels to be a multiple of the input's {x.shape[1]}"
        )
    return functional.pixel_shuffle(x.repeat_interleave(many // x.shape[1], dim=1), factor)
