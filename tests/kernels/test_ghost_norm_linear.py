"""Norms of trajectories' gradients: both ways, any shape, lengths, precision, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.ghost_norm_linear import ghost_norm_linear
from pronghorn.kernels.ghost_norm_linear.cases import OPERATION

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3, 20, 50, 90), (2, 70, 18, 33), (1, 1, 40, 5), (4, 33, 1, 1), (2, 64, 64, 128)]


def example(trajectories, positions, in_features, out_features, dtype=torch.float32, limited=False, seed=0):
    knobs = {"trajectories": trajectories, "positions": positions, "in": in_features, "out": out_features}
    generator = torch.Generator().manual_seed(seed)
    return OPERATION.example({**knobs, "limited": limited}, dtype, generator, DEVICE)


def by_a_layer(inputs, output_gradients):
    """What autograd tells of the weight, trajectory by trajectory, in float64."""
    found = []
    for x, gradient in zip(inputs.double(), output_gradients.double(), strict=True):
        weight = torch.zeros(gradient.shape[1], x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        output = torch.nn.functional.linear(x, weight)
        (of_weight,) = torch.autograd.grad(output, weight, gradient)
        found.append(of_weight.square().sum())
    return torch.stack(found)


def force(monkeypatch, gram, **sizes):
    """Go one of the ways, in small tiles so that small problems have several."""
    from pronghorn.kernels.ghost_norm_linear import triton

    for name, size in {"MOST": 16, "MOST_FLOAT32": 16, "DEPTH": 16, "DEEP": 16, **sizes}.items():
        monkeypatch.setattr(triton, name, size)
    monkeypatch.setattr(triton, "gram_is_cheaper", lambda *_: gram)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 150), st.integers(1, 150)),
    dtype=st.sampled_from(DTYPES), limited=st.booleans(), seed=st.integers(0, 99), which=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_any_shape(shape, dtype, limited, seed, which):
    arguments = example(*shape, dtype, limited, seed)
    with backend(which):
        found = ghost_norm_linear(**arguments)
    assert relative_error(found, OPERATION.oracle(arguments)) < 1e-5


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_either_way(shape, dtype, limited, gram, monkeypatch):
    force(monkeypatch, gram)
    arguments = example(*shape, dtype, limited)
    with backend("triton"):
        found = ghost_norm_linear(**arguments)
    assert found.dtype == torch.float64
    assert relative_error(found, OPERATION.oracle(arguments)) < 1e-5


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_norm_of_a_layer_s_gradient(shape, which):
    arguments = example(*shape)
    with backend(which):
        found = ghost_norm_linear(arguments["inputs"], arguments["output_gradients"])
    assert relative_error(found, by_a_layer(arguments["inputs"], arguments["output_gradients"])) < 1e-5


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("which", BACKENDS)
def test_lengths(which, gram, monkeypatch):
    """From the length on nothing matters, not even NaN; what is out of bounds is none or all."""
    force(monkeypatch, gram)
    # The reference chooses by these: few features, or many.
    features = (90, 70) if gram else (6, 7)
    arguments = example(7, 40, *features)
    lengths = [0, 1, 15, 16, 40, -3, 1000]
    wanted = []
    for row, length in enumerate(lengths):
        length = min(max(length, 0), 40)
        one = {name: arguments[name][row : row + 1, :length] for name in ("inputs", "output_gradients")}
        wanted.append(by_a_layer(**one))
        for name in one:
            arguments[name][row, length:] = math.nan
    with backend(which):
        found = ghost_norm_linear(
            arguments["inputs"], arguments["output_gradients"], torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        )
    assert relative_error(found, torch.cat(wanted)) < 1e-5
    assert found[0] == found[5] == 0


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("limited", [False, True])
def test_several_layers_are_added_up(limited, which):
    """Of one shape and of others, of other dtypes, and one whose tensors lie where there are no wide loads."""
    shapes = [(40, 24), (70, 150), (40, 24), (6, 9), (40, 24), (70, 150)]
    layers = [example(3, 33, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    lengths = example(3, 33, 6, 9, limited=True)["lengths"] if limited else None
    layers[2]["inputs"] = layers[2]["inputs"].bfloat16()
    apart = torch.empty(3 * 33 * 24 + 1, device=DEVICE)[1:].view(3, 33, 24)
    layers[4]["output_gradients"] = apart.copy_(layers[4]["output_gradients"])
    layers[5]["inputs"] = layers[5]["inputs"].mT.contiguous().mT
    inputs, gradients = ([layer[name] for layer in layers] for name in ("inputs", "output_gradients"))
    with backend(which):
        found = ghost_norm_linear(inputs, gradients, lengths)
    wanted = sum(OPERATION.oracle({**layer, "lengths": lengths}) for layer in layers)
    assert relative_error(found, wanted) < 1e-5


def test_layers_of_one_shape_take_one_launch(monkeypatch):
    from pronghorn.kernels.ghost_norm_linear import triton

    launched, launch = [], triton._of_one_shape
    monkeypatch.setattr(
        triton, "_of_one_shape", lambda layers, *more: launched.append(len(layers)) or launch(layers, *more)
    )
    layers = [example(2, 20, *shape) for shape in [(40, 24), (24, 40), (40, 24)]]
    with backend("triton"):
        ghost_norm_linear([one["inputs"] for one in layers], [one["output_gradients"] for one in layers])
    assert launched == [2, 1]


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_trajectories_do_not_mix(shape, which):
    arguments = example(*shape)
    with backend(which):
        before = ghost_norm_linear(**arguments)
        arguments["inputs"][0] = math.nan
        after = ghost_norm_linear(**arguments)
    assert after.isnan().tolist() == [True] + [False] * (shape[0] - 1)
    assert torch.equal(before[1:], after[1:])


@pytest.mark.parametrize("gram", [False, True])
def test_tiles_that_are_made_smaller(gram, monkeypatch):
    """Where there are few trajectories, tiles are, so that a GPU is not left idle."""
    for programs in (1, 132, 10**6):
        force(monkeypatch, gram, MOST=64, MOST_FLOAT32=64, PROGRAMS=programs)
        arguments = example(2, 65, 70, 40)
        with backend("triton"):
            found = ghost_norm_linear(**arguments)
        assert relative_error(found, OPERATION.oracle(arguments)) < 1e-5


def test_the_way_that_takes_less():
    from pronghorn.kernels.ghost_norm_linear import triton

    def gram(trajectories, positions, in_features, out_features, dtype=torch.bfloat16):
        direct = triton.direct_tile(trajectories, in_features, out_features, dtype)
        square = triton.gram_tile(trajectories, positions, dtype)
        return triton.gram_is_cheaper(positions, in_features, out_features, direct, square)

    assert gram(16, 1024, 1536, 8960)
    assert gram(64, 512, 1536, 151936)
    assert not gram(16, 1024, 1536, 256)
    assert not gram(16, 4096, 1536, 1536)
    assert not gram(16, 128, 16, 16)
    assert triton.direct_tile(64, 1536, 8960, torch.bfloat16) == (128, 128)
    assert triton.direct_tile(64, 1536, 16, torch.bfloat16) == (128, 16)
    assert triton.direct_tile(1, 256, 256, torch.bfloat16) == (32, 32)
    assert triton.gram_tile(64, 2048, torch.bfloat16) == 128
    assert triton.gram_tile(64, 2048, torch.float32) == 64
    assert triton.gram_tile(1, 10, torch.float32) == 16


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("gram", [False, True])
def test_two_dtypes(gram, which, monkeypatch):
    force(monkeypatch, gram)
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.float16, torch.bfloat16)):
        arguments = example(2, 20, 30, 34)
        for name, dtype in zip(("inputs", "output_gradients"), dtypes, strict=True):
            arguments[name] = arguments[name].to(dtype)
        with backend(which):
            found = ghost_norm_linear(**arguments)
        assert relative_error(found, OPERATION.oracle(arguments)) < 1e-5


@pytest.mark.parametrize("which", BACKENDS)
def test_float64(which):
    for shape in SHAPES:
        arguments = example(*shape, torch.float64, limited=True)
        with backend(which):
            found = ghost_norm_linear(**arguments)
        assert relative_error(found, OPERATION.oracle(arguments)) < 1e-12


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_squares_beyond_float32(scale, gram, which, monkeypatch):
    force(monkeypatch, gram)
    arguments = example(2, 20, 30, 34)
    arguments["output_gradients"] *= scale
    arguments["inputs"] *= scale if scale < 1 else 1
    with backend(which):
        found = ghost_norm_linear(**arguments)
    assert relative_error(found, OPERATION.oracle(arguments)) < 1e-5


@pytest.mark.parametrize("which", BACKENDS)
def test_results_have_no_gradient_and_do_not_vary(which):
    for shape in SHAPES:
        arguments = example(*shape)
        arguments["inputs"].requires_grad_()
        with backend(which):
            first, second = ghost_norm_linear(**arguments), ghost_norm_linear(**arguments)
        assert not first.requires_grad
        assert torch.equal(first, second)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_to_do(shape, which):
    trajectories, positions, in_features, out_features = shape
    inputs = torch.zeros(trajectories, positions, in_features, device=DEVICE)
    with backend(which):
        found = ghost_norm_linear(inputs, torch.zeros(trajectories, positions, out_features, device=DEVICE))
    assert found.dtype == torch.float64
    assert found.tolist() == [0.0] * trajectories


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], (0, 3, 4, 5)])
def test_as_a_torch_operation(shape, limited):
    arguments = example(*shape, limited=limited)
    with backend("reference"):
        inputs, gradients, lengths = arguments.values()
        torch.library.opcheck(torch.ops.pronghorn.ghost_norm_linear.default, ([inputs], [gradients], lengths))


def tensor(*shape, **how):
    return torch.zeros(shape, **how)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"inputs": [1.0]}, TypeError, r"inputs: got float, wanted a torch\.Tensor"),
        ({"inputs": []}, ValueError, "output_gradients: got 1, wanted one for each of 0 inputs"),
        ({"inputs": [tensor(2, 3, 4)] * 2}, ValueError, "output_gradients: got 1, wanted one for each of 2 inputs"),
        (
            {"inputs": [tensor(2, 3, 4), tensor(1, 3, 4)], "output_gradients": [tensor(2, 3, 5), tensor(1, 3, 5)]},
            ValueError,
            r"inputs: got shape \(1, 3, 4\), wanted \(2, 3, 4\)",
        ),
        ({"inputs": tensor(3, 4)}, ValueError, r"inputs: got shape \(3, 4\), wanted 3 dimensions"),
        ({"inputs": tensor(2, 3, 4).long()}, TypeError, r"inputs: got torch\.int64, wanted a floating-point dtype"),
        ({"output_gradients": tensor(2, 3)}, ValueError, r"output_gradients: got shape \(2, 3\), wanted 3 dimensions"),
        ({"output_gradients": tensor(2, 4, 5)}, ValueError, r"output_gradients: got shape \(2, 4, 5\), wanted \(2, 3,"),
        ({"output_gradients": tensor(1, 3, 5)}, ValueError, r"output_gradients: got shape \(1, 3, 5\), wanted \(2, 3,"),
        ({"output_gradients": tensor(2, 3, 5, device="meta")}, ValueError, "output_gradients: is on meta"),
        ({"lengths": tensor(2)}, TypeError, r"lengths: got torch\.float32, wanted torch\.int32"),
        ({"lengths": tensor(2).long()}, TypeError, r"lengths: got torch\.int64, wanted torch\.int32"),
        ({"lengths": tensor(3).int()}, ValueError, r"lengths: got shape \(3,\), wanted \(2,\)"),
        ({"lengths": [1, 2]}, TypeError, "lengths: got list"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    arguments = {"inputs": tensor(2, 3, 4), "output_gradients": tensor(2, 3, 5), "lengths": None}
    with pytest.raises(error, match=message):
        ghost_norm_linear(**{**arguments, **changed})
