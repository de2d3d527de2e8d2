"""TorchSparse++'s part of the contract of all methods: a convolution of a cloud of sites."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.contract import Contract, randomize
from pronghorn.torchsparse.nn import Conv3d
from pronghorn.torchsparse.tensor import SparseTensor

SIZES = (1, 5, 5, 5)


def _module(seed: int) -> Conv3d:
    layer = Conv3d(4, 8, 3, bias=True)
    randomize(layer, seed)
    return layer


def _run(module: Conv3d) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(torch.Size(SIZES).numel(), generator=generator)[:40]
    coords = torch.stack(torch.unravel_index(places, SIZES), dim=1).int()
    cloud = SparseTensor(torch.randn(40, 4, generator=generator), coords, spatial_range=SIZES)
    found: Tensor = module(cloud).feats
    return found.detach()


contract = Contract(
    module=_module,
    run=_run,
)
