"""A LeRobot checkpoint on a server, and a LeRobot robot that it drives."""

import json

import mock_robot
import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from ramp_policy import ACTION, STATE
from tiny_lerobot import ACT, DIFFUSION

from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.control import control_loop
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy
from pronghorn.vlash.lerobot.remote import load_served
from pronghorn.vlash.lerobot.robot import RobotIO
from pronghorn.vlash.remote import PolicyServer, RemotePolicy
from pronghorn.vlash.runner import AsyncRunner
from pronghorn.vlash.watchdog import PolicyError

FRONT = "observation.images.front"
EYE = "observation.images.eye"


def saved(folder, **options):
    config = VLASHConfig(
        device="cpu", chunk_size=8, n_action_steps=6, inference_overlap_steps=2, **options,
        input_features={
            STATE: PolicyFeature(FeatureType.STATE, (2,)), EYE: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
    )  # fmt: skip
    torch.manual_seed(0)
    one = {
        "mean": torch.tensor([1.0, 2.0]),
        "std": torch.tensor([2.0, 4.0]),
        "min": torch.zeros(2),
        "max": torch.ones(2),
    }
    image = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    policy = VLASHPolicy(config, dataset_stats={STATE: one, ACTION: one, EYE: image})
    policy.save_pretrained(folder)
    for processor in make_pre_post_processors(config):
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("served"), base="act", base_config=ACT)


def frame(seed=0):
    random = np.random.default_rng(seed)
    return {
        STATE: random.normal(size=2).astype(np.float32),
        FRONT: random.integers(0, 255, (32, 32, 3), dtype=np.uint8),
    }


def test_a_served_checkpoint_gives_what_the_policy_gives(checkpoint):
    policy, description = load_served(str(checkpoint), "cpu", rename_map={FRONT: EYE})
    assert description.inputs == (FRONT,)
    assert (description.state_dim, description.action_dim, description.settings.n_action_steps) == (2, 2, 6)
    seen, ahead = frame(), torch.tensor([3.0, 4.0])
    with PolicyServer(policy, description) as server, RemotePolicy(server.address) as client:
        remote = client(ChunkRequest(Observation({**seen, "task": "go"}, torch.from_numpy(seen[STATE])), ahead, 2))
        with pytest.raises(PolicyError, match=f"{FRONT} missing"):
            client(ChunkRequest(Observation({"task": "go"}, ahead), ahead))
        images = torch.from_numpy(seen[FRONT]).permute(2, 0, 1)[None].float() / 255
        content = {FRONT: images, "task": ["go"]}
        of_batch = client(ChunkRequest(Observation(content, ahead[None]), ahead[None], 2))
    local = VLASHPolicy.from_pretrained(checkpoint)
    expected = local.predict_action_chunk({STATE: ahead[None], EYE: images, "task": ["go"]})
    torch.testing.assert_close(remote, expected[0])
    torch.testing.assert_close(of_batch, expected)


def test_a_robot_is_driven_over_the_network(checkpoint, tmp_path):
    robot = mock_robot.TwoJoints(mock_robot.TwoJointsConfig(calibration_dir=tmp_path))
    io = RobotIO(robot, task="go")
    served = load_served(str(checkpoint), "cpu", rename_map={FRONT: EYE})
    with PolicyServer(*served) as server, RemotePolicy(server.address, jpeg_quality=90) as client:
        settings = client.settings(inference_overlap_steps="auto", fps=50, stale_after_s=60.0)
        with AsyncRunner(client, settings) as runner:
            record = control_loop(runner, io.observe, io.act, fps=50, steps=25)
            assert runner.statistics().chunks > 1
    assert len(robot.sent) == len(record.actions) == 25
    assert record.stalls == 1
    assert np.isfinite(robot.sent).all()


def test_what_cannot_be_served(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="async_mode"):
        load_served(str(checkpoint), "cpu", mode="fast")
    with pytest.raises(ValueError, match="cannot guide"):
        load_served(str(checkpoint), "cpu", mode="rtc")
    options = DIFFUSION | {"crop_shape": (32, 32)}
    folder = saved(tmp_path / "diffusion", base="diffusion", base_config=json.loads(json.dumps(options)))
    with pytest.raises(ValueError, match="several observations"):
        load_served(str(folder), "cpu")
