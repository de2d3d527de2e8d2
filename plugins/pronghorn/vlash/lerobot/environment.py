"""Episodes in an environment of LeRobot's, as sweeps take them."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs import EnvConfig, make_env, make_env_pre_post_processors, preprocess_observation
from lerobot.envs.utils import NEW_ROLLOUT_OPTION
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot.utils.random_utils import set_seed
from torch import Tensor

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.lerobot.policy_chunks import Seen


class LeRobotEnvironment:
    """Several episodes in lock step, simulated in this process; what is seen is for `PolicyChunks`.

    Success is what the environment reports as `is_success`, at any time of an episode, as `lerobot-eval` has it.

    Args:
        config: of the environment.
        policy: configuration of the policy that looks on: how many observations it takes, and how it wants them.
        count: episodes at a time.

    Raises:
        ValueError: the configuration is of several tasks.
        ImportError: the environment's package is not installed.
    """

    def __init__(self, config: EnvConfig, policy: PreTrainedConfig, count: int = 1) -> None:
        self._env = _only_task(config, count)
        self._before, self._after = make_env_pre_post_processors(config, policy)
        self._frames: deque[dict[str, Any]] = deque(maxlen=max(policy.n_obs_steps, 1))
        self._count = count
        self.horizon = int(self._env.call("_max_episode_steps")[0])
        self.finished = torch.zeros(count, dtype=torch.bool)

    @property
    def action_dim(self) -> int:
        """Coordinates of a command."""
        return int(self._env.action_space.shape[-1])

    def reset(self, seed: int) -> Observation:
        """Begin other episodes; noise that a policy draws begins anew with them."""
        first = seed * self._count
        set_seed(first)
        self.finished = torch.zeros(self._count, dtype=torch.bool)
        self._succeeded = self.finished.clone()
        self._largest = torch.full((self._count,), -torch.inf)
        self._sum = torch.zeros(self._count)
        self._frames.clear()
        self._episode = object()
        seeds = list(range(first, first + self._count))
        seen, _ = self._env.reset(seed=seeds, options={NEW_ROLLOUT_OPTION: True})
        return self._observation(seen)

    def step(self, action: Tensor) -> Observation:
        """Execute a command for a control period; an episode that is over counts no more."""
        command = self._after({ACTION: action})[ACTION].cpu().numpy()
        seen, reward, terminated, truncated, info = self._env.step(command)
        paid = torch.as_tensor(reward, dtype=torch.float32)
        self._sum += paid.masked_fill(self.finished, 0.0)
        self._largest = self._largest.maximum(paid.masked_fill(self.finished, -torch.inf))
        self._succeeded |= _successes(info, self._count) & ~self.finished
        self.finished = self.finished | torch.as_tensor(np.logical_or(terminated, truncated))
        return self._observation(seen)

    def success(self) -> Tensor:
        """[count], 1 where the task was done."""
        return self._succeeded.float()

    def rewards(self) -> tuple[Tensor, Tensor]:
        """See `sweep.Rewarding`."""
        return self._largest, self._sum

    def close(self) -> None:
        """End the simulator."""
        self._env.close()

    def _observation(self, seen: Any) -> Observation:
        frame = self._before({**preprocess_observation(seen), "task": _instructions(self._env)})
        if OBS_STATE not in frame:
            raise ValueError(f"env: got one that gives {', '.join(sorted(frame))}, wanted {OBS_STATE} among them")
        self._frames.append(frame)
        return Observation(Seen(tuple(self._frames), self._episode), frame[OBS_STATE])


def _only_task(config: EnvConfig, count: int) -> Any:
    """The one vector environment of a configuration."""
    try:
        made = make_env(config, n_envs=count)
    except ImportError as error:
        raise ImportError(f"env: {config.type} needs what is not installed, {error}") from error
    tasks = [(f"{suite}:{number}", env) for suite, of_suite in made.items() for number, env in of_suite.items()]
    if len(tasks) != 1:
        for _, env in tasks:
            env.close()
        raise ValueError(
            f"env: {config.type} with task={config.task!r} is {len(tasks)} tasks, wanted one: --env-option task=…"
        )
    return tasks[0][1]


def _instructions(env: Any) -> list[str]:
    """What each robot is told to do; nothing where the environment has no words for it."""
    for name in ("task_description", "task"):
        try:
            return [str(text) for text in env.call(name)]
        except (AttributeError, NotImplementedError):  # the environments' ways to say that they have none
            continue
    return [""] * env.num_envs


def _successes(info: dict[str, Any], count: int) -> Tensor:
    """[count], bool; an episode that ended in this step reports in `final_info` where its successor has begun."""
    found = torch.zeros(count, dtype=torch.bool)
    for source in (info, info.get("final_info")):
        if isinstance(source, dict) and "is_success" in source:
            found |= torch.as_tensor(np.broadcast_to(np.asarray(source["is_success"], dtype=bool), count).copy())
    return found
