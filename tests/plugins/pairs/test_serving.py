"""AWQ and DuoAttention together, in each library that has both, and a served DuoAttention model that learns."""

import pytest
import torch
from safetensors.torch import save_file
from tests.models import tiny_model, token_ids
from transformers import AutoModelForCausalLM

import pronghorn.transformers  # noqa: F401 - registers
from pronghorn.awq import AwqConfig, fuse, fused
from pronghorn.duoattention import DuoAttentionConfig, apply_duo
from pronghorn.transformers import graphs

SETTINGS = {"gates": [[1.0, 0.0], [0.0, 1.0]], "threshold": 0.5, "sink_size": 8, "recent_size": 16}
PROMPT, NEW = 60, 12
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 512}
SERVED = {
    "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 256,
    "max_num_batched_tokens": 48, "max_num_seqs": 2, "enable_prefix_caching": False,
    "hf_overrides": {"architectures": ["DuoAttentionLlamaForCausalLM"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A saved model with packed weights."""
    folder = tmp_path_factory.mktemp("packed")
    tiny_model("llama", **SIZES).save_pretrained(folder / "whole")
    config = AwqConfig(group_size=32, method="rtn")
    model = AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder / "packed")
    return folder / "packed"


def answer(model, duo, **cache):
    ids = token_ids(1, PROMPT)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=duo.make_cache(**cache), max_new_tokens=NEW,
        min_new_tokens=NEW, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return found[0, PROMPT:].tolist()


@pytest.mark.parametrize("order", ["fused first", "fused last"])
def test_fused_linears_change_no_token(packed, order):
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    config = DuoAttentionConfig(**SETTINGS)
    wanted = answer(model, apply_duo(model, config))
    if order == "fused first":
        model.set_attn_implementation("sdpa")
        with fuse(model):
            duo = apply_duo(model, config)
            found = [answer(model, duo), answer(model, duo, static=True, max_len=128)]
    else:
        duo = apply_duo(model, config)
        with fuse(model):
            found = [answer(model, duo), answer(model, duo, static=True, max_len=128)]
    assert found == [wanted, wanted]


def test_graphs_of_a_fused_model_take_a_cache_of_ones_own(packed, monkeypatch):
    """As on a GPU, but for what replaying is."""
    made = []
    monkeypatch.setattr(fused, "_graphable", lambda model: model.config._attn_implementation == "sdpa")
    monkeypatch.setattr(graphs, "captured", lambda run: made.append(run) or run)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    config = DuoAttentionConfig(**SETTINGS)
    wanted = answer(model, apply_duo(model, config))
    model.set_attn_implementation("sdpa")
    with fuse(model):
        duo = apply_duo(model, config)
        assert answer(model, duo) == wanted
        assert not made
        assert answer(model, duo, static=True, max_len=128) == wanted
        assert len(made) == 1
        assert model.generation_config.cache_implementation == "static"
    assert answer(model, duo) == wanted
    assert model.generation_config.cache_implementation is None
    assert not {"forward", "generate"} & vars(model).keys()


def test_packed_heads_are_not_reordered(packed):
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    with pytest.raises(ValueError, match="q_proj: got AwqLinear, only plain linears can be reordered"):
        apply_duo(model, DuoAttentionConfig(**SETTINGS), reorder=True)


def served_tokens(llm):
    """Of the engine, for the prompt that `answer` has."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    found = llm.generate([{"prompt_token_ids": token_ids(1, PROMPT)[0].tolist()}], sampling, use_tqdm=False)
    return list(found[0].outputs[0].token_ids)


@pytest.mark.xdist_group("vllm")
def test_vllm_gives_the_tokens_of_transformers(packed):
    vllm = pytest.importorskip("vllm", reason="the vllm extra is not installed")
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    settings = {**SETTINGS, "decode_window": "mask"}
    wanted = answer(model, apply_duo(model, DuoAttentionConfig(**settings, prefill="streaming")))
    llm = vllm.LLM(str(packed), quantization="pronghorn_awq", additional_config={"duoattention": settings}, **SERVED)
    assert served_tokens(llm) == wanted


@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_vllm_takes_new_weights(tmp_path):
    """As VCPO's asynchronous trainer gives them where there is no NCCL."""
    vllm = pytest.importorskip("vllm", reason="the vllm extra is not installed")
    settings = {**SETTINGS, "decode_window": "mask"}
    old, new = (tiny_model("llama", seed=seed, **SIZES) for seed in (0, 1))
    config = DuoAttentionConfig(**settings, prefill="streaming")
    wanted = [answer(model, apply_duo(model, config)) for model in (old, new)]
    old.save_pretrained(tmp_path / "old")
    llm = vllm.LLM(
        str(tmp_path / "old"), additional_config={"duoattention": settings},
        worker_extension_cls="pronghorn.vllm.weight_files.WeightFiles", **SERVED,
    )  # fmt: skip
    assert served_tokens(llm) == wanted[0]
    (tmp_path / "new").mkdir()
    weights = {name: weight.detach().clone() for name, weight in new.named_parameters()}
    save_file(weights, tmp_path / "new" / "new.safetensors")
    llm.collective_rpc("load_weight_files", args=(str(tmp_path / "new"),))
    assert served_tokens(llm) == wanted[1] != wanted[0]
