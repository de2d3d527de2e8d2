"""A residual encoder and decoder, as in segmentation (MinkUNet)."""

from __future__ import annotations

from typing import Any

from torch import nn

from pronghorn.torchsparse.backbones.blocks import SparseConvBlock, SparseConvTransposeBlock, SparseResBlock
from pronghorn.torchsparse.operators import cat
from pronghorn.torchsparse.tensor import SparseTensor


class SparseResUNet(nn.Module):
    """Four stages down and four up.

    Args:
        stem_channels: of the two convolutions before.
        encoder_channels: of each stage down.
        decoder_channels: of each stage up.
        in_channels: of the input.
        width_multiplier: of all channels.

    Returns:
        The outputs of the stem, of each stage down and of each stage up, as a list.

    Source: Choy et al. (arXiv 1904.08755), section 4.
    """

    def __init__(
        self, stem_channels: int, encoder_channels: list[int], decoder_channels: list[int], *, in_channels: int = 4,
        width_multiplier: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        stem, *encoder = (int(channels * width_multiplier) for channels in (stem_channels, *encoder_channels))
        decoder = [int(channels * width_multiplier) for channels in decoder_channels]
        self.stem = nn.Sequential(*SparseConvBlock(in_channels, stem, 3), *SparseConvBlock(stem, stem, 3))
        widths = [stem, *encoder]
        self.encoders = nn.ModuleList(
            nn.Sequential(SparseConvBlock(a, a, 2, stride=2), SparseResBlock(a, b, 3), SparseResBlock(b, b, 3))
            for a, b in zip(widths, encoder, strict=False)
        )
        self.decoders = nn.ModuleList()
        below = encoder[-1]
        for channels, beside in zip(decoder, reversed(widths[:-1]), strict=True):
            fuse = nn.Sequential(SparseResBlock(channels + beside, channels, 3), SparseResBlock(channels, channels, 3))
            upsample = SparseConvTransposeBlock(below, channels, 2, stride=2)
            self.decoders.append(nn.ModuleDict({"upsample": upsample, "fuse": fuse}))
            below = channels

    def forward(self, x: SparseTensor) -> list[SparseTensor]:
        """The tensor after the stem, and after each stage."""
        outputs = [self.stem(x)]
        for encoder in self.encoders:
            outputs.append(encoder(outputs[-1]))
        beside = outputs[-2::-1]
        for decoder, other in zip(self.decoders, beside, strict=True):
            upsample, fuse = decoder.children()
            outputs.append(fuse(cat([upsample(outputs[-1]), other])))
        return outputs


class SparseResUNet42(SparseResUNet):
    """Forty-two layers: the MinkUNet of LiDAR segmentation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(32, [32, 64, 128, 256], [256, 128, 96, 96], **options)
