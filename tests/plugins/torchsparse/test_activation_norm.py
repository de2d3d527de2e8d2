"""Activations and normalisation against PyTorch's, sample by sample."""

import copy

import pytest
import torch
from torch.nn import functional

from pronghorn.torchsparse.nn.activation import LeakyReLU, ReLU, SiLU, fapply, leaky_relu, relu, silu
from pronghorn.torchsparse.nn.norm import BatchNorm, GroupNorm, InstanceNorm
from pronghorn.torchsparse.tensor import SparseTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SAMPLES = (7, 0, 1, 12)  # sites of each


def tensor(channels=6, samples=SAMPLES, dtype=torch.float64, spatial_range=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = torch.arange(len(samples)).repeat_interleave(torch.tensor(samples, dtype=torch.int64))
    batch = batch[torch.randperm(len(batch), generator=generator)]
    coords = torch.stack([batch, torch.arange(len(batch)), batch * 0, batch * 0], dim=1).int()
    feats = torch.randn(len(batch), channels, generator=generator, dtype=torch.float64) * 3 + 5
    return SparseTensor(feats.to(DEVICE, dtype), coords.to(DEVICE), spatial_range=spatial_range)


def each_sample(x, fn):
    """A function of [1, C, n] for each sample."""
    feats = torch.zeros_like(x.feats)
    for index in x.coords[:, 0].unique():
        rows = x.coords[:, 0] == index
        feats[rows] = fn(x.feats[rows].T[None])[0].T
    return feats


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (relu, functional.relu),
        (leaky_relu, lambda x: functional.leaky_relu(x, 0.1)),
        (lambda x: leaky_relu(x, 0.3), lambda x: functional.leaky_relu(x, 0.3)),
        (silu, functional.silu),
        (ReLU(), functional.relu),
        (LeakyReLU(), lambda x: functional.leaky_relu(x, 0.01)),
        (LeakyReLU(0.2), lambda x: functional.leaky_relu(x, 0.2)),
        (SiLU(), functional.silu),
    ],
)
def test_activations_keep_sites_and_cache(found, wanted):
    x = tensor(spatial_range=(4, 20, 1, 1))
    x.feats -= 5
    before = x.feats.clone()
    y = found(x)
    assert torch.equal(y.feats, wanted(before))
    assert torch.equal(x.feats, before)
    assert y.coords is x.coords
    assert y._caches is x._caches
    assert (y.stride, y.spatial_range) == (x.stride, x.spatial_range)


@pytest.mark.parametrize("layer", [ReLU(inplace=True), LeakyReLU(inplace=True), SiLU(inplace=True)])
def test_in_place(layer):
    x = tensor()
    assert layer(x).feats is x.feats


def test_fapply_passes_arguments_and_checks():
    x = tensor()
    assert torch.equal(fapply(x, torch.clamp, 1, max=2).feats, x.feats.clamp(1, 2))
    assert fapply(x, lambda feats: feats[:, :2]).feats.shape == (20, 2)
    with pytest.raises(TypeError, match="input: got Tensor, wanted a SparseTensor"):
        relu(x.feats)
    with pytest.raises(TypeError, match="fn: gave int"):
        fapply(x, len)
    with pytest.raises(ValueError, match=r"fn: gave \(19, 6\), wanted \[20, channels\]"):
        fapply(x, lambda feats: feats[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_batch_norm_is_torch(dtype):
    x = tensor(dtype=dtype)
    ours = BatchNorm(6).to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32)
    theirs = torch.nn.BatchNorm1d(6).to(DEVICE, ours.weight.dtype)
    theirs.load_state_dict(ours.state_dict())
    for mode in (True, True, False):
        assert torch.equal(ours.train(mode)(x).feats, theirs.train(mode)(x.feats))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.parametrize("samples", [(), (1,)])
def test_batch_norm_of_few_sites(samples):
    x, layer = tensor(samples=samples, dtype=torch.float32), BatchNorm(6).to(DEVICE)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=f"input: got {len(samples)} sites, wanted at least 2"):
        layer(x)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert layer.eval()(x).feats.shape == x.feats.shape
    with pytest.raises(ValueError, match="wanted at least 2"):
        BatchNorm(6, track_running_stats=False).to(DEVICE).eval()(x)


@pytest.mark.parametrize("spatial_range", [None, (5, 20, 1, 1)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_group_norm_is_torch_for_each_sample(dtype, groups, spatial_range):
    x = tensor(dtype=dtype, spatial_range=spatial_range)
    layer = GroupNorm(groups, 6).to(DEVICE, dtype)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    weight, bias = layer.weight.double(), layer.bias.double()
    exact = SparseTensor(x.feats.double(), x.coords)
    wanted = each_sample(exact, lambda feats: functional.group_norm(feats, groups, weight, bias, layer.eps))
    found = layer(x).feats
    assert found.dtype == dtype
    assert (found - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_is_torch_for_each_sample(affine):
    x = tensor(samples=(7, 0, 3, 12))
    ours = InstanceNorm(6, affine=affine).to(DEVICE, torch.float64)
    theirs = torch.nn.InstanceNorm1d(6, affine=affine).to(DEVICE, torch.float64)
    theirs.load_state_dict(ours.state_dict())
    assert (ours(x).feats - each_sample(x, theirs)).abs().max() <= 1e-12
    assert "6, eps=1e-05" in repr(ours)


def test_norms_of_a_single_value_and_of_none():
    assert not InstanceNorm(6).to(DEVICE)(tensor(samples=(1, 1))).feats.any()
    assert InstanceNorm(6).to(DEVICE)(tensor(samples=())).feats.shape == (0, 6)
    x = tensor(samples=(9,))
    assert torch.equal(GroupNorm(2, 6, affine=False)(x).feats, GroupNorm(2, 6).to(DEVICE)(x).feats)
    layer = GroupNorm(2, 6).to(DEVICE)
    layer.register_parameter("bias", None)  # as `bias=False` does, where torch has it
    assert layer(x).feats.isfinite().all()


def test_group_norm_of_large_means():
    x = tensor(samples=(500, 400), dtype=torch.float32)
    x.feats += 1000
    exact = SparseTensor(x.feats.double(), x.coords)
    wanted = each_sample(exact, lambda feats: functional.group_norm(feats, 2))
    assert (GroupNorm(2, 6, affine=False)(x).feats - wanted).abs().max() <= 1e-3


@pytest.mark.parametrize("layer", [BatchNorm(6), GroupNorm(3, 6), InstanceNorm(6, affine=True)])
def test_norm_gradients(layer):
    layer, x = copy.deepcopy(layer).to(DEVICE, torch.float64), tensor(samples=(4, 0, 3))
    feats = x.feats.requires_grad_()
    assert torch.autograd.gradcheck(lambda feats, *_: layer(x.replace(feats)).feats, (feats, *layer.parameters()))


@pytest.mark.parametrize("layer", [BatchNorm(6), GroupNorm(3, 6), InstanceNorm(6)])
def test_norms_check_their_input(layer):
    with pytest.raises(TypeError, match="input: got Tensor, wanted a SparseTensor"):
        layer(torch.zeros(4, 6))
    with pytest.raises((ValueError, RuntimeError)):
        layer.to(DEVICE)(tensor(channels=9, dtype=torch.float32))
