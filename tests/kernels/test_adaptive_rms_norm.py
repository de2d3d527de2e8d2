"""The gated residual and its adaptive norm: rounding, what may be left out, gradients, bad input."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.adaptive_rms_norm import adaptive_rms_norm
from pronghorn.kernels.adaptive_rms_norm.cases import OPERATION

BACKENDS = ["reference", "triton"]
TRAINED = OPERATION.trains
SMALL = {"rows": (2, 3), "tokens": 5, "channels": 20}
LEFT_OUT = [{}, {"gated": False}, {"added": False}]


def example(knobs, dtype=torch.float32, seed=0):
    return OPERATION.example(knobs, dtype, torch.Generator().manual_seed(seed), DEVICE)


def given_of(arguments):
    return [name for name in TRAINED if arguments[name] is not None]


def by_eager(x, scale, shift, update, gate, eps=1e-6):
    """As a layer does it with PyTorch's operations, each of which rounds: residual, then norm in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if update is not None:
        x = x + (update if gate is None else update * gate.unsqueeze(-2).to(x.dtype))
    normal = x * torch.rsqrt(x.to(wide).square().mean(dim=-1, keepdim=True) + eps)
    return (normal * (1 + scale.unsqueeze(-2).to(wide)) + shift.unsqueeze(-2).to(wide)).to(x.dtype), x


def small_tiles(monkeypatch):
    """So that small problems have several, of tokens and of parts of rows."""
    from pronghorn.kernels.adaptive_rms_norm import triton

    for name, size in (("ELEMENTS", 64), ("GRADIENT_ELEMENTS", 32), ("PROGRAMS", 14)):
        monkeypatch.setattr(triton, name, size)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("left_out", LEFT_OUT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounds_where_a_layer_rounds(dtype, left_out, which):
    if which == "triton" and DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding; this runs on a GPU")
    arguments = example({**SMALL, **left_out}, dtype)
    with backend(which):
        out, total = adaptive_rms_norm(**arguments)
    wanted, sum_wanted = by_eager(**arguments)
    if dtype == torch.float32:  # a GPU multiplies and adds at once
        torch.testing.assert_close((out, total), (wanted, sum_wanted), rtol=1e-6, atol=1e-6)
        return
    assert torch.equal(total, sum_wanted)
    torch.testing.assert_close(out, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert (out != wanted).double().mean() < 0.01  # where the last bit of a float32 decides


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("left_out", LEFT_OUT, ids=str)
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_are_autograd_s(used, left_out, which, monkeypatch):
    small_tiles(monkeypatch)
    arguments = example({**SMALL, "tokens": 9, **left_out})
    grads = [torch.randn(arguments["x"].shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
             for seed in (8, 9)]  # fmt: skip
    found = {}
    for dtype, function in ((torch.float64, by_eager), (torch.float32, adaptive_rms_norm)):
        inputs = {name: arguments[name].detach().to(dtype).requires_grad_() for name in given_of(arguments)}
        with backend(which):
            out = function(**{**arguments, **inputs})
            loss = sum((y * grad).sum() for y, grad, use in zip(out, grads, used, strict=True) if use)
            loss.backward()
        found[dtype] = [tensor.grad for tensor in inputs.values()]
    for ours, wanted in zip(found[torch.float32], found[torch.float64], strict=True):
        assert (ours is None) == (wanted is None) or not ours.any()
        if wanted is not None:
            assert relative_error(ours, wanted) < 5e-6


@st.composite
def problems(draw):
    return {
        "rows": tuple(draw(st.lists(st.integers(1, 3), max_size=2))), "tokens": draw(st.integers(1, 12)),
        "channels": draw(st.integers(1, 40)), **draw(st.sampled_from(LEFT_OUT)), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@given(knobs=problems(), which=st.sampled_from(BACKENDS))
def test_any_shape(knobs, which):
    arguments = example(knobs, seed=knobs["seed"])
    names = given_of(arguments)
    exact = {**arguments, **{name: arguments[name].detach().double().requires_grad_() for name in names}}
    inputs = {**arguments, **{name: arguments[name].detach().requires_grad_() for name in names}}
    with pytest.MonkeyPatch.context() as monkeypatch, backend(which):
        small_tiles(monkeypatch)
        out, wanted = adaptive_rms_norm(**inputs), by_eager(**exact)
        grads = torch.autograd.grad([y.square().sum() for y in out], [inputs[name] for name in names])
    wanted_grads = torch.autograd.grad([y.square().sum() for y in wanted], [exact[name] for name in names])
    for ours, theirs in zip((*out, *grads), (*wanted, *wanted_grads), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-4


@pytest.mark.parametrize("which", BACKENDS)
def test_dtypes_of_modulations_and_gradients(which):
    arguments = example(SMALL, torch.float16)
    arguments["scale"], arguments["gate"] = arguments["scale"].float(), arguments["gate"].float()
    inputs = {name: arguments[name].detach().requires_grad_() for name in TRAINED}
    with backend(which):
        out, total = adaptive_rms_norm(**inputs)
        (out.float().sum() + total.float().sum()).backward()
    assert out.dtype == total.dtype == torch.float16
    assert [tensor.grad.dtype for tensor in inputs.values()] == [tensor.dtype for tensor in inputs.values()]
    with backend(which):
        rounded = adaptive_rms_norm(**{**arguments, "gate": arguments["gate"].half()})
    assert torch.equal(rounded[1], total)


@pytest.mark.parametrize("which", BACKENDS)
def test_modulations_lie_anywhere(which):
    arguments = example(SMALL)
    assert not arguments["scale"].is_contiguous()  # a part of a layer's one tensor
    with backend(which):
        wanted = adaptive_rms_norm(**arguments)
        for form in (
            torch.Tensor.contiguous,
            lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
            lambda tensor: torch.cat([tensor, tensor[..., :1]], dim=-1)[..., :-1],
        ):
            moved = {name: form(arguments[name]) for name in ("scale", "shift", "gate")}
            for ours, theirs in zip(adaptive_rms_norm(**{**arguments, **moved}), wanted, strict=True):
                assert torch.equal(ours, theirs)
        one = arguments["scale"][:1].expand(2, -1, -1)
        for ours, theirs in zip(
            adaptive_rms_norm(**{**arguments, "scale": one}),
            adaptive_rms_norm(**{**arguments, "scale": one.contiguous()}),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("which", BACKENDS)
def test_without_an_update_the_total_is_x(which):
    arguments = example({**SMALL, "added": False})
    with backend(which):
        assert adaptive_rms_norm(**arguments)[1] is arguments["x"]


@pytest.mark.parametrize("which", BACKENDS)
def test_squares_beyond_the_dtype_and_zeros(which):
    """1000 squared is no float16."""
    arguments = example({**SMALL, "added": False}, torch.float16)
    with backend(which):
        large = adaptive_rms_norm(**{**arguments, "x": arguments["x"] * 300})[0]
        zeros = adaptive_rms_norm(**{**arguments, "x": arguments["x"] * 0})[0]
        ones = adaptive_rms_norm(**{**arguments, "x": torch.ones_like(arguments["x"])}, eps=3.0)[0]
    assert relative_error(large, adaptive_rms_norm(**arguments)[0]) < 2e-3
    assert torch.equal(zeros, arguments["shift"].unsqueeze(-2).expand_as(zeros))
    wanted = 0.5 * (1 + arguments["scale"].double()) + arguments["shift"].double()
    assert relative_error(ones, wanted.unsqueeze(-2).expand_as(ones)) < 1e-3


def test_the_same_bits_at_every_call(monkeypatch):
    small_tiles(monkeypatch)
    grads = []
    for _ in range(2):
        arguments = example({**SMALL, "tokens": 9})
        inputs = [arguments[name].requires_grad_() for name in TRAINED]
        with backend("triton"):
            grads.append(torch.autograd.grad(adaptive_rms_norm(**arguments)[0].square().sum(), inputs))
    for ours, again in zip(*grads, strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize(("added", "gated", "used"), list(itertools.product([True, False], repeat=3)))
def test_are_torch_operations(added, gated, used):
    arguments = example({"rows": (2,), "tokens": 3, "channels": 4, "added": added, "gated": gated})
    x, scale, shift, update, gate = (arguments[name] for name in TRAINED)
    tests = ("test_schema", "test_faketensor")
    with backend("reference"):
        forward = torch.ops.pronghorn.adaptive_rms_norm.default
        torch.library.opcheck(forward, (x, scale, shift, update, gate, 1e-6), test_utils=tests)
        backward = torch.ops.pronghorn.adaptive_rms_norm_gradients.default
        torch.library.opcheck(backward, (x, x if used else None, x, scale, update, gate, 1e-6), test_utils=tests)


def test_training_compiles_without_a_graph_break():
    arguments = example(SMALL)

    def loss(*tensors):
        out, total = adaptive_rms_norm(**dict(zip(TRAINED, tensors, strict=True)))
        return out.square().sum() + total.sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        tensors = [arguments[name].detach().clone().requires_grad_() for name in TRAINED]
        with backend("reference"):
            function(*tensors).backward()
        grads.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("nothing", [{"rows": (0,)}, {"tokens": 0}], ids=str)
def test_no_tokens(nothing, which):
    arguments = example({**SMALL, **nothing})
    inputs = {name: arguments[name].requires_grad_() for name in TRAINED}
    with backend(which):
        out, total = adaptive_rms_norm(**inputs)
        (out.sum() + total.sum()).backward()
    assert out.shape == total.shape == arguments["x"].shape
    assert not inputs["scale"].grad.any()


def arguments_of(**changes):
    x, vector = torch.ones(2, 3, 4), torch.ones(2, 4)
    return {"x": x, "scale": vector, "shift": vector, "update": x, "gate": vector, **changes}


@pytest.mark.parametrize(
    ("changes", "kind", "named"),
    [
        ({"x": [1.0]}, TypeError, r"x: got list, wanted a torch\.Tensor"),
        ({"x": torch.ones(4)}, ValueError, r"x: got shape \(4,\), wanted at least 2 dimensions"),
        ({"x": torch.ones(2, 3, 4).int()}, TypeError, r"x: got torch\.int32"),
        ({"x": torch.ones(2, 3, 0)}, ValueError, "x: got no channels"),
        ({"scale": None}, TypeError, "scale: got NoneType"),
        ({"scale": torch.ones(4)}, ValueError, r"scale: got shape \(4,\), wanted \(2, 4\)"),
        ({"scale": torch.ones(2, 4).long()}, TypeError, r"scale: got torch\.int64"),
        ({"shift": torch.ones(2, 3)}, ValueError, r"shift: got shape \(2, 3\), wanted \(2, 4\)"),
        ({"shift": torch.ones(2, 4, device="meta")}, ValueError, "shift: is on meta"),
        ({"gate": torch.ones(2, 3, 4)}, ValueError, r"gate: got shape \(2, 3, 4\), wanted \(2, 4\)"),
        ({"update": None}, ValueError, "gate: got a tensor without an update, wanted None"),
        ({"update": torch.ones(2, 3, 5)}, ValueError, r"update: got shape \(2, 3, 5\), wanted \(2, 3, 4\)"),
        ({"update": torch.ones(2, 3, 4).half()}, TypeError, r"update: got torch\.float16, wanted that of x"),
        ({"eps": 0.0}, ValueError, r"eps: got 0\.0, wanted a positive number"),
    ],
)
def test_bad_arguments(changes, kind, named):
    with pytest.raises(kind, match=named):
        adaptive_rms_norm(**arguments_of(**changes))
