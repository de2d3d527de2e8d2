"""Functions on sparse tensors, and the choices that hold for all layers."""

from pronghorn.torchsparse.config import ConvConfig
from pronghorn.torchsparse.conv import conv3d
from pronghorn.torchsparse.defaults import (
    get_conv_mode,
    get_downsample_mode,
    get_global_config,
    get_kmap_mode,
    set_conv_mode,
    set_downsample_mode,
    set_global_config,
    set_kmap_mode,
)
from pronghorn.torchsparse.hashing import spcount, sphash, sphashquery
from pronghorn.torchsparse.kernel_maps import build_kernel_map, get_kernel_offsets, transpose_kernel_map
from pronghorn.torchsparse.nn.activation import leaky_relu, relu, silu
from pronghorn.torchsparse.nn.crop import spcrop
from pronghorn.torchsparse.nn.pooling import global_avg_pool, global_max_pool
from pronghorn.torchsparse.voxelize import calc_ti_weights, spdevoxelize, spvoxelize

__all__ = [
    "ConvConfig",
    "build_kernel_map",
    "calc_ti_weights",
    "conv3d",
    "get_conv_mode",
    "get_downsample_mode",
    "get_global_config",
    "get_kernel_offsets",
    "get_kmap_mode",
    "global_avg_pool",
    "global_max_pool",
    "leaky_relu",
    "relu",
    "set_conv_mode",
    "set_downsample_mode",
    "set_global_config",
    "set_kmap_mode",
    "silu",
    "spcount",
    "spcrop",
    "spdevoxelize",
    "sphash",
    "sphashquery",
    "spvoxelize",
    "transpose_kernel_map",
]
