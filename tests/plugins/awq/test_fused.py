"""The fast form of a packed model computes the same, for every family, and leaves nothing behind."""

import pytest
import torch
from tests.models import tiny_model, token_ids

from pronghorn.awq import AwqConfig, fuse, quantize_model
from pronghorn.awq import fused as fused_room
from pronghorn.awq.fused import Output, shared_inputs
from pronghorn.awq.layers import AwqLinear
from pronghorn.awq.transformers import mark_quantized

FAMILIES = {  # linears that become one in the last block
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "qwen2": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "gemma2": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "cohere": [{"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}],
    "phi3": [],
    "opt": [{"q_proj", "k_proj", "v_proj"}],
    "deepseek_v2": [{"q_proj", "kv_a_proj_with_mqa"}],
}


def packed(family, version="gemm", bits=4, **changes):
    model = tiny_model(family, **changes)
    config = AwqConfig(group_size=32, method="rtn", version=version, bits=bits)
    quantize_model(model, config, progress=False)
    mark_quantized(model, config)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_computes_the_same_and_comes_back(family):
    model = packed(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = shared_inputs(model, torch.zeros(1, 1, dtype=torch.long))
    last = [{name.rsplit(".", 1)[1] for name in names} for names in groups if ".1." in names[0] and len(names) > 1]
    for wanted in FAMILIES[family]:
        assert wanted in last
    ids = token_ids(2, 12)
    with torch.no_grad():
        plain = model(ids).logits
        with fuse(model):
            assert not any(isinstance(module, AwqLinear) for module in model.modules())
            fused = model(ids).logits
        again = model(ids).logits
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, plain)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.generation_config.cache_implementation is None


@pytest.mark.parametrize(
    ("version", "bits"), [("gemm", 4), ("gemv", 4), ("gemv_fast", 4), ("llm-awq", 4), ("exllama", 4), ("natural", 3)]
)
def test_every_layout_comes_back(version, bits):
    model = packed("llama", version, bits, intermediate_size=128)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fuse(model).restore()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_gives_the_same_tokens(cache, chunk):
    model = packed("llama")
    ids = token_ids(2, 7)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    wanted = model.generate(ids, attention_mask=mask, **how)
    with fuse(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **how), wanted)


def test_a_fused_step_is_one_graph():
    model = packed("llama")
    ids = token_ids(1, 5)
    with torch.no_grad(), fuse(model):
        wanted = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted)
        other = token_ids(1, 5).flip(1)
        torch.testing.assert_close(compiled(other, use_cache=False).logits, model(other, use_cache=False).logits)


def test_gradients_pass_and_nothing_is_kept():
    model = packed("llama")
    with fuse(model):
        hidden = model.get_input_embeddings()(token_ids(1, 4)).detach().requires_grad_()
        model(inputs_embeds=hidden).logits.sum().backward()
        assert hidden.grad.abs().sum() > 0
        kept = [module._shared[0]._input for module in model.modules() if isinstance(module, Output)]
    assert kept
    assert all(held is None for held in kept)


def test_what_cannot_be_fused_says_so(tmp_path):
    with pytest.raises(ValueError, match="no packed linears"):
        fuse(tiny_model("llama"))
    model = packed("llama")
    with fuse(model):
        with pytest.raises(ValueError, match="fused already"):
            fuse(model)
        with pytest.raises(ValueError, match="restore"):
            model.save_pretrained(tmp_path / "fused")
    model.save_pretrained(tmp_path / "whole")


def test_a_failure_halfway_gives_the_model_back(monkeypatch):
    model = packed("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original, made = fused_room.SharedInput, []

    def failing(members):
        if len(made) == 3:
            raise MemoryError("injected")
        made.append(original(members))
        return made[-1]

    monkeypatch.setattr(fused_room, "SharedInput", failing)
    with pytest.raises(MemoryError, match="injected"):
        fuse(model)
    assert len(made) == 3
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    monkeypatch.undo()
    fuse(model).restore()


def test_experts_that_the_example_misses_still_run():
    model = packed("mixtral")
    ids = token_ids(2, 12)
    with torch.no_grad():
        plain = model(ids).logits
        with fuse(model):
            torch.testing.assert_close(model(ids).logits, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_graph_gives_the_same_tokens_on_a_gpu():
    model = packed("llama", hidden_size=256, intermediate_size=512, dtype=torch.float16).cuda()
    ids = token_ids(1, 7).cuda()
    how = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with fuse(model) as fused:
        assert model.generation_config.cache_implementation == "static"
        compiled = model.generate(ids, **how)
        eager = model.generate(ids, **how, cache_implementation=None, disable_compile=True)
        assert torch.equal(compiled, eager)
        layouts = {shared.layout for shared, _, _ in fused._linears}
    if torch.cuda.get_device_capability() == (9, 0):
        assert layouts == {"fragments"}
