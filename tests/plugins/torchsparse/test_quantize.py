"""Points to voxels against sets in Python; the official numbers are replayed by tests/golden."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.torchsparse.quantize import make_ntuple, sparse_quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = {"return_index": True, "return_inverse": True}


def loop(points, sizes):
    """Sorted voxels, each one's first point, each point's voxel."""
    sites = [tuple(math.floor(value / size) for value, size in zip(row, sizes, strict=True)) for row in points.tolist()]
    voxels = sorted(set(sites))
    return voxels, [sites.index(voxel) for voxel in voxels], [voxels.index(site) for site in sites]


def kinds(array):
    return [array, torch.from_numpy(array).to(DEVICE)]


@given(st.integers(0, 40), st.integers(1, 4), st.integers(0, 1000), st.sampled_from([1, 0.3, 0.05, 2]), st.booleans())
def test_voxels_are_sorted_and_unique(count, columns, seed, size, single):
    points = np.random.RandomState(seed).uniform(-2, 2, (count, columns)).astype(np.float32 if single else np.float64)
    for given_points in kinds(points):
        found = sparse_quantize(given_points, size, **BOTH)
        assert [type(part) for part in found] == [type(given_points)] * 3
        assert [str(part.dtype).removeprefix("torch.") for part in found] == ["int32", "int64", "int64"]
        voxels, index, inverse = (part.tolist() for part in found)
        assert (list(map(tuple, voxels)), index, inverse) == loop(points, [size] * columns)


def test_what_was_asked_for_is_returned():
    points = torch.tensor([[1.5, 0], [0, 0], [1.2, 0.9]], device=DEVICE)
    assert sparse_quantize(points).tolist() == [[0, 0], [1, 0]]
    voxels, index = sparse_quantize(points, return_index=True)
    assert index.tolist() == [1, 0]
    assert torch.equal(voxels, points[index].floor().int())
    voxels, inverse = sparse_quantize(points, return_inverse=True)
    assert inverse.tolist() == [1, 0, 1]
    assert torch.equal(voxels[inverse], points.floor().int())
    assert voxels.device == points.device


def test_each_column_can_have_its_size():
    points = np.array([[1, 0.99, -0.01, 7], [1, 1.0, 0.01, 0], [0, 1.0, 0.01, 0]])
    sizes = (1, 0.5, 0.02, 4)
    for given_sizes in (sizes, list(sizes), np.array(sizes)):
        assert sparse_quantize(points, given_sizes).tolist() == [[0, 2, 0, 0], [1, 1, -1, 1], [1, 2, 0, 0]]


def test_the_division_is_in_float64():
    # float32's 0.7 is a little less, so it is in voxel 6; a quotient in float32 would be rounded to 7
    points = np.array([[0.7], [0.3]], dtype=np.float32)
    wanted = np.floor(points.astype(np.float64) / 0.1).astype(np.int32)
    assert not np.array_equal(wanted, np.floor(points / np.float32(0.1)).astype(np.int32))
    for given_points in kinds(points):
        assert sparse_quantize(given_points, 0.1)[:, 0].tolist() == sorted(wanted[:, 0].tolist())


def test_extents_beyond_int64_are_sorted_all_the_same():
    low, high = -(2**31), 2**31 - 1
    rows = [[high, low, 3, high], [low, high, high, low], [low, high, low, high], [high, low, 3, low], [low, low, 0, 0]]
    points = np.array(rows + rows[::-1], dtype=np.int64)
    for given_points in kinds(points):
        voxels, index, inverse = (part.tolist() for part in sparse_quantize(given_points, **BOTH))
        assert (list(map(tuple, voxels)), index, inverse) == loop(points, [1] * 4)


def test_sites_far_from_the_origin_are_sorted():
    edge, start = 2**20, 2**23 - 2**19  # without a shift to zero, their keys would be on both sides of 2⁶³
    points = start + np.random.RandomState(0).randint(0, edge, (50, 3))
    points[:2] = [[start] * 3, [start + edge - 1] * 3]
    for given_points in kinds(points):
        assert list(map(tuple, sparse_quantize(given_points).tolist())) == loop(points, [1] * 3)[0]


def test_integers_and_unusual_arrays():
    points = np.arange(24, dtype=np.int16).reshape(8, 3)[::-2]
    points.flags.writeable = False
    assert sparse_quantize(points, 3).tolist() == [[1, 1, 1], [3, 3, 3], [5, 5, 5], [7, 7, 7]]
    frozen = points.astype(np.float64)
    frozen.flags.writeable = False
    assert sparse_quantize(frozen, 3).tolist() == sparse_quantize(points, 3).tolist()
    assert sparse_quantize(points.astype(">f4"), 3).tolist() == sparse_quantize(points, 3).tolist()
    assert sparse_quantize(torch.tensor([[3, -3]], dtype=torch.int8, device=DEVICE), 2).tolist() == [[1, -2]]
    assert sparse_quantize(torch.tensor([[2.5]], dtype=torch.bfloat16, device=DEVICE), 2).tolist() == [[1]]


def test_the_points_are_left_as_they_were():
    points = np.array([[1.5, 2.5, -3.5]])
    for given_points in kinds(points):
        sparse_quantize(given_points, 0.5)
    assert points.tolist() == [[1.5, 2.5, -3.5]]
    assert not sparse_quantize(torch.ones(2, 3, requires_grad=True)).requires_grad


@pytest.mark.fault(27)
@pytest.mark.parametrize(("array", "voxel_size", "error", "message"), [
    (np.zeros((2, 5)), 1, ValueError, r"coords.*\(2, 5\)"),
    (np.zeros((2, 0)), 1, ValueError, r"coords.*\(2, 0\)"),
    (np.zeros(3), 1, ValueError, r"coords.*\(3,\)"),
    (np.zeros((2, 3), dtype=bool), 1, TypeError, "coords.*bool"),
    (np.zeros((2, 3), dtype=complex), 1, TypeError, "coords.*complex128"),
    (np.array([[0, 0], [0, np.nan]]), 1, ValueError, "coords.*nan.*row 1"),
    (np.array([[np.inf, 0]]), 1, ValueError, "coords.*inf.*row 0"),
    (np.array([[0.0, 2.0**31]]), 1, ValueError, "voxel_size.*2147483648"),
    (np.array([[0.0, -(2.0**31) - 1]]), 1, ValueError, "voxel_size.*-2147483649"),
    (np.array([[3e4]]), 1e-6, ValueError, "voxel_size.*1e-06.*30000000000"),
    (np.array([[1e300]]), 1e-300, ValueError, "voxel_size.*inf"),
    (np.zeros((2, 3)), 0, ValueError, "voxel_size.*0"),
    (np.zeros((2, 3)), (1, 1, -1), ValueError, "voxel_size.*-1"),
    (np.zeros((2, 3)), float("nan"), ValueError, "voxel_size.*nan"),
    (np.zeros((2, 3)), (1, 2), ValueError, "voxel_size.*2 numbers.*3"),
    (np.zeros((2, 3)), "1", TypeError, "voxel_size.*'1'"),
    (np.zeros((2, 3)), True, TypeError, "voxel_size.*True"),
])  # fmt: skip
def test_wrong_points_are_refused(array, voxel_size, error, message):
    for points in (array, torch.from_numpy(array)):
        with pytest.raises(error, match=message):
            sparse_quantize(points, voxel_size)


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"coords.*list.*tensor"):
        sparse_quantize([[1.0, 2.0, 3.0]])
    with pytest.raises(TypeError, match=r"coords.*object"):
        sparse_quantize(np.array([[None]]))


@pytest.mark.parametrize(("x", "wanted"), [
    (3, (3, 3, 3)), ([1, 2, 3], (1, 2, 3)), ((1, 2, 3), (1, 2, 3)), (np.int64(2), (2, 2, 2)),
    (torch.tensor([1, 2, 3]), (1, 2, 3)), (torch.tensor(4), (4, 4, 4)), (np.array([1, 2, 3]), (1, 2, 3)),
])  # fmt: skip
def test_one_integer_for_each_dimension(x, wanted):
    found = make_ntuple(x, 3)
    assert found == wanted
    assert {type(value) for value in found} == {int}


@pytest.mark.parametrize(("x", "error", "message"), [
    ([1, 2], ValueError, r"x: got 2 numbers.*3"),
    (torch.tensor([1]), ValueError, "x: got 1 numbers"),
    ([], ValueError, "x: got 0 numbers"),
    (1.0, TypeError, "x: got 1.0"),
    (torch.tensor([1.0, 2, 3]), TypeError, "x: got tensor"),
    (True, TypeError, "x: got True"),
    ("123", TypeError, "x: got '123'"),
    ([[1], [2], [3]], TypeError, "x: got"),
    (None, TypeError, "x: got None"),
])  # fmt: skip
def test_other_things_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        make_ntuple(x, 3)
