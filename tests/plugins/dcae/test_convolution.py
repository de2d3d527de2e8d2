"""Convolutions of the fast form against PyTorch's own, layer after layer."""

import copy
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

from pronghorn.dcae.diffusers import fused_convolution
from pronghorn.dcae.diffusers.convolution import convolved, convolved_cells, shuffled_weight, unshuffling_weight
from pronghorn.dcae.diffusers.fused_convolution import FusedConvolutions

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


@pytest.fixture
def frontend(monkeypatch):
    """cuDNN's frontend where it may not be installed; without a GPU nothing in it is called."""
    if DEVICE.type == "cpu":
        monkeypatch.setitem(sys.modules, "cudnn", types.ModuleType("cudnn"))


def test_without_the_frontend_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(ImportError, match=r"nvidia-cudnn-frontend is not installed; pip install 'pronghorn\[cudnn\]'"):
        FusedConvolutions()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kernel", "options"), [(3, {}), (1, {}), (3, {"bias": False}), (3, {"groups": 2})])
def test_fused_is_what_it_is_in_turn(kernel, options, dtype, frontend):
    """On a CPU it is `convolved`; on a GPU cuDNN's kernels, within half precision's rounding of a result."""
    conv, x = example(16, 32, (6, 5), kernel, **options)
    conv, x = conv.to(dtype, memory_format=torch.channels_last), x.to(dtype, memory_format=torch.channels_last)
    fused, limit = FusedConvolutions(), {"rtol": 8 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    bias = conv.bias is not None
    for residual in (None, torch.randn_like(conv(x))):
        for activation in (None, "relu", "silu")[: 3 if bias else 1]:
            wanted = convolved(conv.float(), x.float(), residual=None if residual is None else residual.float(),
                               activation=activation)  # fmt: skip
            given = {"residual": residual, "activation": activation}
            for _ in range(2):  # searched for, and found again
                torch.testing.assert_close(fused(conv.to(dtype), x, **given).float(), wanted, **limit)
    searched = DEVICE.type == "cuda" and dtype != torch.float32 and kernel == 3 and not options.get("groups")
    assert len(fused._fastest) == ((6 if bias else 2) if searched else 0)


@torch.no_grad()
def test_the_fastest_is_searched_for_once_for_a_shape(monkeypatch, frontend):
    conv, _ = example(4, 6, (6, 5))
    conv = conv.to("cpu", torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(1, 4, 6, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    seconds = {"first": 3.0, "second": 1.0}  # PyTorch's way takes 2
    asked, ran = [], []

    def plan(name):
        def run(x, weight, bias, residual):
            ran.append(name)
            return convolved(conv, x, weight=weight, bias=bias, residual=residual)

        run.took = seconds[name]
        return run

    def plans(self, conv, x, *given):
        asked.append(tuple(x.shape))
        return [plan("first"), plan("second")]

    monkeypatch.setattr(fused_convolution, "in_cudnn", lambda x: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(FusedConvolutions, "_plans", plans)
    monkeypatch.setattr(fused_convolution, "_seconds", lambda call: getattr(call.func, "took", 2.0))
    monkeypatch.setattr(fused_convolution, "KEPT", 2)
    fused, capturing = FusedConvolutions(), True
    assert torch.equal(fused(conv, x), convolved(conv, x))
    assert not asked  # nothing can be timed while a graph is recorded
    capturing = False
    for _ in range(2):
        assert torch.equal(fused(conv, x), convolved(conv, x))
    assert (asked, ran) == ([(1, 4, 6, 5)], ["second", "second"])
    seconds["second"] = 2.5
    for batch in (2, 3):
        more = x.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        assert torch.equal(fused(conv, more), convolved(conv, more))
    assert len(asked) == 3
    assert len(ran) == 2  # PyTorch's way was the fastest
    fused(conv, x)
    assert len(asked) == 4  # the oldest of three was forgotten
    assert copy.deepcopy(fused)._fastest == {}
