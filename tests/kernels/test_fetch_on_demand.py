"""What `test_operations` does not show: outputs that many pairs share, many offsets, gradients by Triton, maps."""

import pytest
import torch
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.fetch_on_demand import fetch_on_demand
from pronghorn.kernels.fetch_on_demand.cases import OPERATION
from pronghorn.kernels.kernel_map import kernel_map
from pronghorn.kernels.kernel_map.cases import box_offsets, random_coords
from pronghorn.kernels.sparse_convolution import sparse_convolution
from pronghorn.kernels.sparse_convolution.cases import transposed

BACKENDS = pytest.mark.parametrize("which", ["reference", "triton"])
GRADIENT_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def example(dtype=torch.float32, seed=0, **knobs):
    defaults = {"rows": 40, "outputs": 30, "volume": 5, "pairs": 100, "channels": 20, "columns": 24, "scaled": True}
    return OPERATION.example({**defaults, **knobs}, dtype, torch.Generator().manual_seed(seed), DEVICE)


def error(arguments):
    return relative_error(fetch_on_demand(**arguments), OPERATION.oracle(arguments))


@BACKENDS
@pytest.mark.parametrize("pairs", [1, 15, 16, 17, 33, 200])
def test_every_pair_may_have_the_same_output(which, pairs):
    arguments = example(outputs=4, pairs=pairs, volume=1)
    arguments["pairs"][1] = 2
    with backend(which):
        assert error(arguments) < 1e-6
        assert not fetch_on_demand(**arguments)[[0, 1, 3]].any()


@BACKENDS
@pytest.mark.parametrize(
    "sizes", [(0, 0, 50), (50, 0, 0), (0, 1, 0, 0, 49, 0), (16, 16, 0, 18), (17, 15, 17, 1), (0, 0, 0), (0,), ()]
)
def test_offsets_without_pairs(which, sizes):
    arguments = example(volume=len(sizes) or 1, pairs=sum(sizes))
    arguments["weight"] = arguments["weight"][: len(sizes)]
    arguments["starts"] = torch.tensor([0, *sizes], device=DEVICE).cumsum(0)
    arguments["weight"].requires_grad_()
    with backend(which):
        assert error(arguments) < 1e-6
        fetch_on_demand(**arguments).sum().backward()
    empty = [k for k, size in enumerate(sizes) if not size]
    assert not arguments["weight"].grad[empty].any()


@BACKENDS
def test_three_hundred_offsets(which):
    arguments = example(volume=300, pairs=120, channels=3, columns=4)
    with backend(which):
        assert error(arguments) < 1e-6


@pytest.mark.parametrize("rows", [16, 32, 256])
@pytest.mark.parametrize("seed", range(4))
def test_an_offset_has_as_many_tiles_as_it_needs(rows, seed, monkeypatch):
    """Whatever a tile's length is, and wherever its offset starts."""
    from pronghorn.kernels.fetch_on_demand import triton

    monkeypatch.setattr(triton, "choose_tile", lambda *_, **__: triton.Tile(rows, 32, 32, 4, 2))
    arguments = example(volume=6, pairs=rows * 2 + seed, seed=seed)
    with backend("triton"):
        assert error(arguments) < 1e-6


@BACKENDS
def test_what_stands_behind_the_last_offset_is_passed_over(which):
    arguments = example(pairs=90)
    kept = int(arguments["starts"][3])
    arguments["starts"] = arguments["starts"].clamp(max=kept)
    shorter = {**arguments, "pairs": arguments["pairs"][:, :kept], "scale": arguments["scale"][:kept]}
    with backend(which):
        assert relative_error(fetch_on_demand(**arguments), OPERATION.oracle(shorter)) < 1e-6


@BACKENDS
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
def test_gradients(dtype, scaled, which):
    arguments = example(dtype, scaled=scaled, pairs=700)
    names = ("x", "weight", "scale") if scaled else ("x", "weight")
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}
    grads = []
    upstream = torch.randn(arguments["outputs"], 24, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    for call, chosen in ((exact, "reference"), (arguments, which)):
        leaves = [call[name].requires_grad_() for name in names]
        with backend(chosen):
            out = fetch_on_demand(**call)
            grads.append(torch.autograd.grad(out, leaves, upstream.to(out.dtype)))
    for name, wanted, found in zip(names, *grads, strict=True):
        assert found.dtype == arguments[name].dtype
        assert relative_error(found, wanted) < GRADIENT_TOLERANCE[dtype], name


@BACKENDS
def test_a_small_scale_leaves_gradients_of_sixteen_bits(which):
    """As that of the mean over a node with a million neighbours: the product alone is no number of float16."""
    arguments = example(torch.float16, pairs=300)
    arguments["scale"].fill_(1e-6)
    arguments["weight"].requires_grad_()
    with backend(which):
        out = fetch_on_demand(**{**arguments, "x": arguments["x"] * 64})
        (found,) = torch.autograd.grad(out, arguments["weight"], torch.full_like(out, 2e-2))
        full = fetch_on_demand(**{**arguments, "x": arguments["x"] * 64, "scale": torch.ones_like(arguments["scale"])})
        (wanted,) = torch.autograd.grad(full, arguments["weight"], torch.full_like(out, 2e-2))
    assert relative_error(found.double(), wanted.double() * 1e-6) < 0.05


@BACKENDS
def test_the_gradient_of_the_weight_is_the_same_every_time(which):
    arguments = example(pairs=2000, volume=3)
    arguments["weight"].requires_grad_()
    with backend(which):
        out = fetch_on_demand(**arguments)
        first, second = (torch.autograd.grad(out, arguments["weight"], out, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@BACKENDS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_agrees_with_sparse_convolution(dtype, tolerance, which):
    generator = torch.Generator().manual_seed(3)
    coords, offsets = random_coords(200, (2, 6, 7, 5), generator), box_offsets((3, 3, 3))
    bounds = torch.stack(coords.aminmax(dim=0)).long()
    found = kernel_map(coords, coords[::2].contiguous(), offsets, stride=[1] * 4, bounds=bounds)
    k, o = (found >= 0).nonzero().T
    pairs, starts = torch.stack([found[k, o], o]).int().to(DEVICE), torch.searchsorted(k, torch.arange(28)).to(DEVICE)
    x = torch.randn(len(coords), 12, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(27, 12, 20, generator=generator) / 12).to(DEVICE, dtype).requires_grad_()
    with backend(which):
        ours = fetch_on_demand(x, weight, pairs, starts, found.shape[1])
        theirs = sparse_convolution(x, weight, found.to(DEVICE), transposed(found, len(coords)).to(DEVICE))
        results = [(out, *torch.autograd.grad(out, (x, weight), torch.ones_like(out))) for out in (ours, theirs)]
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@BACKENDS
def test_views_are_taken_as_they_are(which):
    arguments = example()
    wanted = OPERATION.oracle(arguments)
    for name in ("x", "weight", "pairs"):
        arguments[name] = arguments[name].mT.contiguous().mT
    arguments["scale"] = arguments["scale"].repeat_interleave(2)[::2]
    with backend(which):
        assert relative_error(fetch_on_demand(**arguments), wanted) < 1e-6


@BACKENDS
@pytest.mark.parametrize("empty", ["rows", "outputs", "channels", "columns"])
def test_nothing_to_do(which, empty):
    arguments = example(rows=3, outputs=2, pairs=0 if empty in ("rows", "outputs") else 4)
    sizes = {"rows": 3, "outputs": 2, "channels": 20, "columns": 24, empty: 0}
    arguments["x"] = arguments["x"][: sizes["rows"], : sizes["channels"]].clone().requires_grad_()
    arguments["weight"] = arguments["weight"][:, : sizes["channels"], : sizes["columns"]].clone().requires_grad_()
    arguments["outputs"] = sizes["outputs"]
    with backend(which):
        out = fetch_on_demand(**arguments)
        out.sum().backward()
    assert out.shape == (sizes["outputs"], sizes["columns"])
    assert not out.any()
    assert arguments["x"].grad.shape == arguments["x"].shape
    assert arguments["weight"].grad.shape == arguments["weight"].shape


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(40, 21)}, ValueError, r"^x: got shape \(40, 21\), wanted \(40, 20\)"),
        ({"x": torch.zeros(40, 20).int()}, TypeError, "^x: got torch.int32"),
        ({"weight": torch.zeros(5, 20)}, ValueError, "^weight: "),
        ({"weight": torch.zeros(5, 20, 24).half()}, TypeError, "^weight: got torch.float16, wanted torch.float32"),
        ({"pairs": torch.zeros(100, 2).int()}, ValueError, r"^pairs: got shape \(100, 2\)"),
        ({"pairs": torch.zeros(2, 100).long()}, TypeError, "^pairs: got torch.int64, wanted torch.int32"),
        ({"starts": torch.zeros(5).int()}, ValueError, r"^starts: got shape \(5,\), wanted \(6,\)"),
        ({"starts": torch.zeros(6)}, TypeError, "^starts: got torch.float32, wanted torch.int32 or torch.int64"),
        ({"scale": torch.zeros(99)}, ValueError, r"^scale: got shape \(99,\), wanted \(100,\)"),
        ({"scale": torch.zeros(100).half()}, TypeError, "^scale: got torch.float16, wanted torch.float32"),
        ({"outputs": -1}, ValueError, "^outputs: got -1"),
    ],
)
def test_wrong_arguments_name_themselves(changes, error, message):
    arguments = {**example(), **{k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in changes.items()}}
    with pytest.raises(error, match=message):
        fetch_on_demand(**arguments)


def test_compiled_training_without_a_graph_break():
    arguments = example(dtype=torch.float32)
    for name in ("x", "weight", "scale"):
        arguments[name].requires_grad_()

    def loss(**given):
        return fetch_on_demand(**given).square().sum()

    with backend("reference"):
        wanted = torch.autograd.grad(loss(**arguments), [arguments[n] for n in ("x", "weight", "scale")])
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        found = torch.autograd.grad(compiled(**arguments), [arguments[n] for n in ("x", "weight", "scale")])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
