"""LeRobot's own programs."""

import json
import sys

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_policy
from lerobot.scripts import lerobot_eval, lerobot_train
from safetensors.torch import load_file
from tiny_lerobot import ACT, PI, perturbed
from typer.testing import CliRunner

from pronghorn.vlash.cli import app
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy


def test_the_plugin_is_found_by_the_name_of_its_distribution():
    assert "lerobot_policy_pronghorn" in sys.modules
    assert "vlash" in PreTrainedConfig.get_known_choices()


def test_a_checkpoint_has_the_wrapped_policys_processors_and_all_of_its_options(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["type"] == "vlash"
    assert config["base_config"]["type"] == "act"
    assert config["base_config"]["dim_model"] == ACT["dim_model"]
    assert config["base_config"]["dropout"] == 0.1, "defaults are written down too"
    assert (config["chunk_size"], config["max_delay_steps"]) == (16, 3)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        assert (trained / name).exists()
        assert (trained / "base" / name).exists()
    outside = json.loads((trained / "policy_preprocessor.json").read_text())
    assert not any("state_file" in step for step in outside["steps"])


def test_lerobot_eval_runs_a_checkpoint_with_a_delay(trained, command, tmp_path):
    command(
        lerobot_eval.main, f"--policy.path={trained}", "--env.type=pusht", "--env.episode_length=14",
        "--eval.batch_size=2", "--eval.n_episodes=2", "--eval.use_async_envs=false", "--policy.device=cpu",
        "--policy.async_mode=vlash", "--policy.inference_overlap_steps=4", "--policy.action_quant_ratio=2",
        f"--output_dir={tmp_path / 'eval'}",
    )  # fmt: skip
    result = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert result["overall"]["n_episodes"] == 2


def test_lerobot_eval_runs_another_policys_checkpoint_as_it_is(trained, command, tmp_path):
    policy = VLASHPolicy.from_pretrained(trained)
    policy.base.save_pretrained(tmp_path / "act")
    policy.processors.save(tmp_path / "act")
    command(
        lerobot_eval.main, "--policy.type=vlash", "--policy.base=act", f"--policy.base_path={tmp_path / 'act'}",
        "--policy.device=cpu", "--policy.n_action_steps=8", "--policy.async_mode=naive", "--env.type=pusht",
        "--env.episode_length=10", "--eval.batch_size=1", "--eval.n_episodes=1", "--eval.use_async_envs=false",
        f"--output_dir={tmp_path / 'eval'}",
    )  # fmt: skip
    assert json.loads((tmp_path / "eval" / "eval_info.json").read_text())["overall"]["n_episodes"] == 1


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_ended(train, command, tmp_path):
    # Without anything drawn at random: LeRobot draws a seed for its loader anew when it goes on.
    plain = json.dumps({**ACT, "dropout": 0.0, "use_vae": False})
    whole = train(
        tmp_path / "whole", "--policy.base=act", f"--policy.base_config={plain}", "--policy.chunk_size=8",
        "--policy.max_delay_steps=0", "--save_freq=2", steps=4,
    )  # fmt: skip
    half = whole.parents[1].resolve() / "000002" / "pretrained_model"
    expected = load_file(whole / "model.safetensors")
    command(lerobot_train.main, f"--config_path={half / 'train_config.json'}", "--resume=true")
    resumed = load_file(whole / "model.safetensors")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.usefixtures("tiny_pi")
def test_lora_of_pi05_over_shared_observations(train, tmp_path, tokenizer, meta):
    start = VLASHConfig(base="pi05", base_config=PI, tokenizer=str(tokenizer), device="cpu", chunk_size=8)
    policy = perturbed(make_policy(start, ds_meta=meta))
    policy.base.save_pretrained(tmp_path / "base")
    policy.processors.save(tmp_path / "base")
    folder = train(
        tmp_path / "out", "--policy.base=pi05", f"--policy.base_path={tmp_path / 'base'}",
        f"--policy.tokenizer={tokenizer}", "--policy.n_action_steps=4", "--policy.inference_overlap_steps=2",
        "--policy.max_delay_steps=2", "--policy.shared_observation=true", "--policy.delay_conditioning=true",
        "--peft.method_type=LORA", "--peft.r=4",
    )  # fmt: skip
    assert (folder / "lora_adapters" / "adapter_model.safetensors").exists()
    weights = load_file(folder / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in weights)
    again = VLASHPolicy.from_pretrained(folder)
    assert again.base.model.delay_embedding.weight.abs().sum() > 0


def test_a_checkpoint_can_be_timed(trained):
    result = CliRunner().invoke(app, ["bench", str(trained), "--samples", "2", "--warm-up", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "ms a chunk" in result.output
    result = CliRunner().invoke(app, ["profile", str(trained), "--samples", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "base.model" in result.output
