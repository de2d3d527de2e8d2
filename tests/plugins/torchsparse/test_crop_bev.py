"""Crops, and maps seen from above, against the same on dense grids."""

import pytest
import torch
from torch.nn import functional

from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.nn.bev import (
    ToBEVConvolution,
    ToBEVHeightCompression,
    ToBEVReduction,
    ToDenseBEVConvolution,
)
from pronghorn.torchsparse.nn.crop import SparseCrop, spcrop
from pronghorn.torchsparse.tensor import SparseTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANGE = (2, 4, 5, 3)
DIMS = (1, 2, 3)


def tensor(channels=6, spatial_range=RANGE, rows=50, sizes=RANGE, dtype=torch.float64, shift=0, stride=1):
    generator = torch.Generator().manual_seed(3)
    places = torch.cartesian_prod(*map(torch.arange, sizes)).int()
    coords = places[torch.randperm(len(places), generator=generator)[:rows]]
    coords[:, 1:] += shift
    feats = torch.randn(len(coords), channels, generator=generator, dtype=torch.float64)
    return SparseTensor(feats.to(DEVICE, dtype), coords.to(DEVICE), stride, spatial_range)


def by_height(dense, dim):
    """[batch, heights, *others, channels] of [batch, X, Y, Z, channels]."""
    return dense.movedim(dim, 1)


def sites(x):
    return {tuple(place): row for place, row in zip(x.coords.tolist(), x.feats.tolist(), strict=True)}


def test_crop_keeps_what_is_inside_and_forgets_maps():
    x = tensor(stride=2)
    found = spcrop(x, (1, 0, 1), (3, 4, 3))
    wanted = {k: row for k, row in sites(x).items() if 1 <= k[1] < 3 and 0 <= k[2] < 4 and 1 <= k[3] < 3}
    assert sites(found) == wanted
    assert list(sites(found)) == [place for place in sites(x) if place in wanted]
    assert (found.stride, found.spatial_range) == (x.stride, x.spatial_range)
    assert found._caches is not x._caches


@pytest.mark.parametrize(
    ("low", "high"), [(None, None), ((1, None, None), None), (None, (None, 2, 2)), ([0, 4, None], [None, 5, 1])]
)
def test_bounds_may_be_left_out(low, high):
    def inside(place):
        bounds = zip(place[1:], low or (None,) * 3, high or (None,) * 3, strict=True)
        return all((least is None or at >= least) and (end is None or at < end) for at, least, end in bounds)

    x = tensor()
    assert set(sites(SparseCrop(low, high)(x))) == {place for place in sites(x) if inside(place)}


def test_crop_leaves_nothing_and_is_differentiable():
    x = tensor()
    assert spcrop(x, (9, 9, 9)).feats.shape == (0, 6)
    assert torch.autograd.gradcheck(lambda feats: spcrop(x.replace(feats), (1, 1, 0)).feats, x.feats.requires_grad_())


@pytest.mark.parametrize(
    ("low", "high", "error", "message"),
    [
        ((1, 2), None, ValueError, r"coords_min: got \(1, 2\), wanted 3 numbers"),
        (None, (0, 1, 2, 3), ValueError, "coords_max: .* none for the batch index"),
        ((1.5, 0, 0), None, TypeError, "coords_min: .* wanted an integer or None"),
        (3, None, TypeError, "coords_min: got 3"),
        ((0, 3, 0), (1, 3, 9), ValueError, "coords_max: .* wanted more than coords_min"),
    ],
)
def test_crop_refuses(low, high, error, message):
    with pytest.raises(error, match=message):
        spcrop(tensor(), low, high)
    with pytest.raises(TypeError, match="input: got Tensor"):
        spcrop(torch.zeros(2, 2))


@pytest.mark.parametrize("spatial_range", [RANGE, None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dim", DIMS)
def test_reduction(dim, reduction, spatial_range):
    x = tensor(spatial_range=spatial_range)
    y = ToBEVReduction(dim, reduction)(x)
    assert not y.coords[:, dim].any()
    assert y.coords.tolist() == sorted(y.coords.tolist())
    assert y.spatial_range == (None if spatial_range is None else (*RANGE[:dim], 1, *RANGE[dim + 1 :]))
    x.spatial_range = RANGE
    y.spatial_range = (*RANGE[:dim], 1, *RANGE[dim + 1 :])
    wanted = x.dense().sum(dim)
    if reduction == "mean":
        counts = SparseTensor(torch.ones_like(x.feats[:, :1]), x.coords, 1, RANGE).dense().sum(dim)
        wanted = wanted / counts.clamp(min=1)
    assert (y.dense().squeeze(dim) - wanted).abs().max() <= 1e-14


@pytest.mark.parametrize("offset", [0, (-1, 2, 3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_dense_convolution_is_conv3d_over_the_whole_height(dim, bias, offset, monkeypatch):
    monkeypatch.setattr(settings, "allow_negative_coordinates", True)
    x = tensor(rows=120)  # everywhere, so that conv3d's bias is that of each site
    layer = ToDenseBEVConvolution(6, 4, RANGE[1:], offset, dim=dim, bias=bias).to(DEVICE, torch.float64)
    if bias:
        torch.nn.init.normal_(layer.bias)
    weight = layer.kernel.permute(2, 1, 0)[..., None, None]  # [Cout, Cin, heights, 1, 1]
    wanted = functional.conv3d(by_height(x.dense(), dim).movedim(-1, 1), weight).squeeze(2)
    wanted = wanted + (RANGE[dim] * layer.bias[0][:, None, None] if bias else 0)
    moved = x.coords.clone()
    moved[:, 1:] += torch.tensor(layer.offset, device=DEVICE)
    found = layer(SparseTensor(x.feats, moved))
    assert found.is_contiguous()
    assert (found - wanted).abs().max() <= 1e-13


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_sparse_convolution_is_the_dense_one(dim, bias):
    x = tensor(stride=(1, 2, 3))
    layer = ToBEVConvolution(6, 4, RANGE[dim], dim=dim, bias=bias).to(DEVICE, torch.float64)
    dense = ToDenseBEVConvolution(6, 4, RANGE[1:], dim=dim, bias=bias).to(DEVICE, torch.float64)
    dense.load_state_dict(layer.state_dict())
    y = layer(x)
    assert y.stride == x.stride
    assert (y.dense().squeeze(dim).movedim(-1, 1) - dense(x)).abs().max() <= 1e-14


@pytest.mark.parametrize("spatial_range", [RANGE, None])
def test_a_coarser_sparse_map(spatial_range):
    x = tensor(spatial_range=spatial_range, shift=0 if spatial_range else 1, stride=2)
    layer = ToBEVConvolution(6, 4, 5, stride=2, dim=3).to(DEVICE, torch.float64)
    y = layer(x)
    wanted = {}
    for (batch, *place), row in sites(x).items():
        key = (batch, place[0] // 2, place[1] // 2, 0)
        product = torch.tensor(row, dtype=torch.float64) @ layer.kernel[place[2]].detach().cpu()
        wanted[key] = wanted.get(key, 0) + product
    assert list(sites(y)) == sorted(wanted)
    assert (y.feats.cpu() - torch.stack([wanted[key] for key in sorted(wanted)])).abs().max() <= 1e-13
    assert y.stride == (4, 4, 4)
    assert y.spatial_range == (None if spatial_range is None else (2, 2, 3, 1))


@pytest.mark.parametrize("dim", DIMS)
def test_height_compression_is_dense(dim):
    x = tensor(dtype=torch.float32)
    found = ToBEVHeightCompression(6, torch.tensor(RANGE[1:]), dim=dim)(x)
    wanted = by_height(x.dense(), dim).permute(0, 1, 4, 2, 3).flatten(1, 2)
    assert found.is_contiguous()
    assert torch.equal(found, wanted)


def test_two_dimensions():
    x = tensor(sizes=(2, 4, 5), spatial_range=(2, 4, 5), rows=30)
    assert torch.equal(ToBEVHeightCompression(6, (4, 5), dim=1)(x), x.dense().permute(0, 1, 3, 2).flatten(1, 2))


@pytest.mark.parametrize(
    "layer",
    [
        ToBEVReduction(2),
        ToBEVReduction(2, "sum"),
        ToDenseBEVConvolution(6, 4, RANGE[1:], dim=2, bias=True),
        ToBEVConvolution(6, 4, 5, stride=2, dim=2, bias=True),
        ToBEVHeightCompression(6, RANGE[1:], dim=2),
    ],
)
def test_gradients_empty_input_and_half(layer):
    layer, x = layer.to(DEVICE, torch.float64), tensor(rows=12)

    def values(feats, *_):
        found = layer(x.replace(feats))
        return found.feats if isinstance(found, SparseTensor) else found

    assert torch.autograd.gradcheck(values, (x.feats.requires_grad_(), *layer.parameters()))
    empty = layer(tensor(rows=0))
    if isinstance(empty, SparseTensor):
        assert len(empty.feats) == 0
    else:
        assert empty.shape[0] == 2
        assert not empty.any()
    half = values(x.feats.half()) if not list(layer.parameters()) else None
    assert half is None or half.dtype == torch.float16
    with pytest.raises(TypeError, match="input: got Tensor, wanted a SparseTensor"):
        layer(torch.zeros(2, 2))
    layer.to(torch.float32)


def test_weights_are_drawn_as_officially():
    layer = ToDenseBEVConvolution(25, 4, (3, 4, 5), dim=3, bias=True)
    assert layer.kernel.shape == (5, 25, 4)
    assert 0.15 < layer.kernel.abs().max() <= 1 / 5
    assert not layer.bias.any()
    assert "25, 4, n_kernels=5, dim=3" in repr(layer)
    assert "stride=2" in repr(ToBEVConvolution(2, 3, 4, 2, dim=1))
    assert "bias=False" in repr(ToBEVConvolution(2, 3, 4, 2, dim=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ToBEVReduction(0), "dim: got 0, wanted a column"),
        (lambda: ToBEVReduction(1, "max"), "reduction: got 'max', accepted are mean, sum"),
        (lambda: ToBEVConvolution(0, 4, 5, dim=1), "in_channels: got 0"),
        (lambda: ToBEVConvolution(1, 4, 5, 0, dim=1), "stride: got 0"),
        (lambda: ToDenseBEVConvolution(1, 1, (3, 4, 0), dim=1), r"shape: got \(3, 4, 0\)"),
        (lambda: ToDenseBEVConvolution(1, 1, (3, 4), dim=3), "dim: got 3, wanted 1 to 2"),
        (lambda: ToBEVHeightCompression(1, (3, 4, 5), (1, 2), dim=3), "got 2 numbers"),
        (lambda: ToBEVReduction(3)(tensor(sizes=(2, 3, 4), spatial_range=None, rows=9)), "wanted column 3"),
        (lambda: ToBEVHeightCompression(5, RANGE[1:], dim=3)(tensor()), "got 6 channels, wanted 5"),
        (lambda: ToBEVHeightCompression(6, (4, 5), dim=1)(tensor()), "got coords of 4 columns, wanted 3"),
        (lambda: ToBEVHeightCompression(6, (4, 5, 2), dim=3)(tensor()), r"are not within shape \(4, 5, 2\)"),
        (lambda: ToBEVHeightCompression(6, (4, 5, 3), 1, dim=3)(tensor()), "from offset"),
        (lambda: ToDenseBEVConvolution(6, 1, (3, 5, 3), dim=3)(tensor(spatial_range=None)), "are not within shape"),
        (lambda: ToBEVHeightCompression(6, (4, 5, 3), dim=3)(tensor(spatial_range=(1, 4, 5, 3))), "and 1 samples"),
        (lambda: ToBEVConvolution(6, 1, 2, dim=3)(tensor()), "heights are 0 to 2 in column 3, wanted 0 to 1"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
