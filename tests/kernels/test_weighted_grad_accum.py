"""Adding gradients to buffers: any list of tensors, several dtypes at once, the table of addresses, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels.weighted_grad_accum import BUFFERS, weighted_grad_accum
from pronghorn.kernels.weighted_grad_accum.cases import OPERATION

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(40, 30), (7,), (), (0, 3), (1024,), (1025,), (5, 1, 3)]


def example(shapes=tuple(SHAPES), dtypes=(torch.float32,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtypes = [dtypes[index % len(dtypes)] for index in range(len(shapes))]
    pairs = list(zip(shapes, dtypes, strict=True))
    gradients = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape, dtype in pairs]
    accum, score = (
        [torch.randn(shape, generator=generator).to(DEVICE, BUFFERS[dtype]) for shape, dtype in pairs] for _ in range(2)
    )
    return gradients, accum, score


def pair(*weights):
    return torch.tensor(weights, dtype=torch.float64, device=DEVICE)


def check(gradients, accum, score, weights, which, tolerance=1e-6):
    before = [[buffer.clone() for buffer in buffers] for buffers in (accum, score or ())]
    given_ = [gradient.clone() for gradient in gradients]
    with backend(which):
        squares = weighted_grad_accum(gradients, accum, score, pair(*weights))
    assert (squares.dtype, squares.shape) == (torch.float64, ())
    exact = [gradient.double() for gradient in gradients]
    wanted = float(sum((gradient.square().sum() for gradient in exact), torch.zeros(())))
    assert math.isclose(float(squares), wanted, rel_tol=1e-12, abs_tol=0)
    for buffers, old, weight in zip((accum, score or ()), before, weights, strict=True):
        for buffer, was, gradient in zip(buffers, old, exact, strict=False):
            step = weight * gradient
            bound = tolerance * (was.double().abs() + step.abs())
            assert ((buffer.double() - (was.double() + step)).abs() <= bound).all()
    for gradient, was in zip(gradients, given_, strict=True):
        assert torch.equal(gradient, was)
    return squares


def small_tiles(monkeypatch, **sizes):
    """So that small tensors have several tiles and programs."""
    from pronghorn.kernels.weighted_grad_accum import triton

    for name, size in ({"ELEMENTS": 16, "TILES": 4, "PROGRAMS": 8} | sizes).items():
        monkeypatch.setattr(triton, name, size)


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=9), seed=st.integers(0, 99),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3), scored=st.booleans(),
    weights=st.tuples(st.floats(-4, 4, width=32), st.floats(-4, 4, width=32)), which=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_any_list(sizes, dtypes, seed, scored, weights, which):
    gradients, accum, score = example([(size,) for size in sizes], dtypes, seed)
    check(gradients, accum, score if scored else None, weights, which)


@pytest.mark.parametrize("programs", [1, 8, 1000])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:], DTYPES], ids=str)
def test_tiles_and_programs(dtypes, scored, programs, monkeypatch):
    small_tiles(monkeypatch, PROGRAMS=programs)
    gradients, accum, score = example(dtypes=dtypes)
    check(gradients, accum, score if scored else None, (0.3, -2.0), "triton")


@pytest.mark.parametrize("which", BACKENDS)
def test_hundreds_of_tensors(which):
    shapes = [(index % 13, index % 5 + 1) for index in range(300)]
    check(*example(shapes, DTYPES), (-0.7, 1.0), which)


def test_one_launch_for_a_dtype(monkeypatch):
    from pronghorn.kernels.weighted_grad_accum import triton

    launched, launch = [], triton._launch
    monkeypatch.setattr(triton, "_launch", lambda rows, *more: launched.append(len(rows)) or launch(rows, *more))
    check(*example([(3,)] * 50), (1.0, 1.0), "triton")
    check(*example([(3,)] * 50, DTYPES[:2]), (1.0, 1.0), "triton")
    assert launched == [50, 25, 25]


@pytest.mark.parametrize("moved", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_addresses_of_any_alignment(moved):
    """One tensor has wide loads; of another, gradient, buffers or all lie where there are none."""
    tensors = example([(50,), (2100,)])
    for index, (first, *_) in enumerate(tensors):
        start = 1 if index in moved else 4
        tensors[index][0] = first[start : start + 40]
    check(*tensors, (2.0, 3.0), "triton")


def test_tables_are_kept_and_renewed():
    from pronghorn.kernels import _table

    _table._kept_table.cache_clear()
    gradients, accum, score = example()
    for _ in range(3):
        check(gradients, accum, score, (0.5, 0.25), "triton")
    assert _table._kept_table.cache_info().misses == 1
    for seed in range(1, 4):  # elsewhere in memory, and then where others lie
        check(example(seed=seed)[0], accum, score, (0.5, 0.25), "triton")
    check(gradients[::-1], accum[::-1], score[::-1], (1.0, 1.0), "triton")
    check(gradients[4:6], accum[4:6], score[4:6], (1.0, 1.0), "triton")


def test_a_recorded_table_is_the_same():
    from pronghorn.kernels import _table

    numbers = *range(200), 2**47 + 3, 0x7F12345678ABCDE0
    assert _table._recorded_table(numbers, DEVICE).tolist() == [*numbers]
    assert _table._kept_table(numbers, DEVICE, 0).tolist() == [*numbers]


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("strange", [math.inf, math.nan])
def test_what_is_not_finite_shows(strange, which):
    gradients, accum, score = example()
    gradients[0][3, 4] = strange
    with backend(which):
        squares = weighted_grad_accum(gradients, accum, score, pair(1.0, 1.0))
    assert not squares.isfinite()
    assert [not buffer.isfinite().all() for buffer in accum] == [True, *[False] * (len(accum) - 1)]


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_beyond_float32(scale, which):
    gradients, accum, score = example()
    gradients = [gradient * scale for gradient in gradients]
    check(gradients, accum, score, (1e-3, 1e-3), which)


@pytest.mark.parametrize("which", BACKENDS)
def test_gradients_that_are_not_contiguous(which):
    gradients, accum, score = example([(6, 5), (4,), (3, 2)])
    gradients = [gradients[0].T.contiguous().T, gradients[1][:1].expand(4), gradients[2]]
    check(gradients, accum, score, (1.5, -1.0), which)


@pytest.mark.parametrize("which", BACKENDS)
def test_float64(which):
    gradients, accum, score = example(dtypes=(torch.float64, torch.float32))
    check(gradients, accum, score, (1 / 3, 0.1), which)
    check(gradients[::2], accum[::2], score[::2], (1 / 3, 0.1), which, tolerance=1e-15)


@pytest.mark.parametrize("which", BACKENDS)
def test_leaves_and_graphs(which):
    """Buffers that learn are no obstacle, results have no gradient, and autograd is told what changed."""
    gradients, accum, score = example([(3, 4), (5,)])
    gradients = [gradient.requires_grad_() for gradient in gradients]
    accum = [torch.nn.Parameter(buffer) for buffer in accum]
    versions = [buffer._version for buffer in (*accum, *score)]
    with backend(which):
        squares = weighted_grad_accum(gradients, accum, score, pair(1.0, 1.0))
    assert not squares.requires_grad
    assert all(buffer.is_leaf for buffer in accum)
    assert all(buffer._version > version for buffer, version in zip((*accum, *score), versions, strict=True))


def test_order_of_sums_does_not_vary(monkeypatch):
    small_tiles(monkeypatch)
    found = []
    for _ in range(2):
        gradients, accum, score = example()
        with backend("triton"):
            found.append([weighted_grad_accum(gradients, accum, score, pair(0.1, 0.2)), *accum, *score])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("which", BACKENDS)
def test_nothing_to_add(which):
    with backend(which):
        assert weighted_grad_accum([], [], None, pair(1.0, 1.0)) == weighted_grad_accum((), (), (), pair(1.0, 1.0)) == 0
        check(*example([(0,), (3, 0)]), (1.0, 1.0), which)


@pytest.mark.parametrize("scored", [True, False])
def test_as_a_torch_operation(scored):
    gradients, accum, score = example([(3, 4), (5,), (0,)])
    with backend("reference"):
        torch.library.opcheck(
            torch.ops.pronghorn.weighted_grad_accum.default, (gradients, accum, score if scored else [], pair(0.5, 2.0))
        )


def test_compiled_it_changes_its_buffers():
    gradients, accum, score = example([(3, 4), (5,)])
    again = [[buffer.clone() for buffer in buffers] for buffers in (accum, score)]
    compiled = torch.compile(weighted_grad_accum, fullgraph=True, backend="aot_eager")
    with backend("reference"):
        found = compiled(gradients, accum, score, pair(0.5, 2.0))
        wanted = weighted_grad_accum(gradients, *again, pair(0.5, 2.0))
    torch.testing.assert_close([found, *accum, *score], [wanted, *again[0], *again[1]], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="records a CUDA graph")
def test_a_recorded_call_outlives_its_table():
    from pronghorn.kernels import _table

    gradients, accum, score = example()
    graph, weights = torch.cuda.CUDAGraph(), pair(0.5, 2.0)
    with backend("triton"):
        weighted_grad_accum(*example(seed=1), weights)  # compiles
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            squares = weighted_grad_accum(gradients, accum, score, weights)
        _table._kept_table.cache_clear()
        for seed in range(2, 20):
            weighted_grad_accum(*example(seed=seed), weights)
    before = [buffer.clone() for buffer in accum]
    for _ in range(2):
        graph.replay()
    for buffer, was, gradient in zip(accum, before, gradients, strict=True):
        torch.testing.assert_close(buffer, was + gradient)
    assert math.isclose(float(squares), float(sum(g.double().square().sum() for g in gradients)), rel_tol=1e-12)


def zeros(*shapes, **how):
    return [torch.zeros(shape, **how) for shape in shapes]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"gradients": torch.zeros(2, 3)}, TypeError, "gradients: got Tensor, wanted a sequence of tensors"),
        ({"gradients": None}, TypeError, "gradients: got NoneType, wanted a sequence of tensors"),
        ({"accum": zeros(3)}, ValueError, "accum: got 1 tensors, wanted 2, one for each gradient"),
        ({"score": []}, ValueError, "score: got 0 tensors, wanted 2, one for each gradient"),
        ({"gradients": [torch.zeros(3), 1.0]}, TypeError, r"gradients\[1\]: got float, wanted a torch\.Tensor"),
        ({"gradients": zeros(3, (2, 2), dtype=torch.int32)}, TypeError, r"gradients\[0\]: got torch\.int32, accepted"),
        ({"gradients": [torch.zeros(3).to_sparse(), torch.zeros(2, 2)]}, ValueError, r"gradients\[0\]: got layout"),
        ({"gradients": zeros(3, (2, 2), device="meta")}, ValueError, r"accum\[0\]: is on cpu"),
        ({"accum": zeros(3, 4)}, ValueError, r"accum\[1\]: got shape \(4,\), wanted \(2, 2\)"),
        ({"accum": zeros(3, (2, 2), dtype=torch.float16)}, TypeError, r"accum\[0\]: got torch\.float16, wanted"),
        ({"score": zeros(3, (2, 2), dtype=torch.float64)}, TypeError, r"score\[0\]: got torch\.float64, wanted"),
        ({"score": [torch.zeros(3), torch.zeros(2, 2, device="meta")]}, ValueError, r"score\[1\]: is on meta"),
        ({"score": [torch.zeros(6)[::2], torch.zeros(2, 2)]}, ValueError, r"score\[0\]: got strides \(2,\), wanted"),
        ({"score": [None, torch.zeros(2, 2)]}, TypeError, r"score\[0\]: got NoneType, wanted a torch\.Tensor"),
        ({"weights": 1.0}, TypeError, r"weights: got float, wanted a torch\.Tensor"),
        ({"weights": torch.zeros(3)}, ValueError, r"weights: got shape \(3,\), wanted \(2,\)"),
        ({"weights": torch.zeros(2, dtype=torch.int32)}, TypeError, r"weights: got torch\.int32, accepted"),
        ({"weights": torch.zeros(2, device="meta")}, ValueError, "weights: is on meta"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    names = ("gradients", "accum", "score")
    arguments = {**{name: zeros(3, (2, 2)) for name in names}, "weights": torch.ones(2)}
    with pytest.raises(error, match=message):
        weighted_grad_accum(**{**arguments, **changed})


def test_the_registered_example_is_large_enough_to_tell():
    assert OPERATION.cost(OPERATION.large).bytes > 1e9
