"""Backbones of sparse convolutions."""

from pronghorn.torchsparse.backbones.blocks import SparseConvBlock, SparseConvTransposeBlock, SparseResBlock
from pronghorn.torchsparse.backbones.resnet import SparseResNet, SparseResNet21D
from pronghorn.torchsparse.backbones.unet import SparseResUNet, SparseResUNet42

__all__ = [
    "SparseConvBlock",
    "SparseConvTransposeBlock",
    "SparseResBlock",
    "SparseResNet",
    "SparseResNet21D",
    "SparseResUNet",
    "SparseResUNet42",
]
