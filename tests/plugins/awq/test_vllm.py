"""AWQ in vLLM: the same tokens as transformers, and shards that are slices of the whole."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import tiny_model
from tests.vllm_ranks import tokens_of_ranks
from tests.vllm_server import ask, vllm_server
from transformers import AutoModelForCausalLM

import pronghorn.transformers  # noqa: F401 - registers
from pronghorn.awq import AwqConfig

vllm = pytest.importorskip("vllm", reason="the vllm extra is not installed")
pytestmark = pytest.mark.xdist_group("vllm")

PROMPT = list(range(3, 20))
FORMATS = [
    ("gemm", 4),
    ("gemv", 4),
    ("gemv_fast", 4),
    ("llm-awq", 4),
    ("exllama", 4),
    ("marlin", 4),
    ("natural", 3),
    ("natural", 8),
]


@pytest.fixture(scope="module")
def full_precision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp")
    tiny_model("llama", hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(folder)
    return folder


def checkpoint(source, folder, version="gemm", bits=4, **changes):
    config = AwqConfig(
        group_size=32, method="rtn", version=version, bits=bits, zero_point=version != "marlin", **changes
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = None  # as vLLM with ignore_eos, which may give that token and goes on
    tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
    return tokens[0, len(PROMPT) :].tolist()


def serve(folder, **options):
    return vllm.LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        skip_tokenizer_init=True,
        **options,
    )


def generate(llm):
    sampling = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    found = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    return list(found[0].outputs[0].token_ids)


@pytest.mark.parametrize(("version", "bits"), FORMATS)
def test_tokens_equal_transformers(full_precision, tmp_path, version, bits):
    wanted = checkpoint(full_precision, tmp_path, version, bits)
    # vLLM reads the gemm format itself; there the user has to ask for us.
    llm = serve(tmp_path, quantization="pronghorn_awq" if version == "gemm" else None)
    assert type(llm.llm_engine.vllm_config.quant_config).__name__ == "VllmAwqConfig"
    assert generate(llm) == wanted


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for each rank is needed")
@pytest.mark.parametrize(("version", "bits"), [("gemm", 4), pytest.param("natural", 3, marks=pytest.mark.slow)])
def test_two_ranks_give_the_tokens_of_transformers(full_precision, tmp_path, version, bits):
    wanted = checkpoint(full_precision, tmp_path, version, bits)
    found = tokens_of_ranks(tmp_path, [PROMPT], 12, 2, quantization="pronghorn_awq", max_model_len=64)
    assert found == [wanted]


def test_skipped_linears_and_vllms_own_reader(full_precision, tmp_path):
    wanted = checkpoint(
        full_precision, tmp_path, modules_to_not_convert=["down_proj", "qkv_proj", "q_proj", "k_proj", "v_proj"]
    )
    assert generate(serve(tmp_path, quantization="pronghorn_awq")) == wanted


@pytest.mark.parametrize("version", ["gemv", "llm-awq"])
def test_linears_that_the_checkpoint_has_fused(tmp_path, version):
    """Phi-3 has its q, k and v in one tensor, and gate and up."""
    source, folder = tmp_path / "fp", tmp_path / "quantized"
    tiny_model("phi3", hidden_size=128, intermediate_size=256).save_pretrained(source)
    wanted = checkpoint(source, folder, version)
    assert generate(serve(folder)) == wanted


def test_full_precision_linears_that_the_configuration_does_not_list(full_precision, tmp_path):
    wanted = checkpoint(full_precision, tmp_path, "gemv", modules_to_not_convert=["down_proj"])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert generate(serve(tmp_path)) == wanted


@pytest.mark.parametrize("kind", ["FusedMoE", "RoutedExperts"])
def test_experts_are_refused(kind):
    """By the names that vLLM 0.25 and 0.32 give the layer."""
    from pronghorn.awq.vllm import VllmAwqConfig

    layer = type(kind, (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=r"mlp\.experts: pronghorn_awq does not run mixtures of experts"):
        VllmAwqConfig(AwqConfig(version="gemv")).get_quant_method(layer, "model.layers.0.mlp.experts")


def test_a_checkpoint_without_a_tensor_is_refused(full_precision, tmp_path):
    checkpoint(full_precision, tmp_path, "gemv")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.k_proj.qzeros"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.qkv_proj\.qzeros: the checkpoint lacks it, or a part"):
        serve(tmp_path)


@pytest.mark.fault(2)
def test_a_checkpoint_without_a_weight_that_is_not_packed_is_refused(tmp_path):
    """vLLM looks for none of these in a quantized checkpoint; of q, k and v it does so in no checkpoint."""
    source, folder = tmp_path / "fp", tmp_path / "quantized"
    tiny_model("qwen2", hidden_size=128, intermediate_size=256).save_pretrained(source)
    checkpoint(source, folder, "gemv")
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.bias", "model.norm.weight",
                 "lm_head.weight"):  # fmt: skip
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    named = "model.embed_tokens.weight, model.layers.1.self_attn.qkv_proj.bias, model.norm.weight, lm_head.weight: the"
    with pytest.raises(ValueError, match=f"^{re.escape(named)} checkpoint lacks it"):
        serve(folder)


@pytest.mark.fault(2)
def test_a_head_that_is_the_embedding_need_not_be_in_the_checkpoint(tmp_path):
    source, folder = tmp_path / "fp", tmp_path / "quantized"
    tiny_model("qwen2", hidden_size=128, intermediate_size=256, tie_word_embeddings=True).save_pretrained(source)
    wanted = checkpoint(source, folder, "gemv")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert generate(serve(folder)) == wanted


def test_a_full_precision_model_is_rounded_while_it_is_loaded(full_precision, caplog):
    llm = serve(full_precision, quantization="pronghorn_awq")
    config = AwqConfig(group_size=128, method="rtn")
    model = AutoModelForCausalLM.from_pretrained(full_precision, dtype=torch.float32, quantization_config=config)
    assert type(llm.llm_engine.vllm_config.quant_config).__name__ == "VllmAwqConfig"
    tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generate(llm)[:4] == tokens[0, len(PROMPT) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("version", "flags"), [("gemm", ["--quantization", "pronghorn_awq"]), ("gemv", [])])
def test_vllm_serve_answers_over_http(full_precision, tmp_path, version, flags):
    """What a user runs: the server in processes of its own, compiled, the method found by entry point."""
    folder = tmp_path / "model"
    wanted = checkpoint(full_precision, folder, version)
    how = ["--dtype", "float32", "--max-model-len", "64", "--skip-tokenizer-init", *flags]
    with vllm_server(tmp_path / "site", how, folder) as (server, port):
        answer = ask(port, {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True,
                            "return_token_ids": True, "detokenize": False}, server)  # fmt: skip
    assert answer["choices"][0]["token_ids"] == wanted
