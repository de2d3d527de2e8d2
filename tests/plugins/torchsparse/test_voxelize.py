"""Points to voxels and back against loops in Python; the official numbers are replayed by tests/golden."""

import math

import pytest
import torch

from pronghorn.torchsparse.hashing import spcount, sphash, sphashquery
from pronghorn.torchsparse.voxelize import calc_ti_weights, spdevoxelize, spvoxelize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CORNERS = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def rows(*shape, high, seed=0):
    return torch.randint(-1, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def loop_voxelize(feats, idx, counts):
    sums = [[0.0] * feats.shape[1] for _ in counts]
    for row, voxel in zip(feats.tolist(), idx.tolist(), strict=True):
        if voxel >= 0:
            sums[voxel] = [a + b for a, b in zip(sums[voxel], row, strict=True)]
    return [
        [value / count if count else 0.0 for value in row] for row, count in zip(sums, counts.tolist(), strict=True)
    ]


def loop_devoxelize(feats, idx, weights):
    table, found = feats.tolist(), []
    for places, shares in zip(idx.tolist(), weights.tolist(), strict=True):
        total = [0.0] * feats.shape[1]
        for place, share in zip(places, shares, strict=True):
            if place >= 0:
                total = [a + share * b for a, b in zip(total, table[place], strict=True)]
        found.append(total)
    return found


def loop_weights(coords, idx, scale):
    found = []
    for point, places in zip(coords.tolist(), idx.tolist(), strict=True):
        parts = [value / scale - math.floor(value / scale) for value in point]
        shares = [
            math.prod(part if bit else 1 - part for part, bit in zip(parts, corner, strict=True)) if place >= 0 else 0.0
            for corner, place in zip(CORNERS, places, strict=True)
        ]
        found.append([share / (sum(shares) + 1e-8) for share in shares])
    return found


def close(found, wanted, dtype=torch.float64):
    wanted = torch.tensor(wanted, dtype=torch.float64).reshape(found.shape)
    assert found.dtype == dtype
    assert (found.double().cpu() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_voxel_is_the_mean_of_its_points(dtype, index_dtype):
    feats, idx = random(50, 5, dtype=dtype), rows(50, high=9).to(index_dtype)
    counts = spcount(idx, 12)
    assert (idx < 0).any()
    assert (counts[9:] == 0).all()
    close(spvoxelize(feats, idx, counts.to(index_dtype)), loop_voxelize(feats, idx, counts), dtype)


def test_counts_are_what_sums_are_divided_by():
    feats, idx = random(6, 2), torch.tensor([0, 0, 1, 1, 2, 2], device=DEVICE)
    counts = torch.tensor([4, 1, 0], device=DEVICE)
    found = spvoxelize(feats, idx, counts)
    assert torch.allclose(found[:2], torch.stack([feats[:2].sum(0) / 4, feats[2:4].sum(0)]))
    assert not found[2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_sums_are_in_float32(dtype):
    feats = torch.full((3000, 1), 100.0, dtype=dtype, device=DEVICE)  # their sum is beyond float16 and stalls bfloat16
    idx = torch.zeros(3000, dtype=torch.int32, device=DEVICE)
    assert spvoxelize(feats, idx, spcount(idx, 1)).item() == 100
    idx_query = torch.zeros(1, 8, dtype=torch.int32, device=DEVICE)
    weights = torch.tensor([[1000.0, 1, 1, 1, 1, 1, 1, -1006]], device=DEVICE).to(dtype).float()
    assert spdevoxelize(feats[:1], idx_query, weights).item() == 100 * weights.sum().item()


@pytest.mark.fault(27)
def test_points_without_a_voxel_leave_no_trace():
    feats = random(3, 2)
    feats[1] = float("nan")
    feats.requires_grad_()
    idx = torch.tensor([1, -1, 0], device=DEVICE)
    found = spvoxelize(feats, idx, spcount(idx, 2))
    assert torch.equal(found, feats[[2, 0]])
    found.sum().backward()
    assert feats.grad.tolist() == [[1, 1], [0, 0], [1, 1]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_point_is_the_sum_of_its_corners(dtype, index_dtype):
    feats, idx, weights = random(7, 4, dtype=dtype), rows(20, 8, high=7), random(20, 8, seed=1).abs().to(dtype)
    idx[3] = -1
    assert (idx < 0).any()
    close(spdevoxelize(feats, idx.to(index_dtype), weights), loop_devoxelize(feats, idx, weights), dtype)


def test_missing_corners_leave_no_trace():
    feats = torch.full((1, 3), float("nan"), device=DEVICE)
    missing = torch.full((2, 8), -1, device=DEVICE)
    weights = torch.ones(2, 8, device=DEVICE, requires_grad=True)
    found = spdevoxelize(feats, missing, weights)
    assert not found.any()
    found.sum().backward()
    assert not weights.grad.any()
    assert not spdevoxelize(feats[:0], missing, weights).any()


@pytest.mark.parametrize("scale", [1, 2, 0.25])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weights_are_trilinear(scale, dtype):
    coords, idx = random(30, 3).mul(3).to(dtype), rows(30, 8, high=2)
    assert (coords < 0).any()
    close(calc_ti_weights(coords, idx, scale), loop_weights(coords, idx, scale), dtype)


def test_points_on_corners_and_without_corners():
    coords = torch.tensor([[2.0, -1, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], device=DEVICE)
    idx = torch.zeros(3, 8, dtype=torch.int32, device=DEVICE)
    idx[2] = -1
    for dtype in TOLERANCE:
        found = calc_ti_weights(coords.to(dtype), idx)
        assert found[0].tolist() == pytest.approx([1, 0, 0, 0, 0, 0, 0, 0])
        assert found[1].tolist() == pytest.approx([0.125] * 8)
        assert found[2].tolist() == [0] * 8


def test_interpolation_gives_linear_functions_back():
    voxels = torch.cartesian_prod(*[torch.arange(-3, 4)] * 3).int().to(DEVICE)
    sites = torch.nn.functional.pad(voxels, (1, 0))
    feats = voxels.double() @ random(3, 2, seed=1)
    points = random(40, 3).clamp(-2.9, 2.9)
    corners = torch.tensor(CORNERS, dtype=torch.int32, device=DEVICE)
    below = torch.nn.functional.pad(points.floor().int(), (1, 0))
    idx = sphashquery(sphash(below, corners), sphash(sites)).T
    assert (idx >= 0).all()
    found = spdevoxelize(feats, idx, calc_ti_weights(points, idx))
    assert torch.allclose(found, points @ random(3, 2, seed=1), atol=1e-6)


def test_gradients():
    idx, corners = rows(9, high=4), rows(5, 8, high=4)
    counts = spcount(idx, 5)
    points = random(5, 3, seed=2)  # none within gradcheck's step of a whole number
    leaves = [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(9, 3), (4, 3), (5, 8)])]
    points.requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda feats: spvoxelize(feats, idx, counts), (leaves[0],))
        assert check(lambda feats, weights: spdevoxelize(feats, corners, weights), (leaves[1], leaves[2]))
        assert check(lambda coords: calc_ti_weights(coords, corners, 2), (points,))


@pytest.mark.fault(27)
def test_no_points_and_no_voxels():
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    assert spvoxelize(random(0, 3), none, none).shape == (0, 3)
    assert spvoxelize(random(0, 3), none, torch.ones(2, dtype=torch.int32, device=DEVICE)).tolist() == [[0] * 3] * 2
    corners = torch.zeros(0, 8, dtype=torch.int32, device=DEVICE)
    assert spdevoxelize(random(4, 3), corners, random(0, 8)).shape == (0, 3)
    assert calc_ti_weights(random(0, 3), corners).shape == (0, 8)


FEATS, IDX, COUNTS = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.ones(3, dtype=torch.int32)
CORNER, WEIGHTS, COORDS = torch.zeros(5, 8, dtype=torch.int64), torch.zeros(5, 8), torch.zeros(5, 3)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((FEATS.int(), IDX, COUNTS), TypeError, "feats.*int32"),
    ((FEATS[0], IDX, COUNTS), ValueError, r"feats.*\(2,\)"),
    ((FEATS, IDX[:3], COUNTS), ValueError, r"idx.*\(3,\).*\[4\]"),
    ((FEATS, IDX.float(), COUNTS), TypeError, "idx.*float32"),
    ((FEATS, IDX + 3, COUNTS), ValueError, "idx.*3 to 3.*to 2"),
    ((FEATS, IDX - 2, COUNTS), ValueError, "idx.*-2"),
    ((FEATS, IDX, COUNTS.float()), TypeError, "counts.*float32"),
    ((FEATS, IDX, COUNTS[None]), ValueError, r"counts.*\(1, 3\)"),
    ((FEATS, IDX.to("meta"), COUNTS), ValueError, "idx.*meta"),
    ((FEATS, IDX, COUNTS.to("meta")), ValueError, "counts.*meta"),
])  # fmt: skip
def test_voxelize_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        spvoxelize(*arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((FEATS.long(), CORNER, WEIGHTS), TypeError, "feats.*int64"),
    ((FEATS, CORNER.T, WEIGHTS.T), ValueError, r"idx_query.*\(8, 5\).*transpose"),
    ((FEATS, CORNER[0], WEIGHTS[0]), ValueError, r"idx_query.*\(8,\)"),
    ((FEATS, CORNER.bool(), WEIGHTS), TypeError, "idx_query.*bool"),
    ((FEATS, CORNER + 4, WEIGHTS), ValueError, "idx_query.*4 to 4.*to 3"),
    ((FEATS[:0], CORNER, WEIGHTS), ValueError, "idx_query.*0 to 0"),
    ((FEATS, CORNER, WEIGHTS[:4]), ValueError, r"weights.*\(4, 8\)"),
    ((FEATS, CORNER, WEIGHTS.int()), TypeError, "weights.*int32"),
    ((FEATS, CORNER, WEIGHTS.to("meta")), ValueError, "weights.*meta"),
])  # fmt: skip
def test_devoxelize_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        spdevoxelize(*arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((COORDS.int(), CORNER), TypeError, "coords.*int32"),
    ((torch.zeros(5, 4), CORNER), ValueError, r"coords.*\(5, 4\).*batch"),
    ((COORDS, CORNER.T), ValueError, r"idx_query.*\(8, 5\).*\[5, 8\]"),
    ((COORDS, CORNER.float()), TypeError, "idx_query.*float32"),
    ((COORDS, CORNER.to("meta")), ValueError, "idx_query.*meta"),
    ((COORDS, CORNER, 0), ValueError, "scale.*0"),
    ((COORDS, CORNER, float("nan")), ValueError, "scale.*nan"),
    ((COORDS, CORNER, "2"), TypeError, "scale.*'2'"),
])  # fmt: skip
def test_weights_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        calc_ti_weights(*arguments)
