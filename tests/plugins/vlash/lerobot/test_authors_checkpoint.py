"""Checkpoints of the authors' own code: their names, joined projections, options, and statistics among the weights."""

import json
import re

import pytest
import torch
from lerobot.policies.factory import make_policy
from safetensors.torch import save_file
from tiny_lerobot import ACTION, PI, STATE, observation, perturbed

from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy
from pronghorn.vlash.pi.fusion import fuse_state_dict
from pronghorn.vlash.pi.keys import vlash_name

STATISTICS = {"mean": torch.tensor([250.0, 100.0]), "std": torch.tensor([50.0, 20.0])}
OF_ACTIONS = {"mean": torch.tensor([300.0, 200.0]), "std": torch.tensor([10.0, 30.0])}
BUFFERS = {
    "normalize_inputs.buffer_observation_state": STATISTICS, "normalize_targets.buffer_action": OF_ACTIONS,
    "unnormalize_outputs.buffer_action": OF_ACTIONS,
}  # fmt: skip
MEAN_STD = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}


def as_safetensors_keeps(weights):
    """Of modules with two names the one that comes first, and of tied weights one."""
    found = {}
    for name, weight in weights.items():
        name = re.sub(
            r"model\.vlm\.model\.language_model\.layers\.(\d+)\.self_attn\.",
            r"model.layers.\1.self_attn.vlm_attention.",
            name,
        )
        name = re.sub(r"model\.vlm\.model\.language_model\.layers\.(\d+)\.mlp\.", r"model.layers.\1.mlp.vlm_mlp.", name)
        found[name.replace("model.vlm.model.language_model.embed_tokens.", "model.prefix_embedder.lang_embedder.")] = (
            weight
        )
    found.pop("model.vlm.lm_head.weight")
    found["model.action_expert.model.embed_tokens.weight"] = found.pop("model.action_expert.lm_head.weight")
    return found


SAVED = {"plain": dict, "joined": fuse_state_dict, "as safetensors keeps": as_safetensors_keeps}


@pytest.fixture
def saved(tiny_pi, meta, tokenizer, tmp_path):
    """Writes a small policy as the authors' code does, in a folder; gives the policy."""

    def write(base, how="plain", **options):
        config = VLASHConfig(
            base=base, base_config={**PI, "normalization_mapping": MEAN_STD}, tokenizer=str(tokenizer), device="cpu",
            n_action_steps=4, **options,
        )  # fmt: skip
        torch.manual_seed(0)
        policy = perturbed(make_policy(config, ds_meta=meta))
        vlm = policy.base.model.paligemma_with_expert.paligemma
        vlm.lm_head.weight.data.copy_(vlm.model.language_model.embed_tokens.weight)  # there it is one
        policy.base.save_pretrained(tmp_path)
        weights = {vlash_name(name): value.clone() for name, value in policy.base.state_dict().items()}
        buffers = {f"{name}.{kind}": value for name, kinds in BUFFERS.items() for kind, value in kinds.items()}
        content = {name: value.clone() for name, value in {**SAVED[how](weights), **buffers}.items()}
        save_file(content, tmp_path / "model.safetensors")
        told = json.loads((tmp_path / "config.json").read_text())
        told |= {"fuse_qkv": False, "fuse_gate_up": False, "vlm_config": {}, "action_expert_config": {}}
        told |= {"state_cond": options.get("state_cond", False)} if base == "pi05" else {}
        (tmp_path / "config.json").write_text(json.dumps(told))
        return policy

    return write


def loaded(tmp_path, tokenizer, meta=None, like=None, **options):
    options = {"base": "pi05", "tokenizer": str(tokenizer), "device": "cpu", "n_action_steps": 4, **options}
    config = VLASHConfig(base_path=str(tmp_path), **options)
    if meta is not None:
        return make_policy(config, ds_meta=meta)
    config.input_features, config.output_features = like.config.input_features, like.config.output_features
    return VLASHPolicy(config)


def assert_same_weights(policy, again):
    own, other = policy.base.state_dict(), again.base.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("base", ["pi0", "pi05"])
@pytest.mark.parametrize("how", SAVED)
def test_weights_under_the_authors_names(saved, base, how, tmp_path, tokenizer, meta):
    policy = saved(base, how)
    again = loaded(tmp_path, tokenizer, meta, base=base)
    assert_same_weights(policy, again)


def test_a_projected_state_comes_with_its_checkpoint(saved, tmp_path, tokenizer, meta, caplog):
    policy = saved("pi05", state_cond=True)
    again = loaded(tmp_path, tokenizer, meta)
    assert again.config.state_cond
    assert "state_cond is set to True" in caplog.text
    assert_same_weights(policy, again)
    assert again.base.model.state_mlp_out.weight.abs().sum() > 0
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "state_cond": False}))
    with pytest.raises(ValueError, match="state_cond: got False, but the checkpoint has layers for a projected state"):
        loaded(tmp_path, tokenizer, meta)


def test_without_a_data_set_the_statistics_of_the_checkpoint_count(saved, tmp_path, tokenizer):
    policy = saved("pi05")
    again = loaded(tmp_path, tokenizer, like=policy)
    seen = again.processors.before(observation())[STATE]
    wanted = (observation()[STATE] - STATISTICS["mean"]) / (STATISTICS["std"] + 1e-8)
    torch.testing.assert_close(seen, wanted)
    action = torch.zeros(2, 2)
    torch.testing.assert_close(again.processors.after(action), OF_ACTIONS["mean"].expand(2, -1))
    assert again.select_action(observation()).isfinite().all()


def test_with_a_data_set_its_statistics_count(saved, tmp_path, tokenizer, meta):
    saved("pi05")
    again = loaded(tmp_path, tokenizer, meta)
    mean = torch.tensor(meta.stats[ACTION]["mean"], dtype=torch.float32)
    torch.testing.assert_close(again.processors.after(torch.zeros(1, 2)), mean[None])


def test_statistics_that_were_never_set(saved, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(BUFFERS, "unnormalize_outputs.buffer_action", {"mean": torch.tensor([torch.inf, 0.0])})
    policy = saved("pi05")
    with pytest.raises(ValueError, match=r"unnormalize_outputs.buffer_action.mean: not finite"):
        loaded(tmp_path, tokenizer, like=policy)


def test_no_statistics_at_all(saved, tmp_path, tokenizer, monkeypatch):
    monkeypatch.delitem(BUFFERS, "normalize_inputs.buffer_observation_state")
    policy = saved("pi05")
    with pytest.raises(ValueError, match=f"no statistics to normalise {STATE} with"):
        loaded(tmp_path, tokenizer, like=policy)


def test_a_weight_that_nothing_has(saved, tmp_path, tokenizer, meta):
    from safetensors.torch import load_file

    saved("pi05")
    content = load_file(tmp_path / "model.safetensors")
    save_file({**content, "model.fused_adarms_proj.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"name: got 'model.fused_adarms_proj.weight', wanted a weight of the authors'"
    ):
        loaded(tmp_path, tokenizer, meta)
