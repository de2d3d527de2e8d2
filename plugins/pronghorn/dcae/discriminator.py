"""PatchGAN: scores for every part of an image."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

SLOPE = 0.2
WIDEST = 8  # times the first layer's channels


class PatchDiscriminator(nn.Sequential):
    """Convolutions of 4 x 4 whose scores, one for each patch, are high where an image looks real.

    Args:
        in_channels: of an image.
        channels: of the first layer; each one doubles them, up to eightfold.
        layers: how many halve height and width.

    Raises:
        ValueError: a number is not positive.

    Source: Isola et al. (arXiv 1611.07004), appendix 6.1.2.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 3) -> None:
        for name, value in (("in_channels", in_channels), ("channels", channels), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, wanted a positive number")
        widths = [channels * min(2**layer, WIDEST) for layer in range(layers + 1)]
        found: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for layer, (narrow, wide) in enumerate(pairwise(widths), start=1):
            stride = 1 if layer == layers else 2
            found += [nn.Conv2d(narrow, wide, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(wide),
                      nn.LeakyReLU(SLOPE)]  # fmt: skip
        super().__init__(*found, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.least = 2 ** (layers + 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [batch, 1, about height / 8, about width / 8] of images [batch, channels, height, width].

        Raises:
            ValueError: the images are too small.
        """
        if min(x.shape[2:]) < self.least:
            raise ValueError(f"x: got {tuple(x.shape)}, wanted a height and width of at least {self.least}")
        scores: Tensor = super().forward(x)
        return scores
