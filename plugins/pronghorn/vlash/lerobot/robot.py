"""A LeRobot robot as what a control loop reads and commands."""

from __future__ import annotations

import torch
from lerobot.robots import Robot
from lerobot.utils.constants import OBS_STATE, OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame, hw_to_dataset_features
from torch import Tensor

from pronghorn.vlash.chunks import Observation

MOVED = (".pos", ".vel")


class RobotIO:
    """Reads and commands a robot, by the names that `lerobot-rollout` would use.

        control_loop(AsyncRunner(RemotePolicy("gpu:50061"), settings), io.observe, io.act, fps=30, steps=900)

    Args:
        robot: connected.
        task: what it is to do.

    Raises:
        ValueError: the robot has no state, or nothing to command.
    """

    def __init__(self, robot: Robot, task: str = "") -> None:
        seen = {
            name: kind
            for name, kind in robot.observation_features.items()
            if isinstance(kind, tuple) or (kind is float and name.endswith(MOVED))
        }
        self._robot, self._task = robot, task
        self._features = hw_to_dataset_features(seen, OBS_STR)
        self._actions = [name for name in robot.action_features if name.endswith(MOVED)]
        if OBS_STATE not in self._features or not self._actions:
            raise ValueError(f"robot: got {robot.name}, wanted one with a state and actions named like {MOVED}")

    def observe(self) -> Observation:
        """What is seen now; the content is LeRobot's frame of arrays, with the task."""
        frame = build_dataset_frame(self._features, self._robot.get_observation(), prefix=OBS_STR)
        return Observation({**frame, "task": self._task}, torch.from_numpy(frame[OBS_STATE]))

    def act(self, action: Tensor) -> None:
        """Send a command, [action_dim].

        Raises:
            ValueError: the robot takes another number of values.
        """
        if list(action.shape) != [len(self._actions)]:
            raise ValueError(f"action: got {list(action.shape)}, wanted one of each of {', '.join(self._actions)}")
        self._robot.send_action(dict(zip(self._actions, action.tolist(), strict=True)))
