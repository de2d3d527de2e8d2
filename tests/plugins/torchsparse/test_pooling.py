"""Pooling of whole samples against loops over them, and against dense grids."""

import pytest
import torch

from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.nn.pooling import GlobalAvgPool, GlobalMaxPool, global_avg_pool, global_max_pool
from pronghorn.torchsparse.tensor import SparseTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = [(global_avg_pool, torch.mean), (global_max_pool, torch.amax)]


def tensor(batch=(0, 3, 0, 1, 3, 3, 0), channels=5, spatial_range=None, dtype=torch.float64):
    batch = torch.tensor(batch, dtype=torch.int32)
    coords = torch.stack([batch, torch.arange(len(batch)).int(), batch, batch], dim=1)
    feats = torch.randn(len(batch), channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 3
    return SparseTensor(feats.to(DEVICE, dtype), coords.to(DEVICE), spatial_range=spatial_range)


def looped(x, reduce, batch):
    found = x.feats.new_zeros(batch, x.feats.shape[1])
    for index in x.coords[:, 0].unique():
        found[index] = reduce(x.feats[x.coords[:, 0] == index], 0)
    return found


@pytest.mark.parametrize(("spatial_range", "batch"), [(None, 4), ((6, 7, 4, 4), 6)])
@pytest.mark.parametrize(("pool", "reduce"), BOTH)
def test_pools_each_sample(pool, reduce, spatial_range, batch):
    x = tensor(spatial_range=spatial_range)
    found = pool(x)
    assert found.shape == (batch, 5)
    assert (found - looped(x, reduce, batch)).abs().max() <= 1e-14
    assert not found[2].any()


@pytest.mark.parametrize(("pool", "reduce"), BOTH)
def test_a_full_grid_is_dense_pooling(pool, reduce):
    coords = torch.cartesian_prod(*map(torch.arange, (2, 3, 4, 2))).int().to(DEVICE)
    x = SparseTensor(torch.randn(48, 5, device=DEVICE, dtype=torch.float64), coords, spatial_range=(2, 3, 4, 2))
    assert (pool(x) - reduce(x.dense(), (1, 2, 3))).abs().max() <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_means_are_summed_in_float32(dtype):
    x = tensor(batch=(0,) * 5000, dtype=dtype)
    wanted = x.feats.double().mean(0).to(dtype)
    assert global_avg_pool(x).dtype == global_max_pool(x).dtype == dtype
    assert (global_avg_pool(x)[0] - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()
    assert torch.equal(global_max_pool(x)[0], x.feats.amax(0))


@pytest.mark.parametrize("pool", [global_avg_pool, global_max_pool])
def test_gradients(pool):
    x = tensor()
    assert torch.autograd.gradcheck(lambda feats: pool(x.replace(feats)), x.feats.requires_grad_())


@pytest.mark.parametrize("layer", [GlobalAvgPool(), GlobalMaxPool()])
def test_modules_and_edges(layer):
    assert torch.equal(layer(tensor()), (global_avg_pool if "Avg" in repr(layer) else global_max_pool)(tensor()))
    assert layer(tensor(batch=())).shape == (0, 5)
    assert torch.equal(layer(tensor(batch=(), spatial_range=(2, 1, 1, 1))).cpu(), torch.zeros(2, 5).double())
    with pytest.raises(TypeError, match="input: got Tensor, wanted a SparseTensor"):
        layer(torch.zeros(2, 5))


def test_not_a_number_stays_in_its_sample():
    x = tensor()
    x.feats[0] = torch.nan
    for pool in (global_avg_pool, global_max_pool):
        found = pool(x)
        assert found[0].isnan().all()
        assert found[1:].isfinite().all()


def test_deterministic_sums_are_the_same(monkeypatch):
    wanted = global_avg_pool(tensor())
    monkeypatch.setattr(settings, "deterministic", True)
    assert (global_avg_pool(tensor()) - wanted).abs().max() <= 1e-14
