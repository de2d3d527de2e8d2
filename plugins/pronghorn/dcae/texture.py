"""Statistics of an image's bands of detail: features for a Fréchet distance where no Inception is at hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def texture_statistics(images: Tensor, *, levels: int = 4) -> Tensor:
    """How strong an image's detail is at several scales, and its colours.

    Each level is halved, and what that took away is the level's detail: of each colour the mean of its size and its
    standard deviation. Of what is left in the end the mean and the deviation. A reconstruction that is blurred, or
    invents detail, differs here. **A Fréchet distance of these is no FID**, and can be compared with its own kind only.

    Args:
        images: [batch, channels, height, width] from -1 to 1, at least 2 ** levels high and wide.
        levels: of the pyramid.

    Returns:
        float32 [batch, channels * 2 * (levels + 1)].

    Raises:
        ValueError: the images are too small.
    """
    if min(images.shape[2:]) < 2**levels:
        raise ValueError(f"images: got {tuple(images.shape)}, wanted a height and width of at least {2**levels}")
    x, found = images.float(), []
    for _ in range(levels):
        coarse = functional.avg_pool2d(x, 2)
        detail = x - functional.interpolate(coarse, size=x.shape[2:], mode="bilinear", align_corners=False)
        found += [detail.abs().mean(dim=(2, 3)), detail.std(dim=(2, 3), correction=0)]
        x = coarse
    return torch.cat([*found, x.mean(dim=(2, 3)), x.std(dim=(2, 3), correction=0)], dim=1)
