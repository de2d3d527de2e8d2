"""The front door for a control loop of one's own: any LeRobot policy, asynchronously."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.config import VLASH, VLASHSettings
from pronghorn.vlash.estimators import StateEstimator, state_estimator
from pronghorn.vlash.lerobot.chunk_length import predicted_actions
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.policy_chunks import PolicyChunks, Seen
from pronghorn.vlash.runner import AsyncRunner


class PolicyRunner(AsyncRunner):
    """An `AsyncRunner` that takes observations as LeRobot has them.

    Args:
        chunks: the policy.
        settings: how chunks follow each other.
        estimator: (state, pending actions) -> state; by default the one that `settings` names.
        threaded: False computes each chunk at once in the caller's thread.
        waiting: `wait_s` and `stop`, as of `AsyncRunner`.
    """

    def __init__(
        self,
        chunks: PolicyChunks,
        settings: VLASHSettings,
        estimator: StateEstimator | None = None,
        threaded: bool = True,
        **waiting: Any,
    ) -> None:
        super().__init__(chunks, settings, estimator, threaded, **waiting)
        self._frames: deque[dict[str, Any]] = deque(maxlen=max(chunks.history_steps, 1))
        self._episode = object()

    def observation(self, frame: dict[str, Any]) -> Observation:
        """What is seen now, as runners take it; it is the latest of those that a policy with a memory is shown.

        Args:
            frame: `observation.state`, images and text, in the robot's units: of one robot as LeRobot's
                `build_dataset_frame` gives it, or a batch of tensors.

        Raises:
            ValueError: there is no state of [state_dim] or [batch, state_dim].
        """
        state = torch.as_tensor(frame.get(OBS_STATE, 0.0))
        if state.dim() not in (1, 2):
            got = f"{list(state.shape)}" if OBS_STATE in frame else "none"
            raise ValueError(f"{OBS_STATE}: got {got}, wanted [state_dim] or [batch, state_dim]")
        self._frames.append(frame)
        return Observation(Seen(tuple(self._frames), self._episode), state)

    def step(self, observation: dict[str, Any] | Observation | Callable[[], Observation]) -> Tensor:
        """The command of one control period, as of `AsyncRunner.step`; an observation may be as LeRobot has it.

        Returns:
            [(batch,) action_dim], in the robot's units.
        """
        if isinstance(observation, dict):
            observation = self.observation(observation)
        return super().step(observation)

    def reset(self) -> None:
        """A new episode, as of `AsyncRunner.reset`; the policy and its processors are reset before its first chunk."""
        super().reset()
        self._frames.clear()
        self._episode = object()


def settings_for(config: PreTrainedConfig, **given: Any) -> VLASHSettings:
    """The settings of a policy of type `vlash`, or VLASH's defaults and the length of another policy's chunks.

    Args:
        config: of the policy.
        given: settings that count instead, where they are not None.

    Raises:
        ValueError, TypeError: as of `VLASHSettings`; or actions cannot stand for the state as `state_estimator` says.
    """
    if isinstance(config, VLASHConfig):
        values = config.settings().to_dict()
    else:
        # A diffusion policy gives away no more of what it predicts.
        predicted = config.n_action_steps if config.type == "diffusion" else predicted_actions(config)
        values = {"chunk_size": predicted, "n_action_steps": min(config.n_action_steps, predicted)}
    return VLASHSettings.from_dict(values | {name: value for name, value in given.items() if value is not None})


def check_estimator(settings: VLASHSettings, config: PreTrainedConfig) -> None:
    """Raise ValueError where the estimator that `settings` names cannot work, before anything moves."""
    if settings.async_mode != VLASH or settings.inference_overlap_steps == 0:
        return
    if config.robot_state_feature is None:
        raise ValueError("mode: got 'vlash' for a policy that takes no state, wanted 'naive', 'rtc' or 'sync'")
    state, action = torch.zeros(config.robot_state_feature.shape), torch.zeros(config.action_feature.shape)
    state_estimator(settings)(state, action.expand(settings.action_quant_ratio, -1))


def async_runner(
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    mode: str | None = None,
    overlap: int | str | None = None,
    estimator: str | StateEstimator | None = None,
    *,
    task: str = "",
    threaded: bool = True,
    **settings: Any,
) -> PolicyRunner:
    """Control a robot, or a batch in lock step, by a LeRobot policy that is slower than the control loop.

        with async_runner(policy, preprocessor, postprocessor, mode="vlash", overlap=4) as runner:
            while True:
                robot.send_action(names(runner.step(frame())))

    What is None is as a policy of type `vlash` was configured; for others as in `VLASHSettings`, with chunks as long as
    the policy has them.

    Args:
        policy: of type `vlash`, or any that predicts chunks from one observation (or is a diffusion policy).
        preprocessor: what LeRobot runs before the policy.
        postprocessor: what it runs after it.
        mode: `VLASHSettings.async_mode`.
        overlap: `VLASHSettings.inference_overlap_steps`.
        estimator: `VLASHSettings.state_estimator`, or a function (state, pending actions) -> state.
        task: what one robot is to do, where its frames do not say it.
        threaded: False computes each chunk at once in the caller's thread.
        settings: any others, by name.

    Raises:
        ValueError, TypeError: a setting has no meaning, or does not fit the policy.
    """
    named = isinstance(estimator, str) or estimator is None
    chosen = settings_for(
        policy.config, async_mode=mode, inference_overlap_steps=overlap,
        state_estimator=estimator if named else None, **settings,
    )  # fmt: skip
    if named:
        check_estimator(chosen, policy.config)
    chunks = PolicyChunks(policy, preprocessor, postprocessor, chosen, task)
    return PolicyRunner(chunks, chosen, None if isinstance(estimator, str) else estimator, threaded)
