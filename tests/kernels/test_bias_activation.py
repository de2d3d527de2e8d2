"""Bias, residual and activation: memory formats, large offsets within an image, gradients, bad input."""

import pytest
import torch
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.bias_activation import bias_activation

BACKENDS = ["reference", "triton"]
SHAPES = [(2, 6, 5, 7), (1, 10, 1, 1), (3, 1, 9, 4), (2, 96, 31, 5), (1, 3000, 2, 1)]
ACTIVATIONS = {None: lambda y: y, "relu": torch.relu, "silu": torch.nn.functional.silu}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def every_second(tensor):
    return torch.stack([tensor, tensor * 2], dim=-1)[..., 0]


# Only where channels lie inside does their number matter; else each is a program of its own, slow to interpret.
FORMS = [
    (shape, form)
    for shape in SHAPES
    for form in (torch.Tensor.contiguous, channels_last, every_second)
    if form is channels_last or shape[1] < 1000
]


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(("shape", "form"), FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_what_it_says(shape, form, which, activation):
    x, bias, residual = random(*shape), random(shape[1], seed=1), random(*shape, seed=2)
    with backend(which):
        found = bias_activation(form(x), bias, residual=residual, activation=activation)
        alone = bias_activation(form(x), activation=activation)
    wanted = ACTIVATIONS[activation](x.double() + bias.double()[:, None, None] + residual.double())
    assert relative_error(found, wanted) < 1e-6
    assert relative_error(alone, ACTIVATIONS[activation](x.double())) < 1e-6
    layout = torch.channels_last if form is channels_last else torch.contiguous_format
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once(which, dtype):
    x, bias, residual = (random(*shape, dtype=dtype) for shape in ((2, 6, 5, 7), (6,), (2, 6, 5, 7)))
    with backend(which):
        found = bias_activation(x, bias, residual=residual)
    wanted = x.double() + bias.double()[:, None, None] + residual.double()
    assert relative_error(found, wanted) < torch.finfo(dtype).eps / 2


def test_gradients():
    x, residual = (random(2, 3, 4, 5, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(2))
    bias = random(3, seed=2, dtype=torch.float64).requires_grad_()
    for activation in ACTIVATIONS:
        given = (x, bias, residual)
        assert torch.autograd.gradcheck(
            lambda x, b, r, a=activation: bias_activation(x, b, residual=r, activation=a), given
        )


def test_no_image_is_no_error():
    assert bias_activation(torch.zeros(0, 3, 4, 4), torch.zeros(3)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, ValueError, "x"), ({"bias": torch.zeros(4)}, ValueError, "bias"),
        ({"residual": torch.zeros(1, 3, 4, 5)}, ValueError, "residual"),
        ({"activation": "gelu"}, ValueError, "accepted are None, 'relu' and 'silu'"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, TypeError, "x"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changed, error, message):
    given = {"x": torch.zeros(1, 3, 4, 4), "bias": torch.zeros(3), "residual": None, "activation": None, **changed}
    with pytest.raises(error, match=message):
        bias_activation(given.pop("x"), given.pop("bias"), **given)
