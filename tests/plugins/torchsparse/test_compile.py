"""Compilation to one graph, autocast, and training on several processes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ranks import leave_together, meet, on_two_ranks
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pronghorn.torchsparse import backbones
from pronghorn.torchsparse import nn as spnn
from pronghorn.torchsparse.config import FETCH_ON_DEMAND, GATHER_SCATTER, ConvConfig
from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.fusion import fuse
from pronghorn.torchsparse.tensor import SparseTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (2, 16, 15, 17)


def tensor(ranged=True, sites=300, seed=0, batch=None):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(torch.Size(SIZES).numel(), generator=generator)[:sites]
    coords = torch.stack(torch.unravel_index(places, SIZES), dim=1).int()
    feats = torch.randn(sites, 4, generator=generator)
    if batch is not None:
        feats, coords = feats[coords[:, 0] == batch], coords[coords[:, 0] == batch]
    return SparseTensor(feats.to(DEVICE), coords.to(DEVICE), spatial_range=SIZES if ranged else None)


def resnet():
    """SparseResNet21D with two stages of one block, narrow."""
    return backbones.SparseResNet([(1, 8, 3, 1), (1, 8, 3, 2)])


def unet():
    """SparseResUNet42 with one stage down and up, narrow."""
    return backbones.SparseResUNet(4, [8], [8])


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    monkeypatch.setattr(settings, "allow_tf32", False)


def model(make, train):
    torch.manual_seed(0)
    made = make().to(DEVICE)
    for layer in made.modules():
        if isinstance(layer, spnn.BatchNorm):
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.running_mean)
            nn.init.normal_(layer.weight)
    return made.train(train)


def compiled(made, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(made, fullgraph=True, backend=backend)


def loss_of(outputs):
    return sum(output.feats.square().mean() for output in outputs)


def assert_close(ours, theirs, far=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= far * theirs.abs().max()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("make", "ranged", "sites"),
    [(resnet, True, (300, 200, 150, 1)), (resnet, False, (300, 200, 150)), (unet, True, (300,))],
)
def test_inference_is_one_graph(make, ranged, sites):
    """And one more for scans of any size."""
    made, counted = model(make, train=False), CompileCounterWithBackend("aot_eager")
    run = compiled(made, counted)
    with torch.no_grad():
        for seed, count in enumerate(sites):
            wanted = made(tensor(ranged, count, seed))
            for ours, theirs in zip(run(tensor(ranged, count, seed)), wanted, strict=True):
                assert torch.equal(ours.coords, theirs.coords)
                assert (ours.stride, ours.spatial_range) == (theirs.stride, theirs.spatial_range)
                if theirs.feats.numel():
                    assert_close(ours.feats, theirs.feats)
    assert counted.frame_count <= 2 + (1 in sites)  # of a size of 1 torch always makes a graph of its own


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("make", [resnet, unet])
def test_a_training_step_is_one_graph(make):
    made, same = model(make, train=True), model(make, train=True)
    loss, wanted = loss_of(compiled(made)(tensor())), loss_of(same(tensor()))
    assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    for ours, theirs in zip(made.parameters(), same.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, 1e-4)
    for ours, theirs in zip(made.buffers(), same.buffers(), strict=True):
        assert_close(ours.float(), theirs.float())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_layers_refuse_what_eager_ones_refuse():
    run = compiled(model(resnet, train=True))
    with pytest.raises(RuntimeError, match="fewer than 2 sites"):
        run(tensor(sites=1))
    layer = compiled(spnn.Conv3d(4, 4, 3).to(DEVICE))
    x = tensor(ranged=False)
    x.coords[3, 2] = -1
    with pytest.raises(RuntimeError, match="coords: some are negative"):
        layer(x)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_sorted_maps_compile():
    torch.manual_seed(0)
    layer = spnn.Conv3d(4, 5, 3, config=ConvConfig(ifsort=True, split_mask_num=2)).to(DEVICE)
    x = tensor()
    x.feats.requires_grad_()
    ours, theirs = compiled(layer)(x).feats, layer(tensor()).feats
    assert_close(ours, theirs)
    ours.sum().backward()
    assert x.feats.grad.isfinite().all()


@pytest.mark.parametrize("dataflow", [ConvConfig(), ConvConfig(GATHER_SCATTER), ConvConfig(FETCH_ON_DEMAND)],
                         ids=lambda config: config.dataflow)  # fmt: skip
def test_autocast(dataflow, monkeypatch):
    monkeypatch.setattr(settings, "config", dataflow)
    made = model(unet, train=True)
    x = tensor()
    wanted = made(x)[-1]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = made(x)[-1]
        assert made.stem[0](x).feats.dtype == torch.bfloat16
    assert (found.feats.float() - wanted.feats).norm() <= 0.05 * wanted.feats.norm()
    found.feats.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in made.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


def test_fused_layers_autocast():
    made, x = model(unet, train=False), tensor()
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        wanted = made(x)[-1].feats
        with fuse(made):
            found = made(x)[-1].feats
    assert (found.float() - wanted.float()).norm() <= 0.03 * wanted.float().norm()


@pytest.mark.fault(20)
def test_two_processes_are_one_on_the_joint_batch(tmp_path):
    made = model(unet, train=False)  # batch norms would have statistics of their own on each process
    (0.5 * sum(made(tensor(batch=sample))[-1].feats.square().sum() for sample in (0, 1))).backward()
    alone = {name: parameter.grad.cpu() for name, parameter in made.named_parameters()}
    made.zero_grad()
    (0.5 * made(tensor())[-1].feats.square().sum()).backward()
    joint = {name: parameter.grad.cpu() for name, parameter in made.named_parameters()}
    on_two_ranks(train_on_one_sample, tmp_path)
    found = load_file(tmp_path / "gradients.safetensors")
    for name, gradient in joint.items():
        assert_close(alone[name], gradient, 1e-4)
        assert_close(found[name], gradient, 1e-4)


def train_on_one_sample(rank, port, folder):
    """One of two processes: the gradients that it ends up with are those of both."""
    settings.allow_tf32 = False
    meet(rank, port)
    made = nn.parallel.DistributedDataParallel(model(unet, train=False))
    made(tensor(batch=rank))[-1].feats.square().sum().backward()
    if rank == 0:
        gradients = {name: parameter.grad.cpu() for name, parameter in made.module.named_parameters()}
        save_file(gradients, folder / "gradients.safetensors")
    leave_together()
