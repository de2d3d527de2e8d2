"""Sparse and point tensors: what they hold and share, and what they refuse."""

import copy
import io
import pickle
import pkgutil

import pytest
import torch
from torch.utils import _pytree

import pronghorn.torchsparse as ts
from pronghorn.torchsparse import nn as spnn
from pronghorn.torchsparse.config import ConvConfig
from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.tensor import (
    PointTensor,
    SparseTensor,
    clear_global_tensor_cache,
    get_tensor_cache_mode,
    set_tensor_cache_mode,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensor(sites=40, channels=3, ranged=False, dtype=torch.float32, stride=1):
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(2 * 6 * 5 * 7, generator=generator)[:sites]
    coords = torch.stack(torch.unravel_index(places, (2, 6, 5, 7)), dim=1).int().to(DEVICE)
    feats = torch.randn(sites, channels, generator=generator).to(DEVICE, dtype)
    return SparseTensor(feats, coords, stride, (2, 6, 5, 7) if ranged else None)


def sites(*rows):
    coords = torch.tensor(rows, dtype=torch.int32, device=DEVICE).view(len(rows), -1)
    return SparseTensor(torch.ones(len(rows), 1, device=DEVICE), coords)


@pytest.fixture
def one_cache():
    set_tensor_cache_mode(True)
    yield
    set_tensor_cache_mode(False)


def test_names_of_the_field():
    x = tensor(stride=2)
    assert x.F is x.feats
    assert x.C is x.coords
    assert x.s == x.stride == (2, 2, 2)
    x.F, x.s = x.F * 2, (1, 2, 3)
    assert torch.equal(x.feats, tensor().feats * 2)
    assert x.stride == (1, 2, 3)
    x.C = x.C.clone()
    assert "feats=(40, 3) torch.float32" in repr(x)


@pytest.mark.parametrize(
    ("feats", "coords", "error", "words"),
    [(torch.ones(3, 2).long(), torch.zeros(3, 4).int(), TypeError, "feats: got torch.int64 \\(3, 2\\)"),
     ([[1.0]], torch.zeros(1, 4).int(), TypeError, "feats: got list"),
     (torch.ones(3), torch.zeros(3, 4).int(), TypeError, "feats: got torch.float32 \\(3,\\)"),
     (torch.ones(3, 2), torch.zeros(3, 4), TypeError, "coords: got torch.float32 \\(3, 4\\), wanted an int32"),
     (torch.ones(3, 2), torch.zeros(3, 4).long(), TypeError, "coords: got torch.int64"),
     (torch.ones(3, 2), torch.zeros(3, 1).int(), ValueError, "coords: got 1 columns"),
     (torch.ones(3, 2), torch.zeros(3, 6).int(), ValueError, "coords: got 6 columns"),
     (torch.ones(2, 2), torch.zeros(3, 4).int(), ValueError, "feats: got 2 rows, coords have 3"),
     (torch.ones(3, 2, device="meta"), torch.zeros(3, 4).int(), ValueError, "feats: are on meta, coords on cpu")],
)  # fmt: skip
def test_parts_that_do_not_fit(feats, coords, error, words):
    with pytest.raises(error, match=words):
        SparseTensor(feats, coords)


def test_strides_and_ranges_that_do_not_fit():
    x = tensor()
    with pytest.raises(ValueError, match="spatial_range: got \\(6, 5, 7\\), wanted a batch size and 3 sizes"):
        SparseTensor(x.feats, x.coords, spatial_range=(6, 5, 7))
    with pytest.raises(ValueError, match="got 2 numbers, \\(2, 2\\), wanted one or 3"):
        SparseTensor(x.feats, x.coords, stride=(2, 2))


@pytest.mark.fault(27)
def test_sites_that_are_there_twice_are_found():
    x = sites((0, 1, 2, 3), (1, 1, 2, 3), (0, 1, 2, 3))
    with pytest.raises(ValueError, match="coords: 1 of 3 rows are there already"):
        x.check()
    assert tensor().check().feats.shape == (40, 3)


@pytest.mark.fault(27)
@pytest.mark.parametrize("config", [ConvConfig(), ConvConfig(ifsort=True)])
def test_of_sites_that_are_there_twice_the_last_is_found(config):
    layer = spnn.Conv3d(1, 1, 3, config=config).to(DEVICE)
    torch.nn.init.ones_(layer.kernel)
    layer.kernel.data[13] = 0  # only neighbours count
    coords = sites((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1)).coords
    x = SparseTensor(torch.tensor([[1.0], [2.0], [4.0]], device=DEVICE), coords)
    assert layer(x).feats.flatten().tolist() == [4.0, 4.0, 2.0]


def test_negative_coordinates_are_asked_for(monkeypatch):
    x = sites((0, 1, -2, 3), (0, 1, -1, 3))
    for function in (x.check, x.bounds, lambda: spnn.Conv3d(1, 1, 3).to(DEVICE)(x)):
        with pytest.raises(ValueError, match="coords: the least are \\[0, 1, -2, 3\\]; negative ones are taken after"):
            function()
    monkeypatch.setattr(settings, "allow_negative_coordinates", True)
    x.check()
    assert x.bounds().tolist() == [[0, 1, -2, 3], [0, 1, -1, 3]]
    assert spnn.Conv3d(1, 1, 3, 2, 1).to(DEVICE)(x).coords[:, 2].tolist() == [-1]


@pytest.mark.fault(27)
def test_batch_indices_out_of_range():
    x = sites((-1, 1, 2, 3), (0, 1, 2, 3))
    with pytest.raises(ValueError, match="coords: a batch index is -1; the first column is the batch index"):
        x.check()
    with pytest.raises(ValueError, match="coords: a batch index is -1"):
        spnn.Conv3d(1, 1, 3).to(DEVICE)(x)
    last = sites((0, 1, 2, 3), (2, 1, 2, 3))
    ranged = SparseTensor(last.feats, last.coords, spatial_range=(2, 6, 5, 7))
    for function in (ranged.check, ranged.dense):
        with pytest.raises(ValueError, match=r"coords: \[0, 1, 2, 3\] to \[2, 1, 2, 3\] are not within spatial_range"):
            function()


def test_a_grid_of_too_many_places_is_refused():
    far = (1 << 31) - 1
    with pytest.raises(ValueError, match="bounds"):
        spnn.Conv3d(1, 1, 3).to(DEVICE)(sites((0, 0, 0, 0), (0, far, far, far)))
    with pytest.raises(ValueError, match="table: a grid of 4611686018427387904 places was asked for"):
        spnn.Conv3d(1, 1, 3, config=ConvConfig(kmap_mode="grid")).to(DEVICE)(sites((0, 0, 0, 0), (0, far, 0, far)))


def test_dtypes_devices_and_channels_of_layers():
    x = tensor()
    with pytest.raises(TypeError, match=r"weight: got torch\.float64, the input is torch\.float32"):
        spnn.Conv3d(3, 4, 3).double().to(DEVICE)(x)
    with pytest.raises(ValueError, match=r"weight: got \(27, 5, 4\), wanted \[27, 3, output channels\]"):
        spnn.Conv3d(5, 4, 3).to(DEVICE)(x)
    with pytest.raises(ValueError, match=f"weight: is on meta, the input on {DEVICE}"):
        spnn.Conv3d(3, 4, 3).to("meta")(x)


def test_ways_back_that_are_not_there():
    x = tensor(ranged=True)
    y = spnn.Conv3d(3, 4, 3, 2, 1).to(DEVICE)(x)
    for size, stride in ((2, 2), (3, 1)):
        with pytest.raises(ValueError, match="transposed: no convolution of kernel size"):
            spnn.Conv3d(4, 3, size, stride, transposed=True).to(DEVICE)(y)
    with pytest.raises(ValueError, match="there are maps of none"):
        spnn.Conv3d(3, 3, 2, 2, transposed=True).to(DEVICE)(tensor())
    # The same stride, but other sites than those that the map has.
    other = SparseTensor(y.feats[1:], y.coords[1:], y.stride, y.spatial_range)
    other._caches = y._caches
    with pytest.raises(ValueError, match="transposed: no convolution"):
        spnn.Conv3d(4, 3, 3, 2, 1, transposed=True).to(DEVICE)(other)
    with pytest.raises(ValueError, match="generative: needs a tensor with a spatial_range"):
        spnn.Conv3d(3, 3, 2, 2, generative=True).to(DEVICE)(tensor())


def test_two_ways_back_are_told_apart_by_padding():
    x = tensor(ranged=True)
    y = spnn.Conv3d(3, 4, 3, 2, 1).to(DEVICE)(x)
    spnn.Conv3d(3, 4, 3, 2, 0).to(DEVICE)(x)
    assert spnn.Conv3d(4, 3, 3, 2, 1, transposed=True).to(DEVICE)(y).coords is x.coords
    assert spnn.Conv3d(4, 3, 3, 2, 0, transposed=True).to(DEVICE)(y).coords is x.coords  # y's is the only one that fits


def test_layers_share_maps_but_not_of_other_knobs():
    x, counts = tensor(), []
    for size, stride, padding, config in (
        (3, 1, 0, None), (3, 1, 1, None), (5, 1, 0, None), (3, 2, 1, None), (3, 2, 0, None), (3, 2, 0, None),
        (3, 2, 0, ConvConfig(kmap_mode="hashmap")),
    ):  # fmt: skip
        spnn.Conv3d(3, 3, size, stride, padding, config=config).to(DEVICE)(x)
        counts.append(len(x._caches.kmaps))
    assert counts == [1, 1, 2, 3, 4, 4, 5]
    spnn.Conv3d(3, 3, 3, dilation=2).to(DEVICE)(x)
    assert len(x._caches.kmaps) == 6


def test_a_map_of_other_sites_is_not_used():
    x, layer = tensor(), spnn.Conv3d(3, 4, 3).to(DEVICE)
    layer(x)
    x.coords = x.coords.flip(0).contiguous()
    wanted = layer(SparseTensor(x.feats, x.coords)).feats
    assert torch.equal(layer(x).feats, wanted)


def test_one_cache_for_all(one_cache):
    layer = spnn.Conv3d(3, 4, 3).to(DEVICE)
    assert ts.get_tensor_cache_mode()
    x, y = tensor(), tensor(sites=30)
    assert x._caches is y._caches
    wanted = layer(y).feats
    layer(x)  # the other one's map is in its place now
    assert torch.equal(layer(y).feats, wanted)
    clear_global_tensor_cache()
    z = tensor()
    assert z._caches is not x._caches
    assert not z._caches.kmaps
    set_tensor_cache_mode(False)
    assert not get_tensor_cache_mode()
    clear_global_tensor_cache()
    assert tensor()._caches is not tensor()._caches


@pytest.mark.fault(27)
@pytest.mark.parametrize("stride", [1, 2])
def test_no_sites(stride):
    x = SparseTensor(torch.ones(0, 3, device=DEVICE), torch.zeros(0, 4, dtype=torch.int32, device=DEVICE))
    assert x.check() is x
    y = spnn.Conv3d(3, 4, 3, stride, 1).to(DEVICE)(x)
    assert y.feats.shape == (0, 4)
    assert y.coords.shape == (0, 4)
    ranged = SparseTensor(x.feats, x.coords, spatial_range=(2, 3, 4, 5))
    assert not ranged.dense().any()
    assert ranged.dense().shape == (2, 3, 4, 5, 3)
    back = spnn.Conv3d(4, 3, 3, 2, transposed=True).to(DEVICE)
    assert back(spnn.Conv3d(3, 4, 3, 2).to(DEVICE)(ranged)).feats.shape == (0, 3)


def test_dense_grids():
    x = tensor(ranged=True)
    grid = x.dense()
    assert grid.shape == (2, 6, 5, 7, 3)
    assert torch.equal(grid[tuple(x.coords.long().T)], x.feats)
    assert int((grid != 0).any(-1).sum()) == 40
    x.feats.requires_grad_()
    x.dense().sum().backward()
    assert torch.equal(x.feats.grad, torch.ones_like(x.feats))
    with pytest.raises(ValueError, match="spatial_range: dense\\(\\) needs one"):
        tensor().dense()


def test_bounds():
    x = tensor()
    assert torch.equal(x.bounds()[1], x.coords.amax(0).long().cpu())
    assert x.bounds() is x.bounds()
    assert tensor(ranged=True).bounds().tolist() == [[0, 0, 0, 0], [1, 5, 4, 6]]
    assert sites((0, 1), (0, 4)).bounds().tolist() == [[0, 1], [0, 4]]


def test_sums():
    x = tensor()
    y = x + x.replace(x.feats * 2)
    assert torch.equal(y.feats, x.feats * 3)
    assert y._caches is x._caches
    with pytest.raises(ValueError, match=r"\+: features \(40, 3\) at stride \(1, 1, 1\) and \(39, 3\)"):
        x + tensor(sites=39)
    with pytest.raises(TypeError):
        x + 1
    points = PointTensor(x.feats, x.coords)
    with pytest.raises(TypeError):
        points + x


def test_methods_change_it_and_give_it_back():
    x = tensor()
    assert x.half() is x
    assert x.feats.dtype == torch.float16
    x.feats.requires_grad_()
    assert not x.detach().feats.requires_grad
    coords = x.coords
    assert x.to(DEVICE) is x
    assert x.coords is coords  # and what is known of them stays
    assert x.cpu().coords.device.type == "cpu"
    assert x._caches.cmaps[x.stride][0] is x.coords
    moved = tensor().to("meta")
    assert moved.feats.device.type == moved.coords.device.type == "meta"
    assert not moved._caches.kmaps


def test_trees():
    x = tensor(ranged=True, stride=2)
    leaves, spec = _pytree.tree_flatten({"x": [x, 1]})
    assert len(leaves) == 3
    y = _pytree.tree_unflatten(leaves, spec)["x"][0]
    assert y.feats is x.feats
    assert (y.stride, y.spatial_range) == (x.stride, x.spatial_range)
    assert y.check().dense().equal(x.dense())
    doubled = _pytree.tree_map(lambda leaf: leaf * 2, x)
    assert torch.equal(doubled.feats, x.feats * 2)
    # Parts may be anything.
    assert _pytree.tree_map(lambda leaf: None, x).feats is None
    again = _pytree.treespec_loads(_pytree.treespec_dumps(_pytree.tree_structure(x)))
    assert again == _pytree.tree_structure(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_copies(copied):
    x = tensor(ranged=True)
    down, up = spnn.Conv3d(3, 4, 3, 2, 1).to(DEVICE), spnn.Conv3d(4, 3, 3, 2, 1, transposed=True).to(DEVICE)
    y = down(x)
    z = copied(y.detach())
    assert (z.stride, z.spatial_range) == (y.stride, y.spatial_range)
    assert torch.equal(z.feats, y.feats)
    assert torch.equal(up(z).feats, up(y).feats)  # a copy knows the way back, too


def test_files(tmp_path):
    x = tensor()
    buffer = io.BytesIO()
    torch.save({"feats": x.feats, "coords": x.coords}, buffer)
    buffer.seek(0)
    again = SparseTensor(**torch.load(buffer, weights_only=True))
    assert torch.equal(again.feats, x.feats)


def test_coordinates_need_not_be_contiguous():
    x, layer = tensor(ranged=True), spnn.Conv3d(3, 4, 3).to(DEVICE)
    down = spnn.Conv3d(3, 4, 3, 2, 1).to(DEVICE)
    scattered = SparseTensor(x.feats, x.coords.T.contiguous().T, spatial_range=x.spatial_range)
    wide = SparseTensor(x.feats.repeat(1, 2)[:, ::2].contiguous(), x.coords, spatial_range=x.spatial_range)
    assert torch.equal(layer(scattered).feats, layer(x).feats)
    assert torch.equal(down(scattered).feats, down(x).feats)
    assert layer(SparseTensor(x.feats.T.contiguous().T, x.coords)).feats.allclose(layer(x).feats, atol=1e-6)
    assert wide.feats.shape == x.feats.shape


def test_points():
    feats, coords = torch.randn(5, 3), torch.rand(5, 4)
    x = PointTensor(feats, coords)
    assert x.idx_query == {}
    assert x.weights == {}
    assert x.additional_features == {"idx_query": {}, "counts": {}}
    x.idx_query[1, 1, 1] = torch.zeros(5, 8).long()
    y = x + PointTensor(feats, coords)
    assert torch.equal(y.F, feats * 2)
    assert y.idx_query is x.idx_query
    assert y.to("meta").F.device.type == "meta"
    assert x.idx_query[1, 1, 1].device.type == "meta"  # which they share
    x.F = feats.requires_grad_()
    assert not x.detach().F.requires_grad
    with pytest.raises(ValueError, match=r"feats, coords: got \(5, 3\) and \(4, 4\), wanted as many rows of each"):
        PointTensor(feats, coords[:4])


def test_no_module_hides_what_the_package_gives():
    modules = {module.name for module in pkgutil.iter_modules(ts.__path__)}
    assert {name for name in ts.__all__ if name in modules} == {"backbones", "convert", "nn"}


def test_all_rows_of_a_tensor_by_itself_are_sites():
    x = SparseTensor(torch.zeros(3, 1), torch.arange(12).view(3, 4).int())
    assert not x.filled_up
    assert x.count().tolist() == [3]
