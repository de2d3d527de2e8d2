"""Residual autoencoding: memory formats, both grids, any shape, gradients, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.harness import DEVICE, backend, error_of
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.shuffle_shortcut import shuffle_add, unshuffle_add
from pronghorn.kernels.shuffle_shortcut.cases import OPERATION

BACKENDS = ["reference", "triton"]
# Shapes of main and x of a 5x7 grid: as pixel_(un)shuffle takes it, as the other convolutions give it; factor 1.
DOWN = [((2, 3, 10, 14), (2, 6, 10, 14)), ((2, 12, 5, 7), (2, 6, 10, 14)), ((1, 8, 5, 7), (1, 2, 10, 14))]
UP = [((2, 12, 5, 7), (2, 6, 5, 7)), ((2, 3, 10, 14), (2, 6, 5, 7)), ((1, 8, 5, 7), (1, 8, 5, 7))]
CASES = [(unshuffle_add, *shapes) for shapes in DOWN] + [(shuffle_add, *shapes) for shapes in UP]
ONES = [(unshuffle_add, (2, 4, 5, 7), (2, 12, 5, 7)), (shuffle_add, (2, 12, 5, 7), (2, 4, 5, 7))]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def steps(tensor):
    return torch.stack([tensor, tensor * 2], dim=-1)[..., 0]


def few_channels(tensor):
    """Of more channels, adjacent: neither of the formats."""
    return channels_last(torch.cat([tensor, tensor * 2], dim=1))[:, : tensor.shape[1]]


def window(tensor):
    """Of a larger image, as tiles are."""
    return channels_last(torch.nn.functional.pad(tensor, (1, 2, 3, 1)))[:, :, 3:-1, 1:-2]


FORMS = [torch.Tensor.contiguous, channels_last, steps, few_channels, window]


def by_definition(function, main, x, factor=2):
    if function is unshuffle_add:
        main = pixel_unshuffle(main, factor) if main.shape[2] == x.shape[2] else main
        return main + pixel_unshuffle(x, factor).unflatten(1, (main.shape[1], -1)).mean(dim=2)
    main = pixel_shuffle(main, factor) if main.shape[2] == x.shape[2] else main
    return main + pixel_shuffle(x.repeat_interleave(main.shape[1] * factor**2 // x.shape[1], dim=1), factor)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("function", "main", "x"), CASES)
def test_a_format_changes_nothing_and_is_kept(function, main, x, form, which):
    main, x = random(*main), random(*x, seed=1)
    wanted = by_definition(function, main.double(), x.double())
    for form_of_x in FORMS if form is channels_last else [torch.Tensor.contiguous, form]:
        with backend(which):
            found = function(form(main), form_of_x(x))
        assert relative_error(found, wanted) < 1e-6
        last = form in (channels_last, few_channels, window)
        assert found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize(("function", "main", "x"), ONES)
def test_a_factor_of_one_is_of_channels_alone(function, main, x, form, which):
    main, x = random(*main), random(*x, seed=1)
    with backend(which):
        found = function(form(main), x, factor=1)
    shortcut = x.unflatten(1, (4, 3)).mean(dim=2) if function is unshuffle_add else x.repeat_interleave(3, dim=1)
    assert relative_error(found, main + shortcut) < 1e-6


@st.composite
def shapes(draw):
    """Knobs of `cases.py`: groups and repeats of 1 to 5 times what a cell has, or a part of it."""
    up, factor, shuffled = draw(st.booleans()), draw(st.sampled_from([1, 2, 3])), draw(st.booleans())
    some, times = draw(st.sampled_from([1, 2, 3, 8, 20, 64])), draw(st.sampled_from([1, 2, 4, 5]))
    part = draw(st.sampled_from([n for n in range(1, factor**2 + 1) if factor**2 % n == 0]))
    part = factor**2 if shuffled and not up else part
    given, channels = (some * part, some * times) if up else (some * times, some * part)
    return {
        "up": up, "factor": factor, "shuffled": shuffled, "given": given, "channels": channels,
        "batch": draw(st.integers(1, 3)), "channels_last": draw(st.booleans()),
        "coarse": draw(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 5, 7, 8, 16, 33, 40]))),
    }  # fmt: skip


@given(knobs=shapes(), which=st.sampled_from(BACKENDS), seed=st.integers(0, 99))
def test_any_shape(knobs, which, seed):
    for dtype in (torch.float32, torch.float16):
        assert error_of(OPERATION, knobs, dtype, which, seed) <= OPERATION.tolerance[dtype]


@pytest.mark.parametrize("form", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize(("function", "main", "x"), CASES + ONES)
def test_many_tiles_and_long_offsets(function, main, x, form, monkeypatch):
    """Tiles of a few channels and pixels, with some to spare; and offsets as of tensors beyond 2^31 elements."""
    from pronghorn.kernels.shuffle_shortcut import triton

    for name, value in (
        ("ELEMENTS", 64), ("CELLS_ELEMENTS", 32), ("MOST", 8), ("MOST_COLUMNS", 4),
    ):  # fmt: skip
        monkeypatch.setattr(triton, name, value)
    monkeypatch.setattr(triton, "_plan", triton._plan.__wrapped__)  # those kept have other tiles
    factor = 1 if (function, main, x) in ONES else 2
    main, x, bias = random(*main), random(*x, seed=1), random(main[1], seed=2)
    for largest in (triton.LARGEST, 0):
        monkeypatch.setattr(triton, "LARGEST", largest)
        with backend("triton"):
            found = function(form(main), form(x), factor=factor)
            biased = function(form(main), form(x), factor=factor, bias=bias)
        assert relative_error(found, by_definition(function, main.double(), x.double(), factor)) < 1e-6
        with_bias = main.double() + bias.double()[:, None, None]
        assert relative_error(biased, by_definition(function, with_bias, x.double(), factor)) < 1e-6


@pytest.mark.parametrize("which", BACKENDS)
def test_identities(which):
    """Of groups of one, the shortcut is pixel_unshuffle; of two, horizontal neighbours; a constant comes back."""
    x = torch.arange(2 * 4 * 4 * 6.0, device=DEVICE).view(2, 4, 4, 6)
    with backend(which):
        assert torch.equal(unshuffle_add(x.new_zeros(2, 16, 2, 3), x), pixel_unshuffle(x, 2))
        pairs = unshuffle_add(x.new_zeros(2, 8, 2, 3), x)
        assert torch.equal(pairs[:, 0], (x[:, 0, ::2, ::2] + x[:, 0, ::2, 1::2]) / 2)
        assert torch.equal(pairs[:, 1], (x[:, 0, 1::2, ::2] + x[:, 0, 1::2, 1::2]) / 2)
        assert torch.equal(shuffle_add(x.new_zeros(2, 1, 8, 12), x), pixel_shuffle(x, 2))
        constant = torch.full((1, 4, 4, 4), 3.0, device=DEVICE)
        back = shuffle_add(x.new_zeros(1, 4, 4, 4), unshuffle_add(x.new_zeros(1, 8, 2, 2), constant))
    assert torch.equal(back, constant)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", [torch.Tensor.contiguous, channels_last])
def test_sums_beyond_the_dtype(form, which):
    """Four times 60000 is no float16, and neither is what is added before it is taken off."""
    x = form(torch.full((1, 4, 2, 2), 60000.0, device=DEVICE, dtype=torch.float16))
    with backend(which):
        assert torch.equal(unshuffle_add(torch.zeros_like(x[..., :1, :1]), x), x[..., :1, :1])
        assert not shuffle_add(-x, x[:, :, :1, :1]).any()


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", FORMS[:3])
@pytest.mark.parametrize(("function", "main", "x"), CASES + ONES)
def test_gradients_are_autograd_s(function, main, x, form, which):
    factor = 1 if (function, main, x) in ONES else 2
    exact = [random(*main).double().requires_grad_(), random(*x, seed=1).double().requires_grad_()]
    out = by_definition(function, *exact, factor)
    grad = random(*out.shape, seed=9)
    wanted = torch.autograd.grad(out, exact, grad.double())
    dtype = torch.float64 if which == "reference" else torch.float32
    tensors = [form(tensor.detach().to(dtype)).requires_grad_() for tensor in exact]
    with backend(which):
        found = torch.autograd.grad(function(*tensors, factor=factor), tensors, steps(grad.to(dtype)))
        alone = [
            torch.autograd.grad(function(*(tensors[n] if n == place else tensors[n].detach() for n in (0, 1)),
                                         factor=factor), tensors[place], grad.to(dtype))[0]
            for place in (0, 1)
        ]  # fmt: skip
    for ours, theirs, same in zip(found, wanted, alone, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, same)
        assert relative_error(ours, theirs) < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize(("function", "main", "x"), CASES)
def test_the_gradient_of_a_bias(function, main, x, form, which):
    """Of any dtype, and also where nothing else has one."""
    bias = random(main[1], seed=2).double().requires_grad_()
    main, x = random(*main), random(*x, seed=1)
    out = by_definition(function, main.double() + bias[:, None, None], x.double())
    grad = random(*out.shape, seed=9)
    (wanted,) = torch.autograd.grad(out, bias, grad.double())
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        given = bias.detach().to(dtype).requires_grad_()
        with backend(which):
            (found,) = torch.autograd.grad(function(form(main), form(x), bias=given), given, grad)
        assert found.dtype == dtype
        assert relative_error(found, wanted) < bound


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(("function", "main", "x"), CASES)
def test_dtypes(function, main, x, which):
    main, x = random(*main, dtype=torch.float16).requires_grad_(), random(*x, seed=1).requires_grad_()
    with backend(which):
        y = function(main, x)
        y.sum().backward()
    assert [tensor.dtype for tensor in (y, main.grad, x.grad)] == [torch.float16, torch.float16, torch.float32]
    assert relative_error(y, by_definition(function, main.double(), x.double())) < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_as_torch_operations(form):
    operation, checks = torch.ops.pronghorn.shuffle_shortcut.default, ("test_schema", "test_faketensor")
    for function, main, x in CASES:
        main, x, up = form(random(*main)), form(random(*x)), function is shuffle_add
        channels = by_definition(function, main, x).shape[1]
        with backend("reference"):
            for added, bias in ((main, random(main.shape[1])), (main, None), (None, None)):
                for last in (True, False):
                    torch.library.opcheck(operation, (x, added, bias, channels, 2, up, 0.5, last), test_utils=checks)


@pytest.mark.parametrize(("function", "main", "x"), CASES)
def test_gradients_when_compiled(function, main, x):
    tensors = [random(*main).requires_grad_(), random(*x, seed=1).requires_grad_()]

    def call(main, x):
        return function(channels_last(main), x)

    with backend("reference"):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
        wanted = torch.autograd.grad(call(*tensors).square().sum(), tensors)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(("function", "main", "x"), CASES)
def test_no_images(function, main, x, which):
    main, x = random(*main), random(*x)
    with backend(which):
        assert function(main[:0], x[:0]).shape == (0, *function(main, x).shape[1:])


def test_bad_input_is_named():
    main, x = random(1, 8, 2, 3), random(1, 4, 4, 6)
    with pytest.raises(TypeError, match=r"main: got list, wanted a torch\.Tensor"):
        unshuffle_add([1.0], x)
    with pytest.raises(ValueError, match=r"main: got shape \(8, 2, 3\), wanted 4 dimensions"):
        unshuffle_add(main[0], x)
    with pytest.raises(TypeError, match=r"main: got torch\.int64, wanted a floating-point dtype"):
        unshuffle_add(main.long(), x)
    with pytest.raises(ValueError, match=r"x: got shape \(4, 6\), wanted 4 dimensions"):
        unshuffle_add(main, x[0, 0])
    with pytest.raises(TypeError, match=r"x: got torch\.int64, wanted a floating-point dtype"):
        unshuffle_add(main, x.long())
    with pytest.raises(ValueError, match="x: is on meta"):
        shuffle_add(x, main.to("meta"))
    with pytest.raises(ValueError, match=r"bias: got shape \(4,\), wanted \(8,\)"):
        unshuffle_add(main, x, bias=random(4))
    for factor in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match=f"factor: got {factor}, wanted a whole number from 1 on"):
            unshuffle_add(main, x, factor=factor)
    with pytest.raises(ValueError, match=r"x: got shape \(1, 4, 3, 6\), wanted a height and width that 2 divides"):
        unshuffle_add(main, x[:, :, :3])
    wanted = r"a batch of 1 and a height and width of \(4, 6\) or \(2, 3\)"
    with pytest.raises(ValueError, match=rf"main: got shape \(1, 8, 2, 2\), wanted {wanted}"):
        unshuffle_add(main[..., :2], x)
    with pytest.raises(ValueError, match=rf"main: got shape \(2, 8, 2, 3\), wanted {wanted}"):
        unshuffle_add(main.repeat(2, 1, 1, 1), x)
    wanted = r"a batch of 1 and a height and width of \(2, 3\) or \(4, 6\)"
    with pytest.raises(ValueError, match=rf"main: got shape \(1, 4, 4, 3\), wanted {wanted}"):
        shuffle_add(x[..., :3], main)
    with pytest.raises(ValueError, match="main: got 6 channels, wanted a multiple of 4"):
        shuffle_add(main[:, :6], main)
    with pytest.raises(ValueError, match="x: got 3 channels, wanted 4 times as many to be a multiple of main's 8"):
        unshuffle_add(main, x[:, :3])
    with pytest.raises(ValueError, match="x: got 4 channels, wanted 1 times as many to be a multiple of main's 8"):
        unshuffle_add(main, main[:, :4], factor=1)
    with pytest.raises(ValueError, match="x: got 3 channels, wanted a divisor of main's 8"):
        shuffle_add(main, main[:, :3])
    with pytest.raises(ValueError, match="x: got 0 channels"):
        shuffle_add(main, main[:, :0])
