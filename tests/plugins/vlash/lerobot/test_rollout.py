"""`lerobot-rollout --inference.type=vlash`, by LeRobot's own function, strategies and program."""

import json
import logging
import signal
import threading
from dataclasses import dataclass, field

import draccus
import mock_robot
import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import AbsoluteActionsProcessorStep, RelativeActionsProcessorStep
from lerobot.rollout import context, inference
from lerobot.rollout.inference import InferenceEngineConfig, SyncInferenceConfig
from lerobot.rollout.robot_wrapper import ThreadSafeRobot
from lerobot.scripts import lerobot_rollout
from ramp_policy import ACTION, CAMERA, STATE, ramp
from tiny_lerobot import ACT

from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy
from pronghorn.vlash.lerobot.rollout import VLASHInferenceConfig
from pronghorn.vlash.watchdog import VLASHError

FEATURES = {
    STATE: {"dtype": "float32", "shape": (2,), "names": list(mock_robot.JOINTS)},
    ACTION: {"dtype": "float32", "shape": (2,), "names": list(mock_robot.JOINTS)},
}


class Control:
    """An engine that LeRobot made, and the robot that follows it."""

    def __init__(self, folder, policy, before, after, make=context.create_inference_engine, **options):
        robot = mock_robot.TwoJoints(mock_robot.TwoJointsConfig(camera=False, calibration_dir=folder))
        self.robot, self.shutdown = ThreadSafeRobot(robot), threading.Event()
        compiled, device = options.pop("use_torch_compile", False), options.pop("device", "cpu")
        keys, features = options.pop("keys", list(mock_robot.JOINTS)), options.pop("features", FEATURES)
        self.engine = make(
            VLASHInferenceConfig(**options), policy=policy, preprocessor=before, postprocessor=after,
            robot_wrapper=self.robot, hw_features=features, dataset_features=features, ordered_action_keys=keys,
            task="go", fps=30.0, device=device, use_torch_compile=compiled, shutdown_event=self.shutdown,
        )  # fmt: skip
        self.engine.reset()
        self.engine.start()
        self.engine.resume()

    def frame(self):
        return {STATE: np.array(self.robot.inner.position, dtype=np.float32)}

    def step(self):
        """One period, at whose end a chunk that was asked for is there; what the robot is told."""
        action = self.engine.get_action(self.frame())
        if action is not None:
            self.robot.send_action(dict(zip(mock_robot.JOINTS, action.tolist(), strict=True)))
        return None if action is None else action[0].item()

    def steps(self, count):
        return [self.step() for _ in range(count)]

    def settle(self):
        asked = self.engine.runner.manager._asked
        while asked is not None and not asked.pending.done():
            pass

    def settled_steps(self, count):
        found = []
        for _ in range(count):
            self.settle()
            found.append(self.step())
        return found


@pytest.fixture
def control(tmp_path):
    made = []

    def make(*arguments, **options):
        made.append(Control(tmp_path, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.engine.stop()


@pytest.mark.parametrize("module", [inference, inference.factory, context])
def test_lerobot_makes_the_engine(control, module):
    engine = control(*ramp(), make=module.create_inference_engine).engine
    assert isinstance(engine, inference.InferenceEngine)
    assert (engine.settings.n_action_steps, engine.settings.fps, engine.settings.async_mode) == (8, 30, "vlash")
    assert engine.ready
    assert not engine.failed


@dataclass
class Program:
    inference: InferenceEngineConfig = field(default_factory=SyncInferenceConfig)


def test_its_options():
    given = {
        "overlap_steps": "auto", "n_action_steps": "4", "state_estimator": "delta_masked",
        "state_from_action": "[1, null]", "delta_dims": "[0]", "action_low": "[-1, -2.5]",
        "late_chunk": "continue", "stale_after_s": "0.5",
    }  # fmt: skip
    words = ["--inference.type=vlash", *(f"--inference.{name}={value}" for name, value in given.items())]
    config = draccus.parse(Program, args=words).inference
    settings = config.settings(ramp()[0], fps=50).to_dict()
    assert settings.pop("inference_overlap_steps") == "auto"
    assert (settings["state_from_action"], settings["delta_dims"]) == ([1, None], [0])
    assert (settings["action_low"], settings["late_chunk"], settings["stale_after_s"]) == ([-1, -2.5], "continue", 0.5)
    assert (settings["n_action_steps"], settings["chunk_size"], settings["fps"]) == (4, 8, 50)
    words = ["--inference.type=vlash", "--inference.overlap_steps=3"]
    assert draccus.parse(Program, args=words).inference.overlap_steps == 3
    with pytest.raises(ValueError, match="late_chunk"):
        VLASHInferenceConfig(late_chunk="never").settings(ramp()[0], fps=50)


@pytest.mark.fault(26)
def test_motion_goes_on_over_chunks_without_a_stall(control):
    policy, *processors = ramp()
    run = control(policy, *processors, overlap_steps=3)
    assert run.settled_steps(24) == list(range(1, 25))
    statistics = run.engine.runner.statistics()
    assert (statistics.chunks, statistics.stalls, statistics.late_ticks) == (3, 1, 0)
    shown = [batch[STATE].tolist() for batch in policy.batches]
    assert shown == [[[0, 0]], [[8, 8]], [[16, 16]], [[24, 24]]], "the last action's, three steps before it is sent"
    assert policy.batches[0]["task"] == ["go"]
    assert policy.resets == 1


def test_naive_repeats_what_it_missed(control):
    run = control(*ramp(), mode="naive", overlap_steps=2, n_action_steps=4)
    # Asked for after 2 of 4, from the measured state 2; its first two actions are left out.
    assert run.settled_steps(8) == [1, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="leaves out 2 actions"):
        control(*ramp(), mode="naive", overlap_steps=2)


def test_quantization_and_sync(control):
    run = control(*ramp(), mode="sync", overlap_steps=0, action_quant_ratio=2)
    assert run.steps(8) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert run.engine.runner.statistics().stalls == 2


def fail(batch):
    raise RuntimeError("no more")


def end_thread(batch):
    raise SystemExit


def not_finite(batch):
    return torch.full((1, 8, 2), torch.nan)


@pytest.mark.parametrize(("way", "message"), [(fail, "no more"), (end_thread, "end its thread"), (not_finite, "NaN")])
@pytest.mark.fault(26)
def test_a_policy_that_fails_ends_the_rollout(control, caplog, way, message):
    policy, *processors = ramp()
    run = control(policy, *processors, overlap_steps=2)
    run.steps(6)
    policy.before = way
    assert run.settled_steps(2) == [7, 8], "what was planned"
    run.settle()
    with caplog.at_level(logging.ERROR), pytest.raises(VLASHError, match=message):
        run.step()
    assert run.step() is None
    assert run.engine.failed
    assert run.shutdown.is_set()
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    policy.before = None
    run.engine.reset()
    assert run.step() is None, "a failure stays"
    run.shutdown.clear()
    run.engine.start()
    assert run.step() == 9
    assert not run.engine.failed


@pytest.mark.fault(26)
def test_a_chunk_that_is_too_late_ends_the_rollout(control):
    policy, *processors = ramp()
    run = control(policy, *processors, overlap_steps=2, stale_after_s=0.05)
    release = threading.Event()
    run.steps(6)
    policy.before = lambda batch: release.wait(10) and None
    assert run.steps(3) == [7, 8, 8], "it holds"
    release.wait(0.06)
    with pytest.raises(VLASHError, match="late"):
        run.step()
    assert run.engine.failed
    assert run.shutdown.is_set()
    release.set()


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.fault(26)
def test_the_first_chunk_is_not_waited_for_without_end(control, ended):
    policy, *processors = ramp()
    run = control(policy, *processors, wait_s=0.05 if not ended else 30)
    release = threading.Event()
    policy.before = lambda batch: (run.shutdown.set() if ended else None, release.wait(10))[0]
    if ended:
        assert run.step() is None
    else:
        with pytest.raises(VLASHError, match="wait_s"):
            run.step()
    assert run.engine.failed
    release.set()


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.fault(26)
def test_nothing_of_the_old_chunk_comes_after_an_intervention(control, reset):
    policy, *processors = ramp()
    run = control(policy, *processors, overlap_steps=3)
    begun, release = threading.Event(), threading.Event()
    run.steps(5)

    def slow(batch):
        begun.set()
        release.wait(10)

    policy.before = slow
    assert run.step() == 6
    assert begun.wait(10)
    run.engine.pause()
    assert run.step() is None
    policy.before = None
    run.robot.inner.position = [100.0, 100.0]  # a human moved it
    if reset:
        run.engine.reset()
    run.engine.resume()
    release.set()
    assert run.settled_steps(9) == list(range(101, 110))
    assert policy.batches[-2][STATE].tolist() == [[100, 100]]
    assert policy.resets == 2


def test_an_episode_begins_anew(control):
    policy, *processors = ramp()
    run = control(policy, *processors)
    run.settled_steps(6)
    run.settle()
    run.robot.inner.position = [50.0, 50.0]
    run.engine.reset()
    assert run.step() == 51
    assert policy.resets == 2


def test_before_start_and_after_stop_there_is_nothing(control):
    run = control(*ramp())
    assert run.engine.get_action(None) is None
    run.engine.stop()
    run.engine.stop()
    assert run.step() is None
    run.engine.start()
    assert run.step() == 1


def test_actions_relative_to_the_state(control):
    policy, before, after = ramp()
    relative = RelativeActionsProcessorStep(enabled=True, exclude_joints=["y"])
    before.steps.append(relative)
    after.steps.append(AbsoluteActionsProcessorStep(enabled=True, relative_step=relative))
    ahead = torch.arange(1.0, 9.0)
    policy.before = lambda batch: torch.stack([ahead, ahead + batch[STATE][0, 1]], 1)[None]
    run = control(policy, before, after, overlap_steps=3)
    assert relative.action_names == list(mock_robot.JOINTS)
    assert run.settled_steps(24) == list(range(1, 25))
    assert run.robot.inner.sent == [(step, step) for step in range(1, 25)]


def test_a_compiled_policy_is_warmed_up_where_it_will_run(control):
    policy, *processors = ramp()
    threads = []
    policy.before = lambda batch: threads.append(threading.current_thread())
    run = control(policy, *processors, use_torch_compile=True)
    observation = dict(zip(mock_robot.JOINTS, (3.0, 3.0), strict=True))
    for left in (2, 1):
        assert (run.engine.ready, len(policy.batches)) == (False, 2 - left)
        run.engine.notify_observation(observation)
    run.engine.notify_observation(observation)
    assert run.engine.ready
    assert len(policy.batches) == 2
    assert len(run.engine.runner.manager.latency) == 0
    assert run.engine.runner.worker.wait_s == 60
    run.engine.reset()
    assert run.step() == 1
    assert len(set(threads)) == 1


def test_what_does_not_fit_is_told_before_anything_moves(control):
    with pytest.raises(ValueError, match=r"delta_masked.*state_from_action=\[1, 0\]"):
        control(*ramp(), keys=list(reversed(mock_robot.JOINTS)))
    with pytest.raises(ValueError, match="overlap_steps"):
        control(*ramp(), overlap_steps=9)
    with pytest.raises(ValueError, match=r"rtc.*ramp"):
        control(*ramp(), mode="rtc", n_action_steps=4)
    with pytest.raises(ValueError, match=r"gives action, wanted observation\.state"):
        control(*ramp(), features={ACTION: FEATURES[ACTION]})
    with pytest.raises(ValueError, match=r"--policy\.device=cuda"):
        control(*ramp(), device="cuda")
    with pytest.raises(ValueError, match="wait_s"):
        control(*ramp(), wait_s=0)
    policy, *processors = ramp()
    policy.config.input_features[STATE] = PolicyFeature(FeatureType.STATE, (3,))
    with pytest.raises(ValueError, match="3 coordinates of the state and 2 of an action"):
        control(policy, *processors)
    del policy.config.input_features[STATE]
    with pytest.raises(ValueError, match="takes no state"):
        control(policy, *processors)


@pytest.mark.fault(26)
def test_a_camera_is_missing(control):
    run = control(*ramp(camera=True))
    with pytest.raises(VLASHError, match=f"{CAMERA} too"):
        run.step()
    assert run.engine.failed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An ACT inside of VLASH that looks through the robot's camera."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = VLASHConfig(
        base="act", base_config=ACT, device="cpu", chunk_size=16, n_action_steps=8, inference_overlap_steps=4,
        input_features={
            STATE: PolicyFeature(FeatureType.STATE, (2,)), CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
    )  # fmt: skip
    ones = {"mean": torch.zeros(2), "std": torch.ones(2)}
    image = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    policy = VLASHPolicy(config, dataset_stats={STATE: ones, ACTION: ones, CAMERA: image})
    policy.save_pretrained(folder)
    for processor in make_pre_post_processors(config):
        processor.save_pretrained(folder)
    return folder


@pytest.fixture
def rollout(command, tmp_path):
    """Runs lerobot-rollout; gives the robot."""
    signals = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    root, handlers, level = logging.getLogger(), list(logging.getLogger().handlers), logging.getLogger().level

    def run(policy, *arguments):
        command(
            lerobot_rollout.main, f"--policy.path={policy}", "--policy.device=cpu", "--robot.type=two_joints",
            f"--robot.calibration_dir={tmp_path}", "--inference.type=vlash", "--return_to_initial_position=false",
            "--play_sounds=false", "--task=go", *arguments,
        )  # fmt: skip
        return mock_robot.made[-1]

    yield run
    root.handlers = handlers
    root.setLevel(level)
    for name, handler in signals.items():
        signal.signal(name, handler)


def test_the_program(checkpoint, rollout, capsys):
    robot = rollout(
        checkpoint, "--fps=50", "--duration=0.8", "--inference.overlap_steps=auto", "--inference.action_quant_ratio=2",
        "--inference.mode=vlash",
    )  # fmt: skip
    assert 20 < len(robot.sent) <= 40
    assert np.isfinite(robot.sent).all()
    assert not robot.is_connected
    log = capsys.readouterr().err
    assert f"VLASH (vlash): {len(robot.sent)} commands" in log
    assert "stalled 1 times" in log


def test_the_program_in_episodes(checkpoint, rollout, tmp_path):
    robot = rollout(
        checkpoint, "--strategy.type=episodic", "--strategy.reset_to_initial_position=false", "--fps=50",
        "--dataset.repo_id=tiny/rollout_test", f"--dataset.root={tmp_path / 'data'}", "--dataset.num_episodes=2",
        "--dataset.episode_time_s=0.4", "--dataset.reset_time_s=0", "--dataset.push_to_hub=false", "--dataset.fps=50",
        "--dataset.video=false", "--dataset.single_task=go", "--inference.mode=sync",
    )  # fmt: skip
    info = json.loads((tmp_path / "data" / "meta" / "info.json").read_text())
    assert info["total_episodes"] == 2
    assert info["total_frames"] == len(robot.sent)


@pytest.mark.parametrize("home", [False, True])
def test_the_program_fails_when_the_policy_does(checkpoint, rollout, monkeypatch, home):
    predict, asked = VLASHPolicy.predict, []

    def bad_in_the_end(policy, request):
        asked.append(request)
        return predict(policy, request) if len(asked) == 1 else torch.full((1, 16, 2), torch.inf)

    monkeypatch.setattr(VLASHPolicy, "predict", bad_in_the_end)
    with pytest.raises(VLASHError, match="NaN or infinity"):
        rollout(checkpoint, "--fps=50", "--duration=30", f"--return_to_initial_position={home}")
    robot = mock_robot.made[-1]
    assert not robot.is_connected
    assert len(robot.sent) == 8 + (150 if home else 0), "the first chunk, and LeRobot's way home"
    assert (robot.position == [0, 0]) == home
