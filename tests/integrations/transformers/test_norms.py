"""RMS norms are known by what they compute, and replaced by PyTorch's own."""

import pytest
import torch
from tests.models import tiny_model, token_ids
from torch import nn

from pronghorn.transformers.norms import find_rms_norms

NORMS = {"llama": 5, "qwen2": 5, "phi3": 5, "gemma2": 0, "opt": 0, "cohere": 0}  # two a block and the last


@pytest.mark.parametrize("family", NORMS)
def test_which_norms_are_found(family):
    model = tiny_model(family)
    found = find_rms_norms(model)
    assert len(found) == NORMS[family]
    ids = token_ids(1, 6)
    with torch.no_grad():
        wanted = model(ids).logits
        for name, norm in found.items():
            assert norm.weight is model.get_submodule(name).weight
            model.set_submodule(name, norm)
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert not find_rms_norms(model)


class Scaled(nn.Module):
    """Looks like a norm and is none."""

    def __init__(self, times, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.eps, self.times = eps, times

    def forward(self, x):
        return self.times(x, self.weight, self.eps)


@pytest.mark.parametrize(
    "times",
    [
        lambda x, w, eps: x * w,
        lambda x, w, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * w,  # without epsilon
        lambda x, w, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + w),
        lambda x, w, eps: nn.functional.layer_norm(x, (16,), w, None, eps),
        lambda x, w, eps: x[:, :8],
        lambda x, w, eps: x @ x,  # takes other shapes
    ],
)
def test_what_computes_something_else_is_left(times):
    assert not find_rms_norms(nn.Sequential(Scaled(times)))


def test_an_rms_norm_is_found_in_every_dtype():
    def rms(x, w, eps):
        wide = x.float()
        return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert list(find_rms_norms(nn.Sequential(Scaled(rms).to(dtype)))) == ["0"]
