"""The gated GELU: as PyTorch has it, far from zero, gradients by Triton, bad input."""

import pytest
import torch
from tests.kernels.harness import DEVICE, backend
from torch.nn.functional import gelu

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.geglu import geglu

BACKENDS = ["reference", "triton"]


def halves(*shape, dtype=torch.float32, seed=0):
    joined = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return joined.chunk(2, dim=-1)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", ["halves", "apart", "steps", "expanded"])
def test_it_is_what_a_layer_computes(form, which):
    gate, up = halves(2, 3, 60)
    if form == "apart":
        gate, up = gate.contiguous(), up.contiguous()
    if form == "steps":
        gate, up = gate[..., ::2], up[..., ::2]
    if form == "expanded":
        gate, up = gate[:1].expand_as(gate), up
    with backend(which):
        found = geglu(gate, up)
    assert found.is_contiguous()
    torch.testing.assert_close(found, gelu(gate, approximate="tanh") * up, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's; infinity is right there
@pytest.mark.parametrize("which", BACKENDS)
def test_far_from_zero(which):
    gate = torch.tensor([-1e4, -30.0, -0.0, 0.0, 30.0, 1e4], device=DEVICE)
    with backend(which):
        found = geglu(gate, torch.full_like(gate, 2.0))
    assert torch.equal(found, 2 * gate.clamp(min=0))


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients(dtype, which):
    gate, up = (part.detach().requires_grad_() for part in halves(5, 2 * 1030, dtype=dtype))
    grad = torch.randn(gate.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    with backend(which):
        found = torch.autograd.grad(geglu(gate, up), (gate, up), grad)
    exact = [part.detach().double().requires_grad_() for part in (gate, up)]
    wanted = torch.autograd.grad(gelu(exact[0], approximate="tanh") * exact[1], exact, grad.double())
    assert relative_error(found, wanted) < (1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("which", BACKENDS)
def test_of_nothing_it_is_nothing(which):
    with backend(which):
        assert geglu(*halves(0, 8)).shape == (0, 4)


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), ValueError, r"up: got shape \(2, 4\), wanted \(2, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3).half(), TypeError, "up: got torch.float16, wanted that of gate"),
        (torch.ones(2, 3).int(), torch.ones(2, 3), TypeError, "gate: got torch.int32"),
        (torch.ones(2, 0), torch.ones(2, 0), ValueError, "at least 1 channel"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, "at least 1 channel"),
        (torch.ones(2, 3), [1.0], TypeError, "up: got list"),
    ],
)
def test_bad_input(gate, up, error, message):
    with pytest.raises(error, match=message):
        geglu(gate, up)
