"""TorchSparse++: convolution on point clouds and voxels, of which only the occupied sites are stored and computed.

For LiDAR perception, 3-D generation and whoever has data of which most is empty. What `torchsparse` 2.1 has, under the
same names, on CPUs too (Tang et al., MICRO 2023).

    import pronghorn.torchsparse as ts

    x = ts.SparseTensor(feats, coords)  # coords int32 [N, 4]: batch index, x, y, z
    y = ts.nn.Conv3d(4, 32, kernel_size=3)(x)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.torchsparse import backbones, convert, nn
    from pronghorn.torchsparse import collate as utils
    from pronghorn.torchsparse.config import ConvConfig
    from pronghorn.torchsparse.defaults import (
        get_allow_negative_coordinates,
        set_allow_negative_coordinates,
        settings,
    )
    from pronghorn.torchsparse.fusion import fuse
    from pronghorn.torchsparse.graphs import cuda_graph
    from pronghorn.torchsparse.operators import cat, generative_add
    from pronghorn.torchsparse.rgcn import RelationGraph, SparseRGCNConv
    from pronghorn.torchsparse.tensor import (
        PointTensor,
        SparseTensor,
        clear_global_tensor_cache,
        get_tensor_cache_mode,
        set_tensor_cache_mode,
    )
    from pronghorn.torchsparse.tuner import tune

__all__ = [
    "ConvConfig",
    "PointTensor",
    "RelationGraph",
    "SparseRGCNConv",
    "SparseTensor",
    "backbones",
    "cat",
    "clear_global_tensor_cache",
    "convert",
    "cuda_graph",
    "fuse",
    "generative_add",
    "get_allow_negative_coordinates",
    "get_tensor_cache_mode",
    "nn",
    "set_allow_negative_coordinates",
    "set_tensor_cache_mode",
    "settings",
    "tune",
    "utils",
]

_ROOMS = {
    "ConvConfig": "config",
    "PointTensor": "tensor",
    "RelationGraph": "rgcn",
    "SparseRGCNConv": "rgcn",
    "SparseTensor": "tensor",
    "cat": "operators",
    "cuda_graph": "graphs",
    "clear_global_tensor_cache": "tensor",
    "fuse": "fusion",
    "generative_add": "operators",
    "get_allow_negative_coordinates": "defaults",
    "get_tensor_cache_mode": "tensor",
    "set_allow_negative_coordinates": "defaults",
    "set_tensor_cache_mode": "tensor",
    "settings": "defaults",
    "tune": "tuner",
}
_MODULES = {"backbones": "backbones", "convert": "convert", "nn": "nn", "utils": "collate"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
