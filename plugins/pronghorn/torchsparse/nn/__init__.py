"""Layers on sparse tensors."""

from pronghorn.torchsparse.nn import functional
from pronghorn.torchsparse.nn.activation import LeakyReLU, ReLU, SiLU
from pronghorn.torchsparse.nn.bev import ToBEVConvolution, ToBEVHeightCompression, ToBEVReduction, ToDenseBEVConvolution
from pronghorn.torchsparse.nn.convolution import Conv1d, Conv2d, Conv3d, Conv4d
from pronghorn.torchsparse.nn.crop import SparseCrop
from pronghorn.torchsparse.nn.norm import BatchNorm, GroupNorm, InstanceNorm
from pronghorn.torchsparse.nn.pooling import GlobalAvgPool, GlobalMaxPool

__all__ = [
    "BatchNorm",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Conv4d",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "GroupNorm",
    "InstanceNorm",
    "LeakyReLU",
    "ReLU",
    "SiLU",
    "SparseCrop",
    "ToBEVConvolution",
    "ToBEVHeightCompression",
    "ToBEVReduction",
    "ToDenseBEVConvolution",
    "functional",
]
