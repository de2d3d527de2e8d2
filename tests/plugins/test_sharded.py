"""Layers that train, their parameters sharded over two processes by FSDP: the gradients of one process."""

import pytest
import torch
from tests.plugins.dcae.test_autoencoder import small
from tests.ranks import leave_together, meet, on_two_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pronghorn.torchsparse import nn as spnn
from pronghorn.torchsparse.tensor import SparseTensor


def torchsparse(rank):
    torch.manual_seed(0)
    down, up = (
        spnn.Conv3d(4, 2, 2, stride=2),
        spnn.Conv3d(2, 5, 2, stride=2, transposed=True),
    )  # by the map of the first
    layer = torch.nn.Sequential(spnn.Conv3d(3, 4, 3), spnn.BatchNorm(4), spnn.ReLU(), down, up)
    coords = torch.stack([torch.zeros(9), torch.arange(9), torch.arange(9) % 2, torch.zeros(9)], dim=1).int()
    return layer.eval(), SparseTensor(torch.randn(9, 3, generator=torch.Generator().manual_seed(rank)), coords)


def dcae(rank):
    torch.manual_seed(0)
    return small(), torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(rank))


LAYERS = {"torchsparse": torchsparse, "dcae": dcae}


def loss_of(module, given):
    found = module(given)
    for name in ("feats", "sample"):
        found = getattr(found, name, found)
    return found.square().sum()


def _rank(rank, port, folder):
    meet(rank, port)
    mesh = init_device_mesh("cpu", (2,))
    for name, make in LAYERS.items():
        module, given = make(rank)
        whole = sum(parameter.numel() for parameter in module.parameters())
        for part in module.children():
            fully_shard(part, mesh=mesh)
        fully_shard(module, mesh=mesh)
        own = sum(parameter.to_local().numel() for parameter in module.parameters())
        loss_of(module, given).backward()
        gradients = {key: parameter.grad.full_tensor() for key, parameter in module.named_parameters()}
        torch.save((own / whole, gradients), f"{folder}/{name}-{rank}.pt")
    leave_together()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    on_two_ranks(_rank, str(folder))
    return folder


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_one_process(name, sharded):
    module, _ = LAYERS[name](0)
    losses = [loss_of(module, LAYERS[name](rank)[1]) for rank in range(2)]
    (sum(losses) / 2).backward()
    for rank in range(2):
        share, gradients = torch.load(sharded / f"{name}-{rank}.pt", weights_only=True)
        assert share < 0.75
        for key, parameter in module.named_parameters():
            torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-4, atol=1e-5)
