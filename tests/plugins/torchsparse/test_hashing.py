"""Hashes of sites against Python's integers; the official numbers are replayed by tests/golden."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.torchsparse.hashing import spcount, sphash, sphashquery

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT32 = st.integers(-(2**31), 2**31 - 1)


def one_hash(row, folded):
    found = 0xCBF29CE484222325
    for value in row:
        found = ((found ^ (value & 0xFFFFFFFF)) * 0x100000001B3) % 2**64
    if folded:
        found = (found >> 60) ^ (found & (2**60 - 1))
    return found - 2**64 if found >= 2**63 else found


def sites(rows):
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE).reshape(-1, 4)


def numbers(rows):
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE)


@given(st.lists(st.tuples(INT32, INT32, INT32, INT32), max_size=8), st.booleans())
def test_each_hash_is_fnv(rows, folded):
    found = sphash(sites(rows), folded=folded)
    assert found.dtype == torch.int64
    assert found.tolist() == [one_hash(row, folded) for row in rows]


def test_offsets_move_all_but_the_batch_index():
    rows, moves = [(3, 0, -1, 2), (0, 5, 6, 7), (1, 2**31 - 1, -(2**31), 0)], [(0, 0, 0), (-1, 2, -3)]
    found = sphash(sites(rows), torch.tensor(moves, dtype=torch.int32, device=DEVICE), folded=False)
    wanted = [[one_hash((b, x + i, y + j, z + k), False) for b, x, y, z in rows] for i, j, k in moves]
    assert found.tolist() == wanted


@pytest.mark.fault(27)
@pytest.mark.parametrize("folded", [True, False])
def test_a_dense_grid_has_no_two_equal_hashes(folded):
    axes = [torch.arange(2), *[torch.arange(-24, 24)] * 3]
    grid = torch.cartesian_prod(*axes).int().to(DEVICE)
    assert sphash(grid, folded=folded).unique().numel() == grid.shape[0]


def test_the_device_picks_the_variant():
    coords = sites([[0, 1, 2, 3], [9, 8, 7, -6]])
    assert torch.equal(sphash(coords), sphash(coords, folded=DEVICE != "cuda"))
    assert (sphash(coords, folded=True) >= 0).all()
    assert not torch.equal(sphash(coords, folded=True), sphash(coords, folded=False))


def test_no_sites_and_no_offsets():
    empty = sites([])
    assert sphash(empty).shape == (0,)
    assert sphash(empty, torch.zeros(5, 3, dtype=torch.int32, device=DEVICE)).shape == (5, 0)
    assert sphash(sites([[0, 0, 0, 0]]), torch.zeros(0, 3, dtype=torch.int32, device=DEVICE)).shape == (0, 1)


@pytest.mark.parametrize(("coords", "offsets", "error", "message"), [
    (torch.zeros(2, 4), None, TypeError, r"coords.*float32.*int32"),
    (torch.full((2, 4), float("nan")), None, TypeError, "coords"),
    (torch.zeros(2, 4, dtype=torch.int64), None, TypeError, "coords.*int64"),
    (torch.zeros(2, 3, dtype=torch.int32), None, ValueError, r"coords.*\(2, 3\)"),
    (torch.zeros(4, dtype=torch.int32), None, ValueError, r"coords.*\(4,\)"),
    (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(1, 3), TypeError, "offsets.*float32"),
    (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32), ValueError, r"offsets.*\(1, 4\)"),
    (torch.full((1, 4), 2**31 - 1, dtype=torch.int32), torch.ones(1, 3, dtype=torch.int32), ValueError, "2147483648"),
    (torch.full((1, 4), -(2**31), dtype=torch.int32), -torch.ones(1, 3, dtype=torch.int32), ValueError, "-2147483649"),
])  # fmt: skip
def test_wrong_sites_are_refused(coords, offsets, error, message):
    with pytest.raises(error, match=message):
        sphash(coords, offsets)


@pytest.mark.fault(27)
@given(st.lists(st.integers(-3, 3), max_size=12), st.lists(st.integers(-4, 4), max_size=12))
def test_the_last_reference_is_found(references, queries):
    places = {value: row for row, value in enumerate(references)}
    found = sphashquery(numbers(queries), numbers(references))
    assert found.dtype == torch.int64
    assert found.tolist() == [places.get(value, -1) for value in queries]


def test_queries_keep_their_shape_and_extremes_are_found():
    references = numbers([2**63 - 1, 0, -(2**63), 5])
    queries = numbers([[-(2**63), 5, 6], [2**63 - 1, -1, 0]])
    assert sphashquery(queries, references).tolist() == [[2, 3, -1], [0, -1, 1]]
    assert sphashquery(queries.T, references).tolist() == [[2, 0], [3, -1], [-1, 1]]
    assert sphashquery(queries, references[:0]).tolist() == [[-1] * 3] * 2
    assert sphashquery(queries[:0], references).shape == (0, 3)


def test_neighbours_are_found_by_hash():
    generator = torch.Generator().manual_seed(0)
    coords = torch.randint(0, 4, (60, 4), generator=generator).int().unique(dim=0)
    offsets = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 3).int()
    found = sphashquery(sphash(coords, offsets), sphash(coords))
    rows = {tuple(row): index for index, row in enumerate(coords.tolist())}
    wanted = [
        [rows.get((b, x + i, y + j, z + k), -1) for b, x, y, z in coords.tolist()] for i, j, k in offsets.tolist()
    ]
    assert found.tolist() == wanted


@pytest.mark.parametrize(("queries", "references", "error", "message"), [
    (torch.zeros(2), torch.zeros(2, dtype=torch.int64), TypeError, "queries.*float32"),
    (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), TypeError, "references.*int32"),
    (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), ValueError, r"references.*\(2, 1\)"),
    (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "meta.*cpu"),
])  # fmt: skip
def test_wrong_hashes_are_refused(queries, references, error, message):
    with pytest.raises(error, match=message):
        sphashquery(queries, references)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_points_are_counted(dtype):
    idx = numbers([3, 0, -1, 3, 3, 1, -1]).to(dtype)
    found = spcount(idx, 5)
    assert found.dtype == torch.int32
    assert found.tolist() == [1, 1, 0, 3, 0]
    assert spcount(idx[:0], 3).tolist() == [0, 0, 0]
    assert spcount(torch.full_like(idx, -1), 0).tolist() == []


@pytest.mark.parametrize(("idx", "num", "error", "message"), [
    (torch.zeros(3), 2, TypeError, "idx.*float32"),
    (torch.zeros(3, 1, dtype=torch.int32), 2, ValueError, r"idx.*\(3, 1\)"),
    (torch.tensor([0, 2]), 2, ValueError, "idx.*0 to 2.*to 1"),
    (torch.tensor([0, -2]), 2, ValueError, "idx.*-2 to 0"),
    (torch.tensor([0]), -1, ValueError, "num.*-1"),
    (torch.tensor([0]), 2.0, TypeError, "num.*2.0"),
    (torch.tensor([0]), True, TypeError, "num.*True"),
])  # fmt: skip
def test_wrong_rows_are_refused(idx, num, error, message):
    with pytest.raises(error, match=message):
        spcount(idx, num)
