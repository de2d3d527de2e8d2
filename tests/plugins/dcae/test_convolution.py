"""Convolutions of the fast form against PyTorch's own, layer after layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pronghorn.dcae.diffusers.convolution import convolved, convolved_cells, shuffled_weight, unshuffling_weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(1, 1), (2, 5), (6, 3)]


def example(given, channels, size, kernel=3, **options):
    torch.manual_seed(0)
    return nn.Conv2d(given, channels, kernel, padding=kernel // 2, **options).to(DEVICE), torch.randn(
        2, given, *size, device=DEVICE
    )


@torch.no_grad()
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    ("kernel", "options"), [(3, {}), (1, {}), (3, {"stride": 2}), (3, {"groups": 2}), (1, {"bias": False})]
)
def test_what_follows_a_convolution(kernel, options, added, activation):
    conv, x = example(4, 6, (6, 5), kernel, **options)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = conv(x)
        residual = torch.randn_like(y) if added else None
        wanted = y if residual is None else y + residual
        wanted = {None: wanted, "relu": wanted.relu(), "silu": functional.silu(wanted)}[activation]
        found = convolved(conv.to(memory_format=layout), x.contiguous(memory_format=layout), residual=residual,
                          activation=activation)  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert found.is_contiguous(memory_format=layout)


@torch.no_grad()
@pytest.mark.parametrize("size", [(2, 2), (4, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_that_unshuffles(size, bias):
    conv, x = example(3, 2, size, bias=bias)
    weight, of_pixels = unshuffling_weight(conv)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        for found in (functional.conv2d(given, weight, of_pixels, stride=2, padding=1),
                      convolved_cells(given, weight, of_pixels)):  # fmt: skip
            torch.testing.assert_close(found, functional.pixel_unshuffle(conv(x), 2), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_of_doubled_pixels(size, bias):
    conv, x = example(3, 2, size, bias=bias)
    weight, of_pixels = shuffled_weight(conv)
    found = functional.pixel_shuffle(functional.conv2d(x, weight, of_pixels, padding=1), 2)
    torch.testing.assert_close(found, conv(functional.interpolate(x, scale_factor=2.0)), rtol=1e-5, atol=1e-6)
