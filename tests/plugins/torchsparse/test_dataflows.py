"""All ways to compute a convolution agree, forwards and backwards."""

import itertools

import pytest
import torch

from pronghorn.torchsparse import nn as spnn
from pronghorn.torchsparse.config import DATAFLOWS, FETCH_ON_DEMAND, GATHER_SCATTER, IMPLICIT_GEMM, ConvConfig
from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.nn.functional import conv3d
from pronghorn.torchsparse.tensor import SparseTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = ConvConfig()
CONFIGS = [
    *(ConvConfig(ifsort=True, split_mask_num=a, split_mask_num_bwd=b) for a, b in itertools.product((1, 2, 3), (1, 4))),
    ConvConfig(kmap_mode="grid"),
    *(ConvConfig(GATHER_SCATTER, epsilon=e, mm_thresh=m) for e, m in ((0.0, 0), (0.5, 0), (0.3, 50), (1.0, 10000))),
    ConvConfig(FETCH_ON_DEMAND),
]  # fmt: skip
# kernel size, stride, padding, dilation
LAYERS = {"3": (3, 1, 0, 1), "2": (2, 1, 0, 1), "down3": (3, 2, 1, 1), "down2": (2, 2, 0, 1), "wide": (3, 1, 0, 2),
          "flat": ((1, 3, 1), (1, 2, 1), 0, 1)}  # fmt: skip


def tensor(dtype=torch.float32, sites=150, channels=5, sizes=(2, 7, 6, 8)):
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(torch.Size(sizes).numel(), generator=generator)[:sites]
    coords = torch.stack(torch.unravel_index(places, sizes), dim=1).int()
    feats = torch.randn(sites, channels, generator=generator, dtype=dtype)
    return SparseTensor(feats.to(DEVICE).requires_grad_(), coords.to(DEVICE), spatial_range=sizes)


def layer(knobs, config, transposed=False, dtype=torch.float32):
    torch.manual_seed(3)
    channels = (6, 5) if transposed else (5, 6)
    return spnn.Conv3d(*channels, *knobs, config=config, transposed=transposed).to(DEVICE, dtype)


def results(knobs, config, back):
    """Output, gradient of the features and of the weights; of a layer, or of it and the way back."""
    x = tensor()
    layers = [layer(knobs, config), *([layer(knobs, config, transposed=True)] if back else [])]
    y = x
    for step in layers:
        y = step(y)
    weights = [step.kernel for step in layers]
    noise = torch.randn(y.feats.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    return [y.feats, *torch.autograd.grad((y.feats * noise).sum(), [x.feats, *weights])]


@pytest.fixture(autouse=True)
def exactly(monkeypatch):
    monkeypatch.setattr(settings, "allow_tf32", False)


@pytest.mark.parametrize("knobs", LAYERS.values(), ids=LAYERS)
def test_all_ways_agree(knobs):
    for back in (False, True) if knobs[1] != 1 else (False,):
        wanted = results(knobs, PLAIN, back)
        for config in CONFIGS:
            for ours, theirs in zip(results(knobs, config, back), wanted, strict=True):
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), config


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_kernels_of_125_offsets(dataflow):
    knobs = (5, 1, 0, 1)
    wanted = results(knobs, PLAIN, False)
    for config in (ConvConfig(dataflow), ConvConfig(dataflow, ifsort=True), ConvConfig(dataflow, mm_thresh=100)):
        for ours, theirs in zip(results(knobs, config, False), wanted, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("knobs", [(3, 1, 0, 1), (3, 2, 1, 1), (2, 1, 0, 1)], ids=str)
@pytest.mark.parametrize(
    "config", [PLAIN, ConvConfig(ifsort=True, split_mask_num=2), ConvConfig(GATHER_SCATTER, epsilon=0.5, mm_thresh=9),
               ConvConfig(GATHER_SCATTER), ConvConfig(FETCH_ON_DEMAND)], ids=lambda config: config.dataflow
)  # fmt: skip
def test_gradients_are_right(config, knobs):
    x = tensor(torch.float64, 8, 2, (2, 3, 3, 2))
    weight = torch.randn(knobs[0] ** 3, 2, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def function(feats, weight, bias):
        return conv3d(x.replace(feats), weight, knobs[0], bias, *knobs[1:], config=config).feats

    assert torch.autograd.gradcheck(function, (x.feats, weight, bias), nondet_tol=1e-10)


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_only_what_needs_a_gradient_gets_one(dataflow):
    x, step = tensor(), layer(LAYERS["3"], ConvConfig(dataflow))
    x.feats.requires_grad_(False)
    step(x).feats.sum().backward()
    assert x.feats.grad is None
    assert step.kernel.grad is not None
    step.kernel.requires_grad_(False)
    step.kernel.grad = None
    x.feats.requires_grad_()
    step(x).feats.sum().backward()
    assert x.feats.grad is not None
    assert step.kernel.grad is None


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("knobs", LAYERS.values(), ids=LAYERS)
def test_no_sites_and_one(dataflow, knobs):
    step = layer(knobs, ConvConfig(dataflow))
    for sites in (0, 1):
        x = tensor(sites=sites)
        y = step(x)
        assert y.feats.shape[1] == 6
        y.feats.sum().backward()
        assert x.feats.grad.shape == (sites, 5)
        assert step.kernel.grad.isfinite().all()


def test_a_map_of_inference_serves_training():
    x, step = tensor(), layer(LAYERS["3"], ConvConfig(ifsort=True))
    with torch.no_grad():
        wanted = step(x)
    found = step(x)
    assert torch.equal(found.feats, wanted.feats)
    found.feats.sum().backward()
    assert x.feats.grad.abs().sum() > 0


def test_deterministic_ways_are_the_same(monkeypatch):
    step = layer(LAYERS["3"], ConvConfig(FETCH_ON_DEMAND))
    wanted = layer(LAYERS["3"], ConvConfig(IMPLICIT_GEMM))(tensor()).feats
    monkeypatch.setattr(settings, "deterministic", True)
    found = step(tensor()).feats
    assert torch.equal(step(tensor()).feats, found)
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize(("dtype", "far"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_sixteen_bits(dataflow, dtype, far):
    x, step = tensor(), layer(LAYERS["3"], ConvConfig(dataflow))
    wanted = step(x).feats
    found = step.to(dtype)(x.replace(x.feats.to(dtype))).feats
    assert found.dtype == dtype
    assert (found.float() - wanted).abs().max() <= far * wanted.abs().max()
