"""The configuration, as LeRobot's programs read and write it."""

import draccus
import pytest
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from tiny_lerobot import ACT, DIFFUSION

from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig


def parsed(*arguments):
    return draccus.parse(VLASHConfig, None, args=["--device=cpu", *arguments])


def test_it_is_a_policy_type_whose_names_lerobot_resolves():
    from lerobot.policies.factory import get_policy_class

    from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy

    assert PreTrainedConfig.get_choice_class("vlash") is VLASHConfig
    assert get_policy_class("vlash") is VLASHPolicy


def test_all_settings_of_vlash_are_options():
    config = parsed("--base=act", "--inference_overlap_steps=auto", "--state_from_action=[0, null]", "--fps=15")
    settings = config.settings()
    assert type(settings) is VLASHSettings
    assert (settings.inference_overlap_steps, settings.state_from_action, settings.fps) == ("auto", [0, None], 15.0)
    assert (settings.chunk_size, settings.n_action_steps) == (100, 32)


def test_options_of_the_wrapped_policy():
    config = parsed("--base=act", '--base_config={"dim_model": 64, "dropout": 0.0}', "--chunk_size=8")
    wrapped = config.wrapped()
    assert isinstance(wrapped, ACTConfig)
    assert (wrapped.dim_model, wrapped.dropout, wrapped.n_heads) == (64, 0.0, 8)
    assert (wrapped.chunk_size, wrapped.n_action_steps, config.n_action_steps) == (8, 8, 8)
    assert config.get_optimizer_preset() == wrapped.get_optimizer_preset()


def test_a_saved_configuration_is_complete_and_takes_single_options_over(tmp_path):
    VLASHConfig(base="act", base_config=ACT, device="cpu", chunk_size=8, inference_overlap_steps=2).save_pretrained(
        tmp_path
    )
    config = PreTrainedConfig.from_pretrained(
        tmp_path, cli_overrides=['--base_config={"dropout": 0.3}', "--inference_overlap_steps=5"]
    )
    assert config.base_config["dim_model"] == ACT["dim_model"]
    assert config.base_config["dropout"] == config.wrapped().dropout == 0.3
    assert (config.inference_overlap_steps, config.chunk_size) == (5, 8)


def test_a_saved_configuration_does_not_look_for_what_it_started_from(tmp_path):
    start = tmp_path / "act"
    ACTConfig(device="cpu", dim_model=32, chunk_size=12, n_action_steps=6).save_pretrained(start)
    config = VLASHConfig(base="act", base_path=str(start), device="cpu")
    assert (config.wrapped().dim_model, config.chunk_size, config.n_action_steps) == (32, 12, 12)
    config.save_pretrained(tmp_path / "saved")
    (start / "config.json").unlink()
    again = PreTrainedConfig.from_pretrained(tmp_path / "saved")
    assert again.wrapped() == config.wrapped()
    assert again == config


def test_the_window_of_actions_has_room_for_every_delay():
    assert VLASHConfig(base="act", device="cpu", chunk_size=8, max_delay_steps=3).action_delta_indices == list(
        range(11)
    )
    diffusion = VLASHConfig(base="diffusion", base_config=DIFFUSION, device="cpu", max_delay_steps=2)
    assert isinstance(diffusion.wrapped(), DiffusionConfig)
    assert diffusion.observation_delta_indices == [-1, 0]
    # Its horizon of 16 begins one step before now.
    assert (diffusion.action_delta_indices, diffusion.chunk_size) == (list(range(-1, 17)), 15)
    assert (diffusion.drop_n_last_frames, diffusion.n_obs_steps) == (7, 2)


def test_nothing_is_normalised_outside_of_the_wrapped_policy():
    config = VLASHConfig(base="act", device="cpu")
    assert set(config.normalization_mapping.values()) == {NormalizationMode.IDENTITY}
    assert set(config.wrapped().normalization_mapping.values()) == {NormalizationMode.MEAN_STD}


def test_autocast_follows_the_wrapped_policys_dtype():
    assert VLASHConfig(base="pi05", base_config={"dtype": "bfloat16"}, device="cpu").dtype == "bfloat16"
    assert not hasattr(VLASHConfig(base="act", device="cpu"), "dtype")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "wheel"}, "base: got 'wheel', accepted are act, .*smolvla"),
        ({"base": "vlash"}, "base: got 'vlash'"),
        ({"base": "vqbet", "chunk_size": 8}, "base: got 'vqbet', wanted a policy that predicts chunks"),
        ({"base": "act", "base_config": {"wheels": 4}}, "base_config: got wheels, accepted are .*dim_model"),
        ({"base": "act", "base_config": {"device": "cpu"}}, "base_config: got device"),
        ({"base": "act", "base_config": {"dim_model": "wide"}}, "base_config: .*dim_model.*wide"),
        ({"base": "act", "base_config": {"vision_backbone": "vit"}}, "base_config: .*ResNet"),
        ({"base": "act", "base_config": {"temporal_ensemble_coeff": 0.1}}, "base_config: .*temporal ensembling"),
        ({"base": "act", "chunk_size": 8, "inference_overlap_steps": 9}, "inference_overlap_steps: got 9, wanted 0 to"),
        ({"base": "act", "chunk_size": 8, "n_action_steps": 9}, "n_action_steps: got 9, wanted at most chunk_size, 8"),
        ({"base": "act", "async_mode": "rtc"}, "async_mode: got 'rtc' with 'act', which LeRobot cannot guide"),
        ({"base": "act", "state_cond": True}, "state_cond: got True with base='act', which takes pi05"),
        ({"base": "act", "shared_observation": True}, "shared_observation: got True with base='act'"),
        ({"base": "pi0", "state_cond": True}, "state_cond: got True with base='pi0'"),
        ({"base": "diffusion", "chunk_size": 99}, 'chunk_size: got 99, wanted at most 63, .*"horizon": 104'),
        ({"base": "act", "lora_quantization": "int3"}, "lora_quantization: got 'int3', accepted are nf4, fp4"),
        ({"base": "act", "async_mode": "later"}, "async_mode: got 'later'"),
    ],
)  # fmt: skip
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        VLASHConfig(device="cpu", **options)


def test_a_checkpoint_of_another_policy_is_named(tmp_path):
    ACTConfig(device="cpu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"base: got 'pi05', but .* holds a policy of type 'act'"):
        VLASHConfig(base="pi05", base_path=str(tmp_path), device="cpu")


def test_a_pi05_over_shared_observations_sees_the_state_through_its_norms(caplog):
    assert VLASHConfig(base="pi05", shared_observation=True, device="cpu").state_cond
    assert "state_cond is set to True" in caplog.text
    assert not VLASHConfig(base="pi0", shared_observation=True, device="cpu").state_cond


def test_the_names_of_actions_reach_the_wrapped_policy_and_its_checkpoint():
    config = VLASHConfig(base="pi05", device="cpu")
    assert config.action_feature_names is None
    config.action_feature_names = ["x", "y"]
    assert config.wrapped().action_feature_names == ["x", "y"]
    assert config.base_config["action_feature_names"] == ["x", "y"]
    act = VLASHConfig(base="act", device="cpu")
    act.action_feature_names = ["x", "y"]  # which ACT keeps nowhere
    assert act.action_feature_names is None
