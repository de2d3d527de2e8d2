"""A model on rows filled up to fixed numbers gives what the model gives; on a GPU, replayed as a CUDA graph."""

import copy
import gc

import pytest
import torch
from torch import nn

import pronghorn.torchsparse as ts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANGE = (2, 16, 16, 16)


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    monkeypatch.setattr(ts.settings, "allow_tf32", False)


def tensor(sites=300, seed=0, channels=4, box=(2, 12, 12, 12)):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, size, (sites,), generator=generator) for size in box]
    coords = torch.stack(columns, dim=1).unique(dim=0)
    coords = coords[torch.randperm(len(coords), generator=generator)].int()
    feats = torch.randn(len(coords), channels, generator=generator)
    return ts.SparseTensor(feats.to(DEVICE), coords.to(DEVICE), spatial_range=RANGE)


def detector():
    """Overlapping strided convolutions, biases, a shortcut, sorted maps."""
    config = ts.ConvConfig(ifsort=True)
    return nn.Sequential(
        ts.nn.Conv3d(4, 8, 3, bias=True), ts.nn.BatchNorm(8), ts.nn.ReLU(True),
        ts.nn.Conv3d(8, 8, 3, stride=2, padding=1, config=config), ts.nn.BatchNorm(8), ts.nn.ReLU(True),
        ts.backbones.SparseResBlock(8, 16, 3), ts.nn.Conv3d(16, 16, (1, 1, 3), (1, 1, 2), bias=True), ts.nn.ReLU(True),
    ).to(DEVICE)  # fmt: skip


def same(ours, theirs):
    assert torch.equal(ours.coords, theirs.coords)
    assert (ours.stride, ours.spatial_range) == (theirs.stride, theirs.spatial_range)
    torch.testing.assert_close(ours.feats, theirs.feats, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_a_backbone_gives_the_same(fused):
    model = ts.backbones.SparseResUNet42(width_multiplier=0.25).to(DEVICE).eval()
    scans = [tensor(seed=seed) for seed in range(3)]
    wanted = [model(tensor(seed=seed)) for seed in range(3)]
    if fused:
        ts.fuse(model)
    fast = ts.cuda_graph(model)
    for scan, theirs in zip(scans, wanted, strict=True):
        for our, their in zip(fast(scan), theirs, strict=True):
            same(our, their)


@torch.no_grad()
def test_more_sites_than_there_is_room_for():
    """The input, and levels below it that an equal number of sites spread out makes larger."""
    model = detector().eval()
    fast = ts.cuda_graph(model, slack=0)
    for scan in (tensor(100, box=(1, 5, 5, 5)), tensor(90, box=RANGE), tensor(900), tensor(20), tensor(0)):
        again = ts.SparseTensor(scan.feats, scan.coords, spatial_range=RANGE)
        same(fast(scan), model(again))


def steps(model, run, optimizer, scans):
    for scan in scans:
        optimizer.zero_grad()
        loss = run(scan).feats.square().mean()
        loss.backward()
        optimizer.step()
    return {**{name: value.clone() for name, value in model.state_dict().items()}, "loss": loss.detach()}


def test_training_goes_the_same_way():
    ours, theirs = (detector() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    found = [
        steps(model, run, torch.optim.SGD(model.parameters(), lr=0.1),
              [tensor(sites, seed) for seed, sites in enumerate((200, 210, 900, 150))])
        for model, run in ((ours, ts.cuda_graph(ours, slack=0.1)), (theirs, theirs))
    ]  # fmt: skip
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_gradients_add_up_and_reach_the_features():
    model = detector().eval()
    fast = ts.cuda_graph(model)
    grads = []
    for run in (fast, model):
        model.zero_grad()
        for seed in (0, 1):
            scan = tensor(seed=seed)
            scan.feats.requires_grad_()
            run(scan).feats.square().sum().backward()
        grads.append([scan.feats.grad, *[parameter.grad.clone() for parameter in model.parameters()]])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_norms_and_pools_see_sites_alone():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ts.nn.Conv3d(4, 8, 2, stride=2)
            self.norms = nn.Sequential(
                ts.nn.BatchNorm(8, momentum=None), ts.nn.InstanceNorm(8), ts.nn.GroupNorm(2, 8),
                ts.nn.BatchNorm(8, track_running_stats=False),
            )  # fmt: skip

        def forward(self, x):
            y = self.norms(self.conv(x))
            return {"mean": ts.nn.GlobalAvgPool()(y), "largest": ts.nn.GlobalMaxPool()(y), "sites": y}

    model = Pooled().to(DEVICE)
    other = copy.deepcopy(model)
    fast = ts.cuda_graph(model)
    for seed in (0, 1):
        found, wanted = fast(tensor(seed=seed)), other(tensor(seed=seed))
        same(found["sites"], wanted["sites"])
        torch.testing.assert_close(found["mean"], wanted["mean"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["largest"], wanted["largest"], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_results_stay_and_modes_are_told_apart():
    model = detector().eval()
    fast = ts.cuda_graph(model)
    first = fast(tensor())
    kept = first.feats.clone()
    fast(tensor(seed=1))
    assert torch.equal(first.feats, kept)
    kind = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16
    with torch.autocast(DEVICE.type, kind):
        assert fast(tensor()).feats.dtype == kind
    assert fast(tensor()).feats.dtype == torch.float32
    model.train()
    before = model[1].running_mean.clone()
    fast(tensor())
    assert not torch.equal(before, model[1].running_mean)


def test_bad_input():
    model = detector().eval()
    with pytest.raises(ValueError, match="slack"):
        ts.cuda_graph(model, slack=-1)
    scan = tensor()
    scan.spatial_range = None
    with pytest.raises(ValueError, match="spatial_range"):
        ts.cuda_graph(model)(scan)
    with pytest.raises(TypeError, match="SparseTensor"):
        ts.cuda_graph(model)(scan.feats)

    class Numbered(nn.Module):
        def forward(self, x):
            return x, 3

    with pytest.raises(TypeError, match="int"):
        ts.cuda_graph(Numbered())(tensor())

    class Loose(nn.Module):
        def forward(self, x):
            return x.feats * 2

    with pytest.raises(ValueError, match="SparseTensor of it"):
        ts.cuda_graph(Loose())(tensor())


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_what_waits_for_the_gpu_is_refused():
    model = nn.Sequential(ts.nn.Conv3d(4, 8, 3), ts.nn.ToBEVReduction(3)).to(DEVICE)
    with pytest.raises(ValueError, match="come after a graph"):
        ts.cuda_graph(model)(tensor())
    other = ts.nn.Conv3d(4, 8, 3, config=ts.ConvConfig(dataflow="gather_scatter")).to(DEVICE)
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        ts.cuda_graph(other)(tensor())
    assert torch.ones(1, device=DEVICE).item() == 1  # the device goes on
    assert torch.rand(1, device=DEVICE).item() < 1


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_older_graphs_are_not_freed_while_one_is_recorded():
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)  # collects all the time
    try:
        for _ in range(3):
            graph = ts.cuda_graph(ts.nn.Conv3d(4, 8, 3).to(DEVICE))
            graph.circle = graph
            assert graph(tensor()).feats.isfinite().all()
    finally:
        gc.set_threshold(*before)
