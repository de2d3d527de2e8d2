"""A LeRobot policy between its processors, as what runners ask for chunks: state and actions in the robot's units."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from lerobot.policies import PreTrainedPolicy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.config import RTC, RTC_FULL, VLASHSettings
from pronghorn.vlash.lerobot.guided import guide_through_network
from pronghorn.vlash.lerobot.history import ObservationHistory, latest_state, with_latest_state
from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy


class Seen(NamedTuple):
    """What the content of an observation is for `PolicyChunks`.

    Attributes:
        frames: the latest observations, the oldest first. Where the state is [state_dim] each is a frame of one robot,
            arrays as LeRobot's `build_dataset_frame` gives them; where it is [batch, state_dim], a batch of
            tensors. A `task` may be among them.
        episode: what is another object in another episode; the policy and its processors are then reset.
    """

    frames: tuple[dict[str, Any], ...]
    episode: object = None


class PolicyChunks:
    """Computes chunks; one at a time, and from one thread.

    Policies whose actions are relative to the state are taken as relative to the state that they are asked for, which
    is the one that the robot will have.

    Args:
        policy: of type `vlash`, or any that predicts chunks. Its configuration is changed to `settings`.
        preprocessor: what LeRobot runs before the policy.
        postprocessor: what it runs after it.
        settings: how chunks follow each other; `settings_for` gives some that fit the policy.
        task: where a frame of one robot names none.
        robot_type: likewise.

    Raises:
        ValueError: LeRobot cannot guide the policy as `settings.async_mode` says.
    """

    def __init__(
        self,
        policy: PreTrainedPolicy,
        preprocessor: PolicyProcessorPipeline,
        postprocessor: PolicyProcessorPipeline,
        settings: VLASHSettings,
        task: str = "",
        robot_type: str = "",
    ) -> None:
        self._policy, self._before, self._after = policy, preprocessor, postprocessor
        self._task, self._robot_type = task, robot_type
        self._guided = settings.async_mode in (RTC, RTC_FULL)
        kind = policy.config.base if isinstance(policy, VLASHPolicy) else policy.config.type
        self.history_steps = policy.config.n_obs_steps if kind == "diffusion" else 0
        self._episode: object = self  # no episode yet
        _lead(policy, settings)

    def __call__(self, request: ChunkRequest) -> Tensor:
        """The chunk that is asked for.

        Args:
            request: the content of its observation is a `Seen`; state [state_dim] or [batch, state_dim], and a leftover
                of [(batch,) steps, action_dim].

        Returns:
            [(batch,) chunk_size, action_dim], of the state's dtype and on its device.

        Raises:
            ValueError: a camera of the policy is missing.
        """
        seen: Seen = request.observation.content
        if seen.episode is not self._episode:
            for part in (self._policy, self._before, self._after):
                part.reset()
            self._episode = seen.episode
        single = request.state.dim() == 1
        if single:
            leftover = None if request.leftover is None else request.leftover[None]
            batched = replace(request, state=request.state[None], leftover=leftover)
            frames = [self._batch(frame) for frame in seen.frames]
        else:
            batched, frames = request, list(seen.frames)
        with self._autocast():
            chunk = self._chunk(frames, batched).to(request.state)
        return chunk[0] if single else chunk

    def _batch(self, frame: dict[str, Any]) -> dict[str, Any]:
        """A batch of one, of a robot's frame."""
        arrays = {name: np.asarray(value) for name, value in frame.items() if not isinstance(value, str)}
        task, kind = frame.get("task", self._task), frame.get("robot_type", self._robot_type)
        batch = prepare_observation_for_inference(arrays, torch.device(self._policy.config.device), task, kind)
        return {**batch, "task": [task]}

    def _chunk(self, frames: list[dict[str, Any]], request: ChunkRequest) -> Tensor:
        history = ObservationHistory(self.history_steps)
        for frame in frames:
            history.add(frame)
        seen = history.batch()
        state = request.state.to(seen[OBS_STATE].device)
        batch = with_latest_state(seen, state)
        if isinstance(self._policy, VLASHPolicy):
            prepared = self._prepared(batch)
            ready = latest_state(prepared)
            chunk = self._policy.predict(replace(request, observation=Observation(prepared, ready), state=ready))
        elif self._guided and request.leftover is not None:
            prepared = self._prepared({**batch, ACTION: request.leftover.to(state.device)})
            leftover = prepared.pop(ACTION)
            chunk = self._policy.predict_action_chunk(
                prepared, inference_delay=request.delay, prev_chunk_left_over=leftover
            )
        else:
            chunk = self._policy.predict_action_chunk(self._prepared(batch))
        return self._after(chunk)

    def _prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        prepared = self._before(batch)
        missing = [name for name in self._policy.config.image_features if name not in prepared]
        if missing:
            given = ", ".join(sorted(name for name in prepared if name.startswith("observation")))
            raise ValueError(f"observation: got {given}, but the policy was made with {', '.join(missing)} too")
        return prepared

    def _autocast(self) -> AbstractContextManager[object]:
        kind = torch.device(self._policy.config.device).type
        return torch.autocast(kind) if kind == "cuda" and self._policy.config.use_amp else nullcontext()


def _lead(policy: PreTrainedPolicy, settings: VLASHSettings) -> None:
    if isinstance(policy, VLASHPolicy):
        for name, value in settings.to_dict().items():
            setattr(policy.config, name, value)
        policy = policy.base
    mode, config = settings.async_mode, policy.config
    if mode not in (RTC, RTC_FULL):
        return
    if not hasattr(policy, "init_rtc_processor"):
        raise ValueError(
            f"mode: got {mode!r} with a policy of type {config.type!r}, which LeRobot cannot guide by real-time "
            "chunking; pi0, pi05 and smolvla can be"
        )
    config.rtc_config = config.rtc_config or RTCConfig(execution_horizon=settings.chunk_size)
    config.rtc_config.enabled = True
    policy.init_rtc_processor()
    if mode == RTC_FULL:
        guide_through_network(policy)
