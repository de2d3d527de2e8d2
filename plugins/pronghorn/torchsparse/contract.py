"""TorchSparse++'s part of the contract of all methods: a convolution of a cloud of sites."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pronghorn.contract import Contract
from pronghorn.torchsparse.nn import Conv3d
from pronghorn.torchsparse.tensor import SparseTensor

SIZES = (1, 5, 5, 5)
WEIGHTS = "model.safetensors"


def _module(seed: int) -> Conv3d:
    layer = Conv3d(4, 8, 3, bias=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def _run(module: Conv3d) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(torch.Size(SIZES).numel(), generator=generator)[:40]
    coords = torch.stack(torch.unravel_index(places, SIZES), dim=1).int()
    cloud = SparseTensor(torch.randn(40, 4, generator=generator), coords, spatial_range=SIZES)
    found: Tensor = module(cloud).feats
    return found.detach()


def _load(folder: Path) -> Conv3d:
    module = _module(1)
    module.load_state_dict(load_file(folder / WEIGHTS))
    return module


contract = Contract(
    module=_module,
    run=_run,
    save=lambda module, folder: save_file(module.state_dict(), folder / WEIGHTS),
    load=_load,
)
