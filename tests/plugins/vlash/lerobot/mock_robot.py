"""A robot of two joints and a camera that is where it was told to be; LeRobot's programs know it as `two_joints`."""

from dataclasses import dataclass

import numpy as np
from lerobot.robots import Robot, RobotConfig

JOINTS = ("x.pos", "y.pos")
made = []


@RobotConfig.register_subclass("two_joints")
@dataclass(kw_only=True)
class TwoJointsConfig(RobotConfig):
    camera: bool = True


class TwoJoints(Robot):
    config_class = TwoJointsConfig
    name = "two_joints"

    def __init__(self, config):
        super().__init__(config)
        self.camera, self.is_connected_now = config.camera, False
        self.position, self.sent = [0.0, 0.0], []
        made.append(self)

    @property
    def observation_features(self):
        return dict.fromkeys(JOINTS, float) | ({"front": (32, 32, 3)} if self.camera else {})

    @property
    def action_features(self):
        return dict.fromkeys(JOINTS, float)

    @property
    def is_connected(self):
        return self.is_connected_now

    def connect(self, calibrate=True):
        self.is_connected_now = True

    @property
    def is_calibrated(self):
        return True

    def calibrate(self):
        pass

    def configure(self):
        pass

    def get_observation(self):
        image = {"front": np.zeros((32, 32, 3), np.uint8)} if self.camera else {}
        return {**dict(zip(JOINTS, self.position, strict=True)), **image}

    def send_action(self, action):
        self.position = [action[name] for name in JOINTS]
        self.sent.append(tuple(self.position))
        return action

    def disconnect(self):
        self.is_connected_now = False
