"""`attn_implementation="pronghorn_cached"` computes what `sdpa` does, with every kind of cache."""

import pytest
import torch
from tests.models import tiny_model, token_ids

import pronghorn.kernels.cached_attention as room
from pronghorn.transformers import attention


@pytest.mark.parametrize("cache", ["static", None])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2"])
def test_generates_what_sdpa_does(family, cache, monkeypatch):
    model = tiny_model(family)
    ids = token_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    how["cache_implementation"] = cache
    model.set_attn_implementation("sdpa")
    wanted = model.generate(ids, **how)
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return room.cached_attention(*arguments, **options)

    monkeypatch.setattr(attention, "cached_attention", counted)
    model.set_attn_implementation(attention.ATTENTION)
    assert torch.equal(model.generate(ids, **how), wanted)
    assert bool(calls) == (family != "gemma2")  # which caps its scores: left to `sdpa`


def test_training_is_left_to_sdpa():
    model = tiny_model("llama")
    model.set_attn_implementation(attention.ATTENTION)
    hidden = model.get_input_embeddings()(token_ids(1, 5)).detach().requires_grad_()
    model(inputs_embeds=hidden).logits.sum().backward()
    assert hidden.grad.abs().sum() > 0
