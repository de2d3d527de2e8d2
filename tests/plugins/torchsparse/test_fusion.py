"""A fused model computes what the model does, and comes back as it was."""

import pytest
import torch
from torch import nn

import pronghorn.torchsparse as ts
from pronghorn.torchsparse.fusion import FusedConvolution, FusedResBlock


def tensor(dtype=torch.float32, channels=4):
    generator = torch.Generator().manual_seed(0)
    coords = torch.randint(0, 9, (300, 4), generator=generator).unique(dim=0)
    coords[:, 0] %= 2
    coords = coords.unique(dim=0).int()
    return ts.SparseTensor(torch.randn(len(coords), channels, generator=generator).to(dtype), coords)


def lively(model):
    """Batch norms with statistics of their own."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, ts.nn.BatchNorm):
            for name, low in (("running_mean", -0.5), ("running_var", 0.5), ("weight", 0.5), ("bias", -0.5)):
                value = getattr(module, name)
                value.data.copy_(low + torch.rand(value.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("backbone", ["SparseResNet21D", "SparseResUNet42"])
@pytest.mark.parametrize("dataflow", ["implicit_gemm", "gather_scatter"])
@torch.no_grad()
def test_a_backbone_computes_the_same(backbone, dataflow):
    model = lively(getattr(ts.backbones, backbone)(width_multiplier=0.25))
    for module in model.modules():
        if isinstance(module, ts.nn.Conv3d):
            module.config = ts.ConvConfig(dataflow=dataflow)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = model(tensor())
    with ts.fuse(model):
        found = model(tensor())
        kinds = [type(module) for module in model.modules()]
        assert FusedConvolution in kinds
        assert FusedResBlock in kinds
        assert ts.nn.BatchNorm not in kinds
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.coords, theirs.coords)
        torch.testing.assert_close(ours.feats, theirs.feats, rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(a.feats, b.feats) for a, b in zip(model(tensor()), wanted, strict=True))


@torch.no_grad()
def test_biases_norms_and_relus_in_any_combination():
    model = lively(nn.Sequential(
        nn.Sequential(ts.nn.Conv3d(4, 5, 3, bias=True), ts.nn.BatchNorm(5)),
        nn.Sequential(ts.nn.Conv3d(5, 6, 3, stride=2, bias=True), ts.nn.ReLU()),
        nn.Sequential(ts.nn.Conv3d(6, 5, 1, bias=True), ts.nn.BatchNorm(5), ts.nn.ReLU(), ts.nn.Conv3d(5, 3, 3)),
        nn.Sequential(ts.nn.Conv3d(3, 2, 3, stride=2, transposed=True), ts.nn.SiLU(), ts.nn.BatchNorm(2)),
    ))  # fmt: skip
    wanted = model(tensor())
    with ts.fuse(model):
        found = model(tensor())
    torch.testing.assert_close(found.feats, wanted.feats, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_fused_is_said():
    with pytest.raises(ValueError, match="training mode"):
        ts.fuse(ts.backbones.SparseResNet21D(width_multiplier=0.25))
    with pytest.raises(ValueError, match="nothing to fuse"):
        ts.fuse(nn.Sequential(ts.nn.Conv3d(4, 4, 3)).eval())
    model = lively(ts.backbones.SparseResNet21D(width_multiplier=0.25))
    with ts.fuse(model), pytest.raises(RuntimeError, match="epilogue"):
        model(tensor())


@torch.no_grad()
def test_autocast_keeps_the_epilogue():
    model = lively(nn.Sequential(nn.Sequential(ts.nn.Conv3d(4, 5, 3), ts.nn.BatchNorm(5), ts.nn.ReLU())))
    wanted = model(tensor())
    with ts.fuse(model), torch.autocast("cpu", torch.bfloat16):
        found = model(tensor())
    assert found.feats.dtype == torch.bfloat16
    torch.testing.assert_close(found.feats.float(), wanted.feats, rtol=3e-2, atol=3e-2)
