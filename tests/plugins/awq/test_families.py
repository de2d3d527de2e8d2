"""Tracing finds the reference's groups in every family, and the scales it moves leave the function as it is."""

import pytest
import torch
from tests.models import CONFIGS, tiny_model, token_ids

from pronghorn.awq import AwqConfig, AwqSearch, SearchResult, quantize_model
from pronghorn.awq.layers import AwqLinear
from pronghorn.awq.selection import quantizable_linears
from pronghorn.transformers.decoder import find_decoder_blocks

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = [
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    ("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
]
LLAMA = [("input_layernorm", QKV, "self_attn"), *GATED]
V_TO_O = ("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj")
GEMMA2 = [("input_layernorm", QKV, "self_attn"), ("pre_feedforward_layernorm", *GATED[0][1:]), GATED[1]]


def experts(shared=None):
    """Groups of four experts and of the one that every token takes, if there is one."""
    mlps = [*(f"mlp.experts.{i}" for i in range(4)), *([shared] if shared else [])]
    readers = tuple(f"{mlp}.{name}" for mlp in mlps for name in ("gate_proj", "up_proj"))
    downs = [(f"{mlp}.up_proj", (f"{mlp}.down_proj",), f"{mlp}.down_proj") for mlp in mlps]
    return [("post_attention_layernorm", readers, "mlp"), *downs]


def gpt(norm1, qkv, attention, norm2, up, mlp, act, down):
    return [(norm1, (qkv,), attention), (norm2, (up,), mlp), (act, (down,), down)]


# llm-awq's and AutoAWQ's groups: (previous operation, linears, inspected module), for the last block.
REFERENCE = {
    "llama": LLAMA,
    "llama_mha": [LLAMA[0], V_TO_O, *GATED],
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": [LLAMA[0], *experts()],
    "qwen2_moe": [LLAMA[0], *experts("mlp.shared_expert")],
    "mixtral": [LLAMA[0], *experts()],
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA2,
    "opt": [
        ("self_attn_layer_norm", QKV, "self_attn"),
        ("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj"),
        ("final_layer_norm", ("fc1",), "fc1"),
        ("fc1", ("fc2",), "fc2"),
    ],
    # llm-awq inspects Bloom's whole block here; its attention is the smallest module that holds the projection.
    "bloom": gpt("input_layernorm", "self_attention.query_key_value", "self_attention", "post_attention_layernorm",
                 "mlp.dense_h_to_4h", "mlp", "mlp.gelu_impl", "mlp.dense_4h_to_h"),
    "mpt": [("norm_1", ("attn.Wqkv",), "attn"), ("attn.Wqkv", ("attn.out_proj",), "attn.out_proj"),
            ("norm_2", ("ffn.up_proj",), "ffn"), ("ffn.act", ("ffn.down_proj",), "ffn.down_proj")],
    "gpt_neox": gpt("input_layernorm", "attention.query_key_value", "attention", "post_attention_layernorm",
                    "mlp.dense_h_to_4h", "mlp", "mlp.act", "mlp.dense_4h_to_h"),
    "gpt_bigcode": gpt("ln_1", "attn.c_attn", "attn", "ln_2", "mlp.c_fc", "mlp", "mlp.act", "mlp.c_proj"),
    "falcon_7b": [("input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h"), ""),
                  ("mlp.act", ("mlp.dense_4h_to_h",), "mlp.dense_4h_to_h")],
    "falcon_40b": gpt("ln_attn", "self_attention.query_key_value", "self_attention", "ln_mlp", "mlp.dense_h_to_4h",
                      "mlp", "mlp.act", "mlp.dense_4h_to_h"),
    "phi3": [("input_layernorm", ("self_attn.qkv_proj",), "self_attn"),
             ("post_attention_layernorm", ("mlp.gate_up_proj",), "mlp"),
             ("mlp.gate_up_proj", ("mlp.down_proj",), "mlp.down_proj")],
    "phi3_mha": [("input_layernorm", ("self_attn.qkv_proj",), "self_attn"),
                 ("self_attn.qkv_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
                 ("post_attention_layernorm", ("mlp.gate_up_proj",), "mlp"),
                 ("mlp.gate_up_proj", ("mlp.down_proj",), "mlp.down_proj")],
    "cohere": [("input_layernorm", (*QKV, "mlp.gate_proj", "mlp.up_proj"), ""), V_TO_O, GATED[1]],
    "deepseek_v2": [("input_layernorm", ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), "self_attn"),
                    ("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), "self_attn.kv_b_proj"),
                    *experts("mlp.shared_experts")],
    "deepseek_v3": [("input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "self_attn"),
                    ("self_attn.q_a_layernorm", ("self_attn.q_b_proj",), "self_attn.q_b_proj"),
                    ("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), "self_attn.kv_b_proj"),
                    *experts("mlp.shared_experts")],
}  # fmt: skip


def search(model, **changes):
    config = AwqConfig(**{"group_size": 32, "grid": 4, "clip": False, **changes})
    return AwqSearch(config, progress=False), [token_ids(2, 32)]


@pytest.mark.parametrize("family", CONFIGS)
def test_groups_and_unchanged_logits(family, monkeypatch):
    model = tiny_model(family)
    searcher, samples = search(model)
    traced = {}
    original = searcher._groups
    monkeypatch.setattr(searcher, "_groups", lambda block, *args: traced.setdefault(block.name, original(block, *args)))
    with torch.no_grad():
        before = model(samples[0]).logits
        result = searcher.run(model, samples)
        result.apply(model)
        after = model(samples[0]).logits
    torch.testing.assert_close(after, before, rtol=2e-4, atol=2e-4)
    assert ((after - before).norm() / before.norm()) < 1e-5
    assert any((scale - 1).abs().max() > 0.05 for _, _, scale in result.scale)

    found = [(group.prev, group.linears, group.inspect) for group in list(traced.values())[-1]]
    for prev, linears, inspect in REFERENCE[family]:
        match = [entry for entry in found if entry[0] == prev]
        assert match, f"no group of {prev}: {found}"
        assert set(match[0][1]) == set(linears)
        assert match[0][2] == inspect
    assert len(found) == len(REFERENCE[family])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_routers_are_scaled_and_stay_in_16_bits(family):
    model = tiny_model(family)
    searcher, samples = search(model)
    result = searcher.run(model, samples)
    assert any("mlp.gate" in name for _, readers, _ in result.scale for name in readers)
    result.apply(model)
    quantize_model(model, searcher.config, progress=False)
    packed = [name for name, module in model.named_modules() if isinstance(module, AwqLinear)]
    assert packed
    assert not [name for name in packed if name.rsplit(".", 1)[-1] in ("gate", "shared_expert_gate")]


@pytest.mark.fault(6)
def test_experts_without_tokens_are_rounded_to_nearest(caplog):
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # ties go to the first experts
    searcher, samples = search(model, clip=True)
    result = searcher.run(model, samples)
    unreached = result.report[0]["unreached"]
    assert unreached
    assert "rounded to nearest" in caplog.text
    assert not [name for name, _ in result.clip if name.removeprefix("model.layers.0.") in unreached]
    result.apply(model)
    quantize_model(model, searcher.config, progress=False)
    assert model(samples[0]).logits.isfinite().all()


def test_the_users_own_groups():
    model = tiny_model("llama")
    groups = [{"prev": "mlp.up_proj", "linears": ["mlp.down_proj"], "inspect": "mlp.down_proj"}]
    searcher, samples = search(model, scale_groups=groups)
    result = searcher.run(model, samples)
    assert [prev.split(".", 3)[-1] for prev, _, _ in result.scale] == ["mlp.up_proj"] * 2
    searcher, samples = search(model, scale_groups=[{"prev": "mlp.nothing", "linears": ["mlp.down_proj"]}])
    with pytest.raises(ValueError, match=r"mlp\.nothing"):
        searcher.run(model, samples)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("zero_point", [True, False])
def test_search_is_no_worse_than_rounding_group_by_group(bits, zero_point):
    model = tiny_model("llama_mha")
    searcher, samples = search(model, bits=bits, version="natural", zero_point=zero_point, grid=20, clip=True)
    result = searcher.run(model, samples)
    for block in result.report:
        for group in block["groups"]:
            assert min(group["losses"]) == group["losses"][group["best"]] <= group["losses"][0]
    for _, _, scale in result.scale:
        assert (scale.max() * scale.min()).sqrt() == pytest.approx(1, abs=1e-4)
    for name, maximum in result.clip:
        assert not any(part in name.rsplit(".", 1)[-1] for part in ("q_", "k_"))
        assert maximum.dim() == 3


@pytest.mark.fault(6)
def test_awq_beats_rounding_where_activations_have_outliers():
    def error(awq):
        torch.manual_seed(0)
        model = tiny_model("llama_mha")
        for layer in model.model.layers:
            layer.input_layernorm.weight.data[::16] *= 20
            layer.post_attention_layernorm.weight.data[::16] *= 20
        searcher, samples = search(model, grid=20, clip=True, bits=3, version="natural")
        with torch.no_grad():
            wanted = model(samples[0]).logits
            if awq:
                searcher.run(model, samples).apply(model)
            quantize_model(model, searcher.config, progress=False)
            return (model(samples[0]).logits - wanted).pow(2).mean().item()

    assert error(awq=True) < 0.7 * error(awq=False)


def test_results_survive_saving(tmp_path):
    model = tiny_model("llama")
    searcher, samples = search(model, clip=True)
    result = searcher.run(model, samples)
    result.save(tmp_path / "awq.pt")
    again = SearchResult.load(tmp_path / "awq.pt")
    assert [entry[:2] for entry in again.scale] == [entry[:2] for entry in result.scale]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(again.scale, result.scale, strict=True))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(again.clip, result.clip, strict=True))
    plain = torch.load(tmp_path / "awq.pt", weights_only=True)
    assert isinstance(plain["scale"][0], tuple)

    with pytest.raises(ValueError, match="of another model"):
        again.apply(tiny_model("opt"))
    again.clip[0] = (again.clip[0][0], again.clip[0][1][:5])
    with pytest.raises(ValueError, match="does not fit"):
        again.apply(model)
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a search result"):
        SearchResult.load(tmp_path / "bad.pt")
    torch.save({"scale": []}, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="'scale' and 'clip'"):
        SearchResult.load(tmp_path / "half.pt")


@pytest.mark.fault(8, 9)
def test_a_resumed_search_gives_the_same_bits(tmp_path):
    model = tiny_model("llama")
    config = AwqConfig(group_size=32)
    whole = AwqSearch(config, progress=False).run(model, [token_ids()])
    AwqSearch(config, progress=False, state_dir=tmp_path).run(model, [token_ids()])
    (tmp_path / "block-00001.safetensors").unlink()
    resumed = AwqSearch(config, progress=False, state_dir=tmp_path).run(model, [token_ids()])
    assert all(torch.equal(a[2], b[2]) for a, b in zip(whole.scale, resumed.scale, strict=True))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(whole.clip, resumed.clip, strict=True))
    with pytest.raises(ValueError, match="awq"):
        AwqSearch(AwqConfig(group_size=16), progress=False, state_dir=tmp_path).run(model, [token_ids()])


def test_a_group_size_that_does_not_divide_is_named():
    searcher, samples = search(tiny_model("llama"), group_size=48)
    with pytest.raises(ValueError, match=r"48 does not divide the 64 input channels of model\.layers\.0\.self_attn"):
        searcher.run(tiny_model("llama"), samples)


def test_names_are_left_out_by_whole_components():
    block = find_decoder_blocks(tiny_model("llama"))[0]
    assert "mlp.gate_proj" in quantizable_linears(block.module, ["gate"])
    assert "mlp.gate_proj" not in quantizable_linears(block.module, ["gate_proj"])
    assert not quantizable_linears(block.module, ["layers.0"], prefix=block.name)
