"""The gated depthwise convolution: memory formats, borders, tiles, gradients, bad input."""

import pytest
import torch
from tests.kernels.harness import DEVICE, backend
from torch.nn import functional

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.gated_depthwise_conv import gated_depthwise_conv
from pronghorn.kernels.gated_depthwise_conv.triton import _plan

BACKENDS = ["reference", "triton"]
SHAPES = [(2, 6, 5, 7), (1, 10, 1, 1), (1, 4, 9, 1), (1, 4, 1, 9), (1, 2, 11, 18)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def steps(tensor):
    return torch.stack([tensor, tensor * 2], dim=-1)[..., 0]


def few_channels(tensor):
    """Of more channels, adjacent: neither of the formats."""
    return channels_last(torch.cat([tensor, tensor * 2], dim=1))[:, : tensor.shape[1]]


FORMS = [torch.Tensor.contiguous, channels_last, steps, few_channels]


def example(shape):
    return random(*shape), random(shape[1], 1, 3, 3, seed=1) / 3, random(shape[1], seed=2)


def by_definition(x, weight, bias):
    sums = functional.conv2d(functional.silu(x), weight, bias, padding=1, groups=x.shape[1])
    value, gate = sums.chunk(2, dim=1)
    return value * functional.silu(gate)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_format_changes_nothing_and_is_kept(shape, form, which):
    x, weight, bias = example(shape)
    with backend(which):
        found = gated_depthwise_conv(form(x), weight, bias)
        plain = gated_depthwise_conv(form(x), weight)
    last = form is channels_last or form is few_channels
    assert found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert found.shape == (shape[0], shape[1] // 2, *shape[2:])
    assert relative_error(found, by_definition(x.double(), weight.double(), bias.double())) < 1e-6
    assert relative_error(plain, by_definition(x.double(), weight.double(), None)) < 1e-6


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", [torch.Tensor.contiguous, channels_last])
def test_the_first_half_is_the_value(form, which):
    """A kernel that is its centre alone, with another number for values and for gates."""
    x, weight = random(1, 4, 3, 3), torch.zeros(4, 1, 3, 3, device=DEVICE)
    weight[:2, :, 1, 1], weight[2:, :, 1, 1] = 2, 3
    with backend(which):
        found = gated_depthwise_conv(form(x), weight)
    value, gate = functional.silu(x).chunk(2, dim=1)
    assert relative_error(found, 2 * value * functional.silu(3 * gate)) < 1e-6


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", [torch.Tensor.contiguous, channels_last])
def test_every_tap_is_where_it_belongs(form, which):
    """One pixel set: its neighbours show the kernel upside down, and nothing goes around a border."""
    weight = torch.zeros(2, 1, 3, 3, device=DEVICE)
    weight[0] = torch.arange(1.0, 10, device=DEVICE).view(3, 3)
    for row, column in ((3, 4), (0, 0), (5, 8), (0, 8), (5, 0)):
        x = torch.zeros(1, 2, 6, 9, device=DEVICE)
        x[0, :, row, column] = 1
        with backend(which):
            found = gated_depthwise_conv(form(x), weight, torch.tensor([0.0, 1.0], device=DEVICE))
        one, gate = functional.silu(torch.ones(2, device=DEVICE))
        wanted = torch.zeros(8, 11, device=DEVICE)
        wanted[row : row + 3, column : column + 3] = weight[0, 0].flip(0, 1) * one * gate
        assert torch.allclose(found[0, 0], wanted[1:-1, 1:-1], rtol=1e-5)


@pytest.mark.parametrize("form", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize(("most", "fewest", "busy"), [(8, 4, 0), (1, 1, 0), (2, 1, 0), (8, 2, 10**9)])
def test_rows_of_a_program(most, fewest, busy, form, monkeypatch):
    """One program for all, with rows to spare; a row for each; two; and as few as there may be."""
    from pronghorn.kernels.gated_depthwise_conv import triton

    for name, value in (("MOST_ROWS", most), ("FEWEST_ROWS", fewest), ("BUSY", busy)):
        monkeypatch.setattr(triton, name, value)
    monkeypatch.setattr(triton, "MOST_CHANNELS", {True: 2, False: 2})
    monkeypatch.setattr(triton, "ELEMENTS", 4)
    monkeypatch.setattr(triton, "_plan", triton._plan.__wrapped__)  # those kept have other tiles
    arguments = example((2, 6, 5, 11))
    with backend("triton"):
        found = gated_depthwise_conv(form(arguments[0]), *arguments[1:])
    assert relative_error(found, by_definition(*(tensor.double() for tensor in arguments))) < 1e-6


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_are_autograd_s(biased, form, which):
    dtype = torch.float64 if which == "reference" else torch.float32
    for shape in SHAPES:
        tensors = example(shape)[: 3 if biased else 2]
        exact = [tensor.double().requires_grad_() for tensor in tensors]
        grad = random(shape[0], shape[1] // 2, *shape[2:], seed=9)
        wanted = torch.autograd.grad(by_definition(*exact, *([] if biased else [None])), exact, grad.double())
        given = [tensor.to(dtype) for tensor in tensors]
        given = [tensor.requires_grad_() for tensor in (form(given[0]), *given[1:])]
        with backend(which):
            found = torch.autograd.grad(gated_depthwise_conv(*given), given, channels_last(grad.to(dtype)))
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == dtype
            assert relative_error(ours, theirs) < (1e-12 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("which", BACKENDS)
def test_dtypes_of_gradients(which):
    x, weight, bias = example((1, 4, 3, 3))
    given = [tensor.requires_grad_() for tensor in (x.half(), weight, bias.half())]
    with backend(which):
        y = gated_depthwise_conv(*given)
        y.sum().backward()
    assert y.dtype == torch.float16
    assert [tensor.grad.dtype for tensor in given] == [torch.float16, torch.float32, torch.float16]


@pytest.mark.parametrize("which", BACKENDS)
def test_large_values_stay_numbers(which):
    """exp(-x) of -200 is no float32, and a sum of nine is no float16."""
    x = torch.full((1, 2, 3, 3), -200.0, device=DEVICE, dtype=torch.float16)
    big = torch.full((1, 2, 3, 3), 60000.0, device=DEVICE, dtype=torch.float16)
    weight = torch.ones(2, 1, 3, 3, device=DEVICE)
    weight[1] = 1e-7
    with backend(which):
        assert not gated_depthwise_conv(x, weight).any()
        found = gated_depthwise_conv(big, weight)
    assert relative_error(found, by_definition(big.double(), weight.double(), None)) < 1e-3
    assert found.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_as_torch_operations(form):
    for shape in SHAPES:
        x, weight, bias = example(shape)
        x, checks = form(x), ("test_schema", "test_faketensor")
        grad = random(shape[0], shape[1] // 2, *shape[2:])
        operations = torch.ops.pronghorn
        with backend("reference"):
            for given in (bias, None):
                torch.library.opcheck(operations.gated_depthwise_conv.default, (x, weight, given), test_utils=checks)
                torch.library.opcheck(
                    operations.gated_depthwise_conv_gradients.default, (x, grad, weight, given), test_utils=checks
                )


def test_gradients_when_compiled():
    given = [tensor.requires_grad_() for tensor in example((2, 6, 3, 4))]

    def call(x, weight, bias):
        return gated_depthwise_conv(channels_last(x), weight, bias)

    with backend("reference"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*given).square().sum(), given)
        wanted = torch.autograd.grad(call(*given).square().sum(), given)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("which", BACKENDS)
def test_no_images(which):
    with backend(which):
        assert gated_depthwise_conv(random(0, 4, 2, 2), random(4, 1, 3, 3)).shape == (0, 2, 2, 2)


def test_bad_input_is_named():
    x, weight, bias = example((1, 4, 2, 3))
    with pytest.raises(TypeError, match=r"x: got list, wanted a torch\.Tensor"):
        gated_depthwise_conv([1.0], weight)
    with pytest.raises(ValueError, match=r"x: got shape \(4, 2, 3\), wanted 4 dimensions"):
        gated_depthwise_conv(x[0], weight)
    with pytest.raises(TypeError, match=r"x: got torch\.int64, wanted a floating-point dtype"):
        gated_depthwise_conv(x.long(), weight)
    with pytest.raises(ValueError, match="x: got 3 channels, wanted an even number, of values and of gates"):
        gated_depthwise_conv(x[:, :3], weight)
    with pytest.raises(ValueError, match=r"weight: got shape \(4, 1, 3, 2\), wanted \(4, 1, 3, 3\)"):
        gated_depthwise_conv(x, weight[..., :2])
    with pytest.raises(TypeError, match=r"weight: got torch\.int64, wanted a floating-point dtype"):
        gated_depthwise_conv(x, weight.long())
    with pytest.raises(ValueError, match="weight: is on meta"):
        gated_depthwise_conv(x, weight.to("meta"))
    with pytest.raises(ValueError, match=r"bias: got shape \(2,\), wanted \(4,\)"):
        gated_depthwise_conv(x, weight, bias[:2])
    with pytest.raises(TypeError, match=r"bias: got torch\.int64, wanted a floating-point dtype"):
        gated_depthwise_conv(x, weight, bias.long())


@pytest.mark.parametrize(("height", "rows"), [(1, 1), (5, 8), (8, 8), (64, 64), (200, 64)])
def test_a_program_goes_through_the_rows_of_an_image(height, rows):
    """Rows below it would take as long as others: eight times too long where an image has eight."""
    _, (_, _, found), *_ = _plan(torch.Size((64, 8192, height, 8)), True, torch.bfloat16, False)
    assert found == rows
