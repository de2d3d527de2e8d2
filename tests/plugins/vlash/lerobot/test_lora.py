"""Adapters, and checkpoints in which they are merged."""

import copy
import importlib.util
import json

import pytest
import torch
from lerobot.policies.factory import make_policy
from safetensors.torch import load_file
from tiny_lerobot import PI, observation, perturbed

from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy

OPTIONS = {"method_type": "LORA", "r": 4, "lora_alpha": None, "target_modules": None, "full_training_modules": None}


@pytest.fixture
def start(tiny_pi, meta, tokenizer, tmp_path):
    """Makes a policy from a checkpoint of pi0.5."""
    words = {"tokenizer": str(tokenizer), "device": "cpu", "n_action_steps": 4, "inference_overlap_steps": 2}
    torch.manual_seed(0)
    made = perturbed(make_policy(VLASHConfig(base="pi05", base_config=PI, chunk_size=6, **words), ds_meta=meta))
    made.base.save_pretrained(tmp_path / "pi05")
    made.processors.save(tmp_path / "pi05")

    def build(**options):
        config = VLASHConfig(base="pi05", base_path=str(tmp_path / "pi05"), max_delay_steps=3, **words, **options)
        return make_policy(config, ds_meta=meta)

    return build


def trained(policy, samples, steps=3):
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-2)
    batch = samples(policy.config)
    policy.train()
    torch.manual_seed(1)
    for _ in range(steps):
        loss, _ = policy.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def chunk(policy):
    torch.manual_seed(2)
    return policy.predict_action_chunk(observation())


def test_only_adapters_and_small_layers_are_trained(start):
    policy = start(delay_conditioning=True).wrap_with_peft(peft_cli_overrides=OPTIONS)
    names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert any("language_model.layers.0.self_attn.q_proj.lora_A" in name for name in names)
    assert any("vision_tower" in name and "fc1.lora_B" in name for name in names)
    for whole in ("action_in_proj", "time_mlp_in", "delay_embedding", "input_layernorm", "patch_embedding"):
        assert any(whole in name for name in names)
    assert not any("base_layer" in name or "embed_tokens" in name or "lm_head" in name for name in names)


def test_a_checkpoint_has_the_adapters_merged_and_beside(start, samples, tmp_path):
    policy = trained(start().wrap_with_peft(peft_cli_overrides=OPTIONS), samples)
    policy.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert not any("lora_" in name or "base_layer" in name for name in weights)
    plain = VLASHPolicy.from_pretrained(tmp_path / "saved")
    assert not torch.equal(chunk(start()), chunk(plain))
    assert torch.allclose(chunk(policy), chunk(plain), rtol=1e-5)


def test_a_card_says_what_was_merged_and_what_rounding_did(start, samples, tmp_path):
    policy = trained(start().wrap_with_peft(peft_cli_overrides=OPTIONS).to(torch.bfloat16), samples, steps=0)
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    exact = {}
    for name, layer in policy.base.named_modules():
        if hasattr(layer, "lora_A"):
            down, up = (getattr(layer, f"lora_{part}")["default"].weight.float() for part in "AB")
            exact[f"base.{name}"] = (layer.base_layer.weight.float() + layer.scaling["default"] * (up @ down)).detach()
    policy.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    report = json.loads((tmp_path / "saved" / "quality.json").read_text())
    layers = report["figures"]["layers"]
    assert report["figures"]["merged layers"] == len(layers) == len(exact) > 0
    for name, wanted in exact.items():
        assert layers[name] == pytest.approx(float((weights[f"{name}.weight"].float() - wanted).norm() / wanted.norm()))
    assert 0 < max(layers.values()) < 2**-8
    assert (report["base_model"], report["recipe"]["r"]) == ("pi05", 4)
    assert "Relative error of merged weights" in (tmp_path / "saved" / "README.md").read_text()
    torch.nn.init.constant_(next(p for name, p in policy.named_parameters() if ".lora_" in name), torch.nan)
    with pytest.raises(ValueError, match="with the adapter merged holds NaN or Inf"):
        policy.save_pretrained(tmp_path / "broken")
    start().save_pretrained(tmp_path / "plain")
    for name in ("broken", "plain"):
        assert not (tmp_path / name / "README.md").exists()


def test_peft_reads_the_adapters(start, samples, tmp_path):
    from peft import PeftModel

    policy = trained(start().wrap_with_peft(peft_cli_overrides=OPTIONS), samples)
    policy.save_pretrained(tmp_path / "saved")
    other = start()
    whole = {name: value for name, value in policy.base.state_dict().items() if "lora_" not in name}
    other.base.load_state_dict({name.replace(".base_layer", ""): value for name, value in whole.items()})
    wrapped = PeftModel.from_pretrained(other.base, str(tmp_path / "saved" / "lora_adapters"))
    assert wrapped.peft_config["default"].r == 4
    assert torch.allclose(chunk(policy), chunk(other), rtol=1e-5)


def test_training_goes_on_with_the_adapters_of_a_checkpoint(start, samples, tmp_path):
    policy = trained(start().wrap_with_peft(peft_cli_overrides=OPTIONS), samples)
    policy.save_pretrained(tmp_path / "saved")
    again = VLASHPolicy.from_pretrained(tmp_path / "saved", config=copy.deepcopy(policy.config))
    again.wrap_with_peft(peft_cli_overrides=OPTIONS)
    own, other = policy.state_dict(), again.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.allclose(own[name], other[name], atol=1e-6) for name in own)
    fresh = VLASHPolicy.from_pretrained(tmp_path / "saved", config=copy.deepcopy(policy.config))
    with pytest.raises(ValueError, match=r"peft.r: got 8, but the adapters in .* have 4; go on with that, or remove"):
        fresh.wrap_with_peft(peft_cli_overrides={**OPTIONS, "r": 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method_type": "MISS"}, "peft.method_type: got MISS, wanted LORA"),
        (
            {"target_modules": ["embed_tokens"]},
            r"peft.target_modules: got .*embed_tokens, a \w+Embedding, wanted nn.Linear",
        ),
    ],
)
def test_what_it_refuses(start, options, message):
    with pytest.raises(ValueError, match=message):
        start().wrap_with_peft(peft_cli_overrides={**OPTIONS, **options})


def test_adapters_need_something_to_be_put_on(tiny_pi, meta, tokenizer):
    config = VLASHConfig(
        base="pi05", base_config=PI, tokenizer=str(tokenizer), device="cpu", chunk_size=6, n_action_steps=4
    )
    with pytest.raises(ValueError, match=r"adapters need trained weights; name some as --policy.base_path"):
        make_policy(config, ds_meta=meta).wrap_with_peft(peft_cli_overrides=OPTIONS)


def test_quantization_names_what_it_needs(start, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ImportError, match="lora_quantization='nf4' needs bitsandbytes: pip install bitsandbytes"):
        start(lora_quantization="nf4").wrap_with_peft(peft_cli_overrides=OPTIONS)


def test_quantized_weights_are_merged_as_what_they_stand_for(start, samples, tmp_path):
    pytest.importorskip("bitsandbytes")
    policy = trained(start(lora_quantization="nf4").wrap_with_peft(peft_cli_overrides=OPTIONS), samples)
    assert sum(parameter.dtype == torch.uint8 for parameter in policy.parameters()) > 20
    policy.save_pretrained(tmp_path / "saved")
    plain = VLASHPolicy.from_pretrained(tmp_path / "saved")
    assert torch.allclose(chunk(policy), chunk(plain), rtol=1e-2)
    again = VLASHPolicy.from_pretrained(tmp_path / "saved", config=copy.deepcopy(policy.config))
    again.wrap_with_peft(peft_cli_overrides=OPTIONS)
    assert torch.allclose(chunk(policy), chunk(again), rtol=1e-2)
