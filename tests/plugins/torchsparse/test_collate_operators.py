"""Batches of samples, dense grids, and tensors joined, against dictionaries in Python."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pronghorn.torchsparse.collate import sparse_collate, sparse_collate_fn, to_dense
from pronghorn.torchsparse.operators import cat, generative_add
from pronghorn.torchsparse.tensor import SparseTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (3, 4, 5)


def sample(rows=6, seed=0, batch=1, channels=2, spatial_range=None, stride=1, device=DEVICE, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    places = torch.cartesian_prod(*map(torch.arange, (batch, *SIZES))).int()
    coords = places[torch.randperm(len(places), generator=generator)[:rows]]
    feats = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    return SparseTensor(feats.to(device, dtype), coords.to(device), stride, spatial_range)


def table(*tensors):
    found = {}
    for x in tensors:
        for place, row in zip(x.coords.tolist(), x.feats.tolist(), strict=True):
            found[tuple(place)] = [a + b for a, b in zip(row, found.get(tuple(place), [0] * len(row)), strict=True)]
    return found


@pytest.mark.parametrize("given", [None, (1, *SIZES)])
def test_collate_numbers_samples(given):
    samples = [sample(rows, seed=rows, spatial_range=given, stride=2) for rows in (4, 0, 7)]
    x = sparse_collate(samples)
    assert x.spatial_range == (None if given is None else (3, *SIZES))
    assert x.stride == (2, 2, 2)
    assert x.coords.dtype == torch.int32
    assert x.coords[:, 0].tolist() == [0] * 4 + [2] * 7
    assert torch.equal(x.coords[:, 1:], torch.cat([one.coords[:, 1:] for one in samples]))
    assert torch.equal(x.feats, torch.cat([one.feats for one in samples]))
    assert all(not one.coords[:, 0].any() for one in samples)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"stride": 2}, r"inputs\[1\]: got stride \(2, 2, 2\), wanted \(1, 1, 1\)"),
        ({"channels": 3}, "got channels 3, wanted 2"),
        ({"dtype": torch.float32}, "got dtype torch.float32"),
        ({"spatial_range": (1, 3, 4, 6)}, "got spatial_range"),
        ({"batch": 3, "rows": 40}, "batch column, the first one of coords, is not all zeros"),
    ],
)
def test_collate_refuses(other, message):
    with pytest.raises(ValueError, match=message):
        sparse_collate([sample(), sample(**other)])


def test_collate_refuses_more():
    with pytest.raises(ValueError, match="inputs: got none"):
        sparse_collate([])
    with pytest.raises(TypeError, match=r"inputs\[1\]: got Tensor, wanted a SparseTensor"):
        sparse_collate([sample(), torch.zeros(2)])
    with pytest.raises(ValueError, match="wanted a batch size of 1"):
        sparse_collate([sample(spatial_range=(2, *SIZES))])


def test_collate_fn_takes_each_kind_in_its_way():
    samples = [
        {
            "x": sample(4 + i, seed=i),
            "label": i,
            "tensor": torch.full((2,), i),
            "array": np.full((2, 3), i, dtype=np.float32),
            "deep": {"x": sample(2, seed=i), "name": f"scan {i}"},
        }
        for i in range(3)
    ]
    found = sparse_collate_fn(samples)
    assert list(found) == list(samples[0])
    assert found["x"].coords[:, 0].tolist() == [0] * 4 + [1] * 5 + [2] * 6
    assert found["label"] == [0, 1, 2]
    assert found["tensor"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert found["array"].shape == (3, 2, 3)
    assert found["array"].dtype == torch.float32
    assert found["deep"]["name"] == ["scan 0", "scan 1", "scan 2"]
    assert len(found["deep"]["x"].feats) == 6


def test_collate_fn_without_dictionaries():
    assert sparse_collate_fn([sample(), sample()]).feats.shape == (12, 2)
    assert sparse_collate_fn([torch.zeros(3), torch.ones(3)]).shape == (2, 3)
    assert sparse_collate_fn(("a", "b")) == ["a", "b"]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([], ValueError, "inputs: got none"),
        ([{"a": 1}, {"b": 1}], ValueError, "inputs: got keys"),
        ([{"a": {"b": torch.zeros(2)}}, {"a": {"b": torch.zeros(3)}}], ValueError, r"inputs\['a'\]\['b'\]: got shapes"),
        ([{"a": torch.zeros(2)}, {"a": 3}], TypeError, r"inputs\['a'\]: got a int among Tensor"),
    ],
)
def test_collate_fn_refuses(inputs, error, message):
    with pytest.raises(error, match=message):
        sparse_collate_fn(inputs)


@pytest.mark.parametrize("workers", [0, 1])
def test_collate_fn_of_a_loader(workers):
    data = [{"x": sample(3 + i, seed=i, spatial_range=(1, *SIZES), device="cpu"), "label": i} for i in range(5)]
    found = list(DataLoader(data, batch_size=2, collate_fn=sparse_collate_fn, num_workers=workers))
    assert [batch["label"] for batch in found] == [[0, 1], [2, 3], [4]]
    assert [batch["x"].spatial_range[0] for batch in found] == [2, 2, 1]
    assert torch.equal(found[0]["x"].feats[3:], data[1]["x"].feats)


def test_to_dense():
    x = sample(30, batch=2)
    found = to_dense(x.feats, x.coords, (2, *SIZES))
    assert found.shape == (2, *SIZES, 2)
    assert torch.equal(found[tuple(x.coords.long().T)], x.feats)
    assert found.count_nonzero() == x.feats.count_nonzero()
    assert torch.autograd.gradcheck(lambda feats: to_dense(feats, x.coords, (2, *SIZES)), x.feats.requires_grad_())
    with pytest.raises(ValueError, match="are not within spatial_range"):
        to_dense(x.feats, x.coords, (2, 3, 4, 4))


def test_cat_keeps_the_first_one():
    x = sample(30, batch=2, spatial_range=(2, *SIZES), stride=2)
    y = cat([x, x.replace(x.feats[:, :1]), SparseTensor(x.feats + 1, x.coords.clone(), 2)])
    assert torch.equal(y.feats, torch.cat([x.feats, x.feats[:, :1], x.feats + 1], dim=1))
    assert y.coords is x.coords
    assert y._caches is x._caches
    assert (y.stride, y.spatial_range) == (x.stride, x.spatial_range)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([], ValueError, "inputs: got none"),
        ([sample(), 3], TypeError, r"inputs\[1\]: got int"),
        ([sample(), sample(seed=1)], ValueError, "inputs: 1 has other sites"),
        ([sample(), sample(rows=3)], ValueError, "inputs: 1 has other sites"),
        ([sample(), sample(stride=2)], ValueError, r"inputs: 1 has stride \(2, 2, 2\), 0 has"),
    ],
)
def test_cat_refuses(inputs, error, message):
    with pytest.raises(error, match=message):
        cat(inputs)


@pytest.mark.parametrize(("ours", "theirs"), [(30, 40), (0, 5), (5, 0), (0, 0)])
def test_generative_add_is_a_sum_of_tables(ours, theirs):
    a, b = sample(ours, 1, batch=2, stride=2), sample(theirs, 2, batch=2, stride=2)
    found = generative_add(a, b)
    wanted = table(a, b)
    assert found.coords.tolist() == [list(place) for place in sorted(wanted)]
    assert found.coords.dtype == torch.int32
    sums = torch.tensor([wanted[place] for place in sorted(wanted)], dtype=torch.float64).view(-1, 2)
    assert torch.equal(found.feats.cpu(), sums)
    assert found.stride == (2, 2, 2)
    assert found._caches is not a._caches


def test_generative_add_ranges_and_gradients():
    a, b = sample(spatial_range=(1, 3, 4, 6)), sample(seed=1, spatial_range=(1, 4, 4, 5))
    assert generative_add(a, b).spatial_range == (1, 4, 4, 6)
    assert generative_add(a, sample()).spatial_range is None
    assert torch.autograd.gradcheck(
        lambda x, y: generative_add(a.replace(x), b.replace(y)).feats,
        (a.feats.requires_grad_(), b.feats.requires_grad_()),
    )


@pytest.mark.parametrize("other", [{"channels": 3}, {"stride": 2}])
def test_generative_add_refuses(other):
    with pytest.raises(ValueError, match=f"b: got {next(iter(other))}"):
        generative_add(sample(), sample(**other))
    with pytest.raises(TypeError, match=r"inputs\[1\]: got int"):
        generative_add(sample(), 3)
