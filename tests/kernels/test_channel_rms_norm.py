"""RMS norm over channels: memory formats, what may be left out, gradients, bad input."""

import itertools

import pytest
import torch
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.channel_rms_norm import ACTIVATIONS, channel_rms_norm

BACKENDS = ["reference", "triton"]
SHAPES = [(2, 12, 5, 7), (1, 33, 1, 1), (2, 9, 4, 16), (2, 6, 11), (3, 20, 1)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def channels_last(tensor):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def steps(tensor):
    return torch.stack([tensor, tensor * 2], dim=-1)[..., 0]


def few_channels(tensor):
    """Of more channels, adjacent: neither of the formats."""
    return channels_last(torch.cat([tensor, tensor * 2], dim=1))[:, : tensor.shape[1]]


def example(shape, dtype=torch.float32):
    x, residual = random(*shape, dtype=dtype) * 3, random(*shape, seed=1, dtype=dtype)
    weight, bias = random(2, shape[1], seed=2)
    return x, weight, bias, residual


def by_definition(x, weight, bias, residual, activation, eps=1e-5):
    vectors = [None if vector is None else vector.view(-1, *[1] * (x.dim() - 2)) for vector in (weight, bias)]
    y = x / (x.square().mean(dim=1, keepdim=True) + eps).sqrt() * vectors[0]
    y = y if bias is None else y + vectors[1]
    y = y if residual is None else y + residual
    return {None: lambda y: y, "relu": torch.relu, "silu": torch.nn.functional.silu}[activation](y)


def small_tiles(monkeypatch):
    """So that small problems have several, of channels, of pixels and of rows in a part."""
    from pronghorn.kernels.channel_rms_norm import triton

    for name, size in (
        ("ELEMENTS", 64), ("GRADIENT_ELEMENTS", 32), ("PIXELS", 8), ("CHANNELS_AT_ONCE", 4), ("GRADIENT_CHANNELS", 4),
        ("PARTS", 3),
    ):  # fmt: skip
        monkeypatch.setattr(triton, name, size)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [torch.Tensor.contiguous, channels_last, steps, few_channels])
def test_a_format_changes_nothing_and_is_kept(form, shape, which, monkeypatch):
    small_tiles(monkeypatch)
    x, weight, bias, residual = example(shape)
    wanted = by_definition(*(tensor.double() for tensor in (x, weight, bias, residual)), "silu")
    for form_of_residual in (torch.Tensor.contiguous, channels_last, steps):
        given = {"residual": form_of_residual(residual), "activation": "silu"}
        with backend(which):
            found = channel_rms_norm(form(x), weight, bias, **given)
        assert relative_error(found, wanted) < 1e-6
        if form is channels_last or form is few_channels:
            assert found.movedim(1, -1).is_contiguous()
        else:
            assert found.is_contiguous()
        if form is channels_last:
            assert found.stride() == form(x).stride()


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("biased", "added"), list(itertools.product([False, True], repeat=2)))
def test_what_may_be_left_out(biased, added, activation, which):
    for form in (torch.Tensor.contiguous, channels_last):
        x, weight, bias, residual = example((2, 10, 3, 5))
        bias, residual = bias if biased else None, residual if added else None
        with backend(which):
            found = channel_rms_norm(form(x), weight, bias, residual=residual, activation=activation)
        exact = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, residual)]
        assert relative_error(found, by_definition(*exact, activation)) < 1e-6


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", [torch.Tensor.contiguous, channels_last, steps])
@pytest.mark.parametrize(("biased", "added"), [(True, True), (False, True), (True, False), (False, False)])
def test_gradients_are_autograd_s(biased, added, form, activation, which, monkeypatch):
    small_tiles(monkeypatch)
    dtype = torch.float64 if which == "reference" else torch.float32
    for shape in SHAPES[:1] if biased != added else SHAPES:
        chosen = [0, 1, *([2] if biased else []), *([3] if added else [])]

        def call(function, tensors, chosen=chosen):
            x, weight, bias, residual = [
                tensors[chosen.index(index)] if index in chosen else None for index in range(4)
            ]  # fmt: skip
            return function(x, weight, bias, residual)

        grad = random(*shape, seed=9)
        exact = [example(shape)[index].double().requires_grad_() for index in chosen]
        out = call(lambda x, w, b, r: by_definition(x, w, b, r, activation), exact)
        wanted = torch.autograd.grad(out, exact, grad.double())
        given = [exact[0].detach().to(dtype), *(tensor.detach().to(dtype) for tensor in exact[1:])]
        given[0] = form(given[0])
        given = [tensor.requires_grad_() for tensor in given]
        with backend(which):
            out = call(lambda x, w, b, r: channel_rms_norm(x, w, b, residual=r, activation=activation), given)
            found = torch.autograd.grad(out, given, channels_last(grad.to(dtype)))
        for ours, theirs, to in zip(found, wanted, given, strict=True):
            assert ours.dtype == to.dtype
            assert relative_error(ours, theirs) < (1e-12 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("which", BACKENDS)
def test_dtypes_of_gradients(which):
    x, weight, bias, residual = example((1, 8, 3, 3), torch.float16)
    given = [x, weight, bias.half(), residual.float()]
    for activation in (None, "silu"):
        tensors = [tensor.clone().requires_grad_() for tensor in given]
        with backend(which):
            y = channel_rms_norm(*tensors[:3], residual=tensors[3], activation=activation)
            y.sum().backward()
        assert y.dtype == torch.float16
        assert [tensor.grad.dtype for tensor in tensors] == [tensor.dtype for tensor in given]


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", [torch.Tensor.contiguous, channels_last])
def test_squares_beyond_the_dtype(form, which):
    """1000 squared is no float16."""
    x, weight = form(random(1, 16, 2, 3, dtype=torch.float16) * 1000), torch.ones(16, device=DEVICE)
    with backend(which):
        found = channel_rms_norm(x, weight)
    assert relative_error(found, by_definition(x.double(), weight.double(), None, None, None)) < 1e-3


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", [torch.Tensor.contiguous, channels_last])
def test_eps_keeps_zeros(form, which):
    x, weight = form(torch.zeros(1, 4, 2, 2, device=DEVICE)), torch.ones(4, device=DEVICE)
    with backend(which):
        assert not channel_rms_norm(x, weight).any()
        found = channel_rms_norm(x + 1, weight, eps=3.0)
    assert torch.allclose(found, torch.full_like(found, 0.5))


@pytest.mark.parametrize("form", [torch.Tensor.contiguous, channels_last, steps, few_channels])
def test_as_torch_operations(form):
    for shape, activation in itertools.product(SHAPES[:3], [None, "silu"]):
        x, weight, bias, residual = example(shape)
        x = form(x)
        for left_out in (residual, None):
            with backend("reference"):
                torch.library.opcheck(
                    torch.ops.pronghorn.channel_rms_norm.default, (x, weight, bias, left_out, 1e-5, activation),
                    test_utils=("test_schema", "test_faketensor"),
                )  # fmt: skip
                torch.library.opcheck(
                    torch.ops.pronghorn.channel_rms_norm_gradients.default,
                    (x, residual, weight, bias, left_out, 1e-5, activation),
                    test_utils=("test_schema", "test_faketensor"),
                )  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_when_compiled(activation):
    given = [tensor.requires_grad_() for tensor in example((2, 6, 3, 4))]

    def call(x, weight, bias, residual):
        return channel_rms_norm(channels_last(x), weight, bias, residual=residual, activation=activation)

    with backend("reference"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*given).square().sum(), given)
        wanted = torch.autograd.grad(call(*given).square().sum(), given)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("which", BACKENDS)
def test_no_images(which):
    with backend(which):
        assert channel_rms_norm(random(0, 4, 2, 2), random(4)).shape == (0, 4, 2, 2)


def test_bad_input_is_named():
    x, weight, bias, residual = example((1, 4, 2, 3))
    with pytest.raises(TypeError, match=r"x: got list, wanted a torch\.Tensor"):
        channel_rms_norm([1.0], weight)
    with pytest.raises(ValueError, match=r"x: got shape \(4, 3\), wanted 3 or 4 dimensions"):
        channel_rms_norm(x[0, :, 0], weight)
    with pytest.raises(TypeError, match=r"x: got torch\.int64, wanted a floating-point dtype"):
        channel_rms_norm(x.long(), weight)
    with pytest.raises(TypeError, match=r"weight: got NoneType, wanted a torch\.Tensor"):
        channel_rms_norm(x, None)
    with pytest.raises(ValueError, match=r"weight: got shape \(3,\), wanted \(4,\)"):
        channel_rms_norm(x, weight[:3])
    with pytest.raises(TypeError, match=r"bias: got torch\.int64, wanted a floating-point dtype"):
        channel_rms_norm(x, weight, bias.long())
    with pytest.raises(ValueError, match=r"bias: got shape \(2,\), wanted \(4,\)"):
        channel_rms_norm(x, weight, bias[:2])
    with pytest.raises(ValueError, match=r"residual: got shape \(1, 4, 2, 2\), wanted \(1, 4, 2, 3\)"):
        channel_rms_norm(x, weight, residual=residual[..., :2])
    with pytest.raises(ValueError, match="residual: is on meta"):
        channel_rms_norm(x, weight, residual=residual.to("meta"))
    for eps in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"eps: got {eps}, wanted a positive number"):
            channel_rms_norm(x, weight, eps=eps)
    with pytest.raises(ValueError, match="activation: got 'gelu', accepted are None, 'relu', 'silu'"):
        channel_rms_norm(x, weight, activation="gelu")
