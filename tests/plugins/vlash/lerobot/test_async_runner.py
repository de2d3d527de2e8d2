"""The front door for any LeRobot policy, in a control loop of one's own."""

import time

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from mock_robot import TwoJoints, TwoJointsConfig
from ramp_policy import ACTION, CAMERA, STATE, ramp
from tiny_lerobot import ACT, DIFFUSION, PI

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.control import control_loop
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy
from pronghorn.vlash.lerobot.robot import RobotIO
from pronghorn.vlash.lerobot.runner import PolicyRunner, async_runner, settings_for
from pronghorn.vlash.runner import AsyncRunner

FEATURES = {
    "input_features": {
        STATE: PolicyFeature(FeatureType.STATE, (2,)), CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
    },
    "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
}  # fmt: skip
STATS = {
    STATE: {"mean": torch.tensor([1.0, 2.0]), "std": torch.tensor([2.0, 4.0])},
    ACTION: {"mean": torch.tensor([3.0, -1.0]), "std": torch.tensor([0.5, 2.0])},
    CAMERA: {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)},
}
for of_one in (STATS[STATE], STATS[ACTION]):
    least, most = of_one["mean"] - 2, of_one["mean"] + 2
    of_one |= {"q01": least, "q99": most, "min": least, "max": most}


def batch(rows=2, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    seen = {STATE: torch.randn(rows, 2, generator=generator), CAMERA: torch.rand(rows, 3, 32, 32, generator=generator)}
    return {**seen, "task": ["go"] * rows, **more}


def plain(kind, **options):
    """A policy of LeRobot and its processors."""
    torch.manual_seed(0)
    config = PreTrainedConfig.get_choice_class(kind)(device="cpu", **FEATURES, **options)
    return get_policy_class(kind)(config).eval(), *make_pre_post_processors(config, dataset_stats=STATS)


def wrapped(base, **options):
    torch.manual_seed(0)
    config = VLASHConfig(base=base, device="cpu", **FEATURES, **options)
    return VLASHPolicy(config, dataset_stats=STATS).eval(), *make_pre_post_processors(config)


def states_of(policy):
    """Keeps the (normalised) states that a policy of LeRobot is shown."""
    seen, predict = [], policy.predict_action_chunk

    def keep(prepared, **arguments):
        seen.append((prepared[STATE].clone(), arguments))
        return predict(prepared, **arguments)

    policy.predict_action_chunk = keep
    return seen


@pytest.mark.parametrize("threaded", [True, False])
def test_any_policy(threaded):
    policy, before, after = plain("act", **ACT, chunk_size=8, n_action_steps=6)
    shown = states_of(policy)
    with async_runner(policy, before, after, overlap=2, threaded=threaded) as runner:
        assert isinstance(runner, AsyncRunner)
        actions = torch.stack([runner.step(batch()) for _ in range(6)])
        while not runner.manager._asked.pending.done():
            time.sleep(0.001)
    assert actions.shape == (6, 2, 2)
    assert (runner.manager.settings.n_action_steps, runner.manager.settings.chunk_size) == (6, 8)
    chunk = after(policy.predict_action_chunk(before(batch())))
    torch.testing.assert_close(actions, chunk[:, :6].transpose(0, 1))
    ahead = (actions[5] - STATS[STATE]["mean"]) / STATS[STATE]["std"]
    torch.testing.assert_close(shown[1][0], ahead, msg="the last action, normalised as a state")


def test_a_policy_of_type_vlash_is_as_configured_and_the_same_inside():
    options = {"base_config": ACT, "chunk_size": 8, "n_action_steps": 6, "inference_overlap_steps": 2}
    policy, *processors = wrapped("act", **options, async_mode="naive")
    runner = async_runner(policy, *processors, threaded=False)
    assert (runner.manager.settings.async_mode, runner.manager.settings.inference_overlap_steps) == ("naive", 2)
    found = [runner.step(batch(seed=step)) for step in range(12)]
    policy.reset()
    expected = [policy.select_action(batch(seed=step)) for step in range(12)]
    torch.testing.assert_close(found, expected)
    changed = async_runner(policy, *processors, mode="vlash", overlap="auto", n_action_steps=8, fps=50)
    assert changed.manager.settings.n_action_steps == policy.config.n_action_steps == 8
    assert policy.config.async_mode == "vlash"


@pytest.mark.parametrize("make", [plain, wrapped])
def test_a_policy_with_a_memory_is_shown_the_latest_observations(make):
    options = DIFFUSION | {"crop_shape": (32, 32)}
    if make is wrapped:
        options = {"base_config": options, "n_action_steps": 4, "chunk_size": 8}
    policy, *processors = make("diffusion", **options)
    shown = states_of(policy if make is plain else policy.base)
    runner = async_runner(policy, *processors, overlap=1, estimator="measured", threaded=False, n_action_steps=4)
    states = [(batch(seed=step)[STATE] - STATS[STATE]["mean"]) / 2 for step in range(6)]
    for step in range(4):
        assert runner.step(batch(seed=step)).shape == (2, 2)
    runner.reset()
    runner.step(batch(seed=5))
    expected = [torch.stack([states[step] for step in pair], 1) for pair in ((0, 0), (2, 3), (5, 5))]
    torch.testing.assert_close([state for state, _ in shown], expected)


@pytest.mark.usefixtures("tiny_pi")
@pytest.mark.parametrize("mode", ["rtc", "rtc_full"])
def test_real_time_chunking_of_a_plain_policy(mode, tokenizer, monkeypatch):
    from lerobot.policies.pi05 import processor_pi05
    from lerobot.processor import TokenizerProcessorStep

    def local(tokenizer_name, **options):
        return TokenizerProcessorStep(tokenizer_name=str(tokenizer), **options)

    monkeypatch.setattr(processor_pi05, "TokenizerProcessorStep", local)
    policy, before, after = plain("pi05", **PI, chunk_size=8, n_action_steps=4)
    shown = states_of(policy)
    runner = async_runner(policy, before, after, mode=mode, overlap=2, threaded=False)
    assert policy.config.rtc_config.execution_horizon == 8
    actions = [runner.step(batch()) for _ in range(8)]
    assert shown[0][1] == {}
    leftover = shown[1][1]["prev_chunk_left_over"]
    assert shown[1][1]["inference_delay"] == 2
    assert leftover.shape == (2, 6, 2)
    torch.testing.assert_close(after(leftover)[:, :2], torch.stack(actions[2:4], 1))
    assert type(policy.rtc_processor).__name__ == ("RTCProcessor" if mode == "rtc" else "NetworkRTCProcessor")


def test_a_function_may_say_where_the_robot_will_be():
    policy, *processors = ramp()
    runner = async_runner(policy, *processors, overlap=1, threaded=False, estimator=lambda state, pending: state + 100)
    for _ in range(8):
        runner.step({STATE: torch.full((1, 2), 5.0)})
    assert policy.batches[1][STATE].tolist() == [[105, 105]]


def test_one_robot(tmp_path):
    policy, *processors = ramp(camera=True)
    robot = TwoJoints(TwoJointsConfig(calibration_dir=tmp_path))
    io = RobotIO(robot, task="go")
    with async_runner(policy, *processors, overlap=4) as runner:
        control_loop(runner, lambda: runner.observation(io.observe().content), io.act, fps=200, steps=16)
    assert [x for x, _ in robot.sent] == list(range(1, 17))
    assert policy.batches[0]["task"] == ["go"]
    assert policy.batches[0][CAMERA].shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"one of each of x\.pos, y\.pos"):
        io.act(torch.zeros(3))


def test_what_does_not_fit():
    policy, *processors = ramp()
    with pytest.raises(ValueError, match="inference_overlap_steps"):
        async_runner(policy, *processors, overlap=9)
    with pytest.raises(ValueError, match="later"):
        async_runner(policy, *processors, later=1)
    with pytest.raises(ValueError, match="state_from_action"):
        async_runner(policy, *processors, estimator="delta_masked")
    other = ramp()
    other[0].config.input_features[STATE] = PolicyFeature(FeatureType.STATE, (3,))
    with pytest.raises(ValueError, match="3 coordinates of the state and 2 of an action"):
        async_runner(*other)
    runner = async_runner(policy, *processors, threaded=False)
    assert isinstance(runner, PolicyRunner)
    with pytest.raises(ValueError, match=r"observation\.state: got none"):
        runner.step({})
    with pytest.raises(ValueError, match=r"observation\.state: got \[1, 1, 2\]"):
        runner.step({STATE: torch.zeros(1, 1, 2)})
    with pytest.raises(ValueError, match="chunk_size"):
        settings_for(PreTrainedConfig.get_choice_class("vqbet")())
    assert settings_for(PreTrainedConfig.get_choice_class("diffusion")()).chunk_size == 32
    runner.step(Observation(runner.observation({STATE: torch.zeros(2)}).content, torch.zeros(2)))
