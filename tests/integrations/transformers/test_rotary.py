"""Rotary embeddings are known by what they compute, and become one kernel in the `forward` that calls them."""

import pytest
import torch
from tests.models import tiny_model, token_ids
from torch import nn

from pronghorn.transformers import rotary
from pronghorn.transformers.rotary import find_rotary

# Two layers each; Phi-3 and GPT-NeoX may turn a part of the channels, OPT has none, Cohere pairs neighbours.
FAMILIES = {
    "llama": 2,
    "mistral": 2,
    "qwen2": 2,
    "qwen3": 2,
    "gemma2": 2,
    "mixtral": 2,
    "opt": 0,
    "bloom": 0,
    "cohere": 0,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_which_are_found(family, monkeypatch):
    calls = []
    original = rotary.rotary_embedding
    monkeypatch.setattr(rotary, "rotary_embedding", lambda *given: calls.append(1) or original(*given))
    model = tiny_model(family)
    found = find_rotary(model)
    assert len(found) == FAMILIES[family]
    ids = token_ids(2, 6)
    calls.clear()
    with torch.no_grad():
        wanted = model(ids).logits
        assert not calls
        for name, forward in found.items():
            model.get_submodule(name).forward = forward
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        assert len(calls) == len(found)
        assert not find_rotary(model)
        assert len(find_rotary(tiny_model(family))) == len(found)  # other models keep their own
    model(ids).logits.sum().backward()
    assert len(calls) == len(found)  # with gradients the old function runs


def exchanged(q, k, cos, sin):
    return k * cos[:, None], q * sin[:, None]


def other(x):
    return x


class Attention(nn.Module):
    """Knows functions that turn nothing."""

    def forward(self, x):
        return exchanged(x, x, x, x), other(x)


def test_what_computes_something_else_is_left():
    assert not find_rotary(nn.Sequential(Attention()))
