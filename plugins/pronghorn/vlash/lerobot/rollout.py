"""`lerobot-rollout --inference.type=vlash`: robots that do not wait for their policy."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline, RelativeActionsProcessorStep
from lerobot.rollout.inference import InferenceEngine, InferenceEngineConfig
from lerobot.rollout.robot_wrapper import ThreadSafeRobot
from lerobot.utils.constants import OBS_STATE, OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame
from torch import Tensor

from pronghorn.lerobot.inference_engines import let_configurations_create
from pronghorn.vlash.config import LAST_ACTION, VLASH, VLASHSettings
from pronghorn.vlash.latency import LatencyTracker
from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy
from pronghorn.vlash.lerobot.policy_chunks import PolicyChunks
from pronghorn.vlash.lerobot.runner import PolicyRunner, check_estimator, settings_for
from pronghorn.vlash.watchdog import VLASHError

logger = logging.getLogger(__name__)


@InferenceEngineConfig.register_subclass("vlash")
@dataclass
class VLASHInferenceConfig(InferenceEngineConfig):
    """Options of `--inference.type=vlash`.

    What is None is as a policy of type `vlash` was configured; for other policies as in `VLASHSettings`, with chunks as
    long as the policy has them.

    Attributes:
        mode: `VLASHSettings.async_mode`.
        overlap_steps: `VLASHSettings.inference_overlap_steps`.
        n_action_steps: as in `VLASHSettings`, and so are those that follow.
        wait_s: seconds that a chunk is waited for where nothing runs: at an episode's start, and in mode "sync".
    """

    mode: str | None = None
    overlap_steps: int | str | None = None
    n_action_steps: int | None = None
    action_quant_ratio: int | None = None
    state_estimator: str | None = None
    state_from_action: list[int | None] | None = None
    delta_dims: list[int] | None = None
    action_low: list[float] | None = None
    action_high: list[float] | None = None
    late_chunk: str | None = None
    stale_after_s: float | None = None
    wait_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.wait_s < math.inf:
            raise ValueError(f"wait_s: got {self.wait_s}, wanted a positive number of seconds")

    def settings(self, policy: PreTrainedPolicy, fps: float) -> VLASHSettings:
        """The settings for a policy.

        Raises:
            ValueError, TypeError: as of `settings_for`.
        """
        return settings_for(
            policy.config, async_mode=self.mode, inference_overlap_steps=self.overlap_steps,
            n_action_steps=self.n_action_steps, action_quant_ratio=self.action_quant_ratio,
            state_estimator=self.state_estimator, state_from_action=self.state_from_action,
            delta_dims=self.delta_dims, action_low=self.action_low, action_high=self.action_high,
            late_chunk=self.late_chunk, stale_after_s=self.stale_after_s, fps=fps,
        )  # fmt: skip

    def create_engine(self, **context: Any) -> VLASHInferenceEngine:
        """What LeRobot's `create_inference_engine` is to give for this configuration; arguments as of that function."""
        return VLASHInferenceEngine(self, **context)


class VLASHInferenceEngine(InferenceEngine):
    """Gives a rollout its actions, from a policy that computes in a thread of its own.

    It waits for the policy only where nothing runs. When something goes wrong (the policy raises or its thread dies, a
    chunk or the measured state is not finite, a chunk is too late) it sets `failed` and the event that ends the
    rollout, raises, and gives nothing any more. What LeRobot does then is to save what it has recorded, to drive the
    robot to where it began (unless `--return_to_initial_position=false`), to disconnect it, and to fail.

    Args:
        config: its options.
        policy: of type `vlash`, or any that predicts chunks.
        preprocessor: what LeRobot runs before the policy.
        postprocessor: what it runs after it.
        robot_wrapper: the robot.
        dataset_features: names of state and cameras.
        ordered_action_keys: names of the policy's actions, in its order.
        task: what the robot is to do.
        fps: actions per second.
        use_torch_compile: whether the policy is compiled, which its first calls wait for.
        compile_warmup_inferences: how many.
        shutdown_event: ends the rollout.
        hw_features: of no use here.
        device: where the policy is.

    Raises:
        ValueError, TypeError: the options do not fit the policy or the robot.
    """

    def __init__(
        self,
        config: VLASHInferenceConfig,
        *,
        policy: PreTrainedPolicy,
        preprocessor: PolicyProcessorPipeline,
        postprocessor: PolicyProcessorPipeline,
        robot_wrapper: ThreadSafeRobot,
        dataset_features: dict[str, Any],
        ordered_action_keys: list[str],
        task: str,
        fps: float,
        use_torch_compile: bool = False,
        compile_warmup_inferences: int = 2,
        shutdown_event: Event | None = None,
        hw_features: dict[str, Any] | None = None,
        device: str | None = None,
    ) -> None:
        self._config, self._features, self._shutdown = config, dataset_features, shutdown_event
        self._settings = config.settings(policy, fps)
        check_estimator(self._settings, policy.config)
        self._check_state(ordered_action_keys)
        own = policy.config.device
        if device is not None and torch.device(device).type != torch.device(own).type:
            raise ValueError(f"device: got {device!r} for a policy of device {own!r}; say --policy.device={device} too")
        for step in _relative_steps(policy, preprocessor):
            if step.action_names is None:
                step.action_names = list(ordered_action_keys)
        self._chunks = PolicyChunks(policy, preprocessor, postprocessor, self._settings, task, robot_wrapper.robot_type)
        if use_torch_compile and isinstance(policy, VLASHPolicy):
            logger.warning("use_torch_compile does not reach into a policy of type vlash: nothing is compiled by it.")
        self._warm_ups = max(compile_warmup_inferences, 1) if use_torch_compile else 0
        self._runner: PolicyRunner | None = None
        self._active = self._failed = False

    @property
    def settings(self) -> VLASHSettings:
        """How chunks follow each other."""
        return self._settings

    @property
    def runner(self) -> PolicyRunner | None:
        """What gives the actions, between `start` and `stop`."""
        return self._runner

    @property
    def ready(self) -> bool:
        """Whether a compiled policy has been warmed up, or there is nothing to wait for any more."""
        return not self._warm_ups or self._failed

    @property
    def failed(self) -> bool:
        """Whether something went wrong since `start`."""
        return self._failed

    def start(self) -> None:
        """Begin; actions are given from now on."""
        self.stop()
        self._runner = PolicyRunner(self._chunks, self._settings, wait_s=self._config.wait_s, stop=self._shutdown)
        self._active, self._failed = True, False

    def stop(self) -> None:
        """End the policy's thread, and say in the log how it went."""
        self._active = False
        if self._runner is None:
            return
        counts = self._runner.statistics()
        self._runner.close()
        self._runner = None
        logger.info(
            "VLASH (%s): %d commands, %d chunks, stalled %d times for %.2f s in all, %d actions stood in for late "
            "chunks; 95 %% of the chunks took at most %.3f s", self._settings.async_mode, counts.commands,
            counts.chunks, counts.stalls, counts.stall_seconds, counts.late_ticks, counts.latency_p95 or 0.0,
        )  # fmt: skip

    def reset(self) -> None:
        """A new episode: nothing of the old one is given any more. A failure stays until `start`."""
        if self._runner is not None:
            self._runner.reset()

    def pause(self) -> None:
        """Give nothing, and forget the chunk that runs: a human has the robot."""
        self._active = False
        self.reset()

    def resume(self) -> None:
        """Begin anew, from what the robot is like then."""
        self._active = True

    def get_action(self, obs_frame: dict[str, Any] | None) -> Tensor | None:
        """The next command.

        Args:
            obs_frame: what is seen now, as LeRobot's `build_dataset_frame` gives it.

        Returns:
            [action_dim], in the robot's units and the policy's order; None while it is paused, has failed before, or
            the program ends.

        Raises:
            VLASHError: something went wrong, as of `RollForwardManager.tick`.
        """
        if self._runner is None or obs_frame is None or not self._active or self._failed:
            return None
        try:
            return self._runner.step(obs_frame)
        except VLASHError as error:
            self._failed = True
            if self._shutdown is not None:
                if self._shutdown.is_set():  # nobody wants an action any more
                    return None
                self._shutdown.set()
            logger.error("No command is given any more, and the rollout ends: %s", error)
            raise

    def notify_observation(self, obs: dict[str, Any]) -> None:
        """Warm up a compiled policy, in the thread that it will run in; else of no effect.

        Args:
            obs: what the robot's processor gave.
        """
        if self.ready or self._runner is None or self._runner.worker is None:
            return
        self._warm_ups -= 1
        self._runner.worker.wait_s = math.inf
        self.get_action(build_dataset_frame(self._features, obs, prefix=OBS_STR))
        self._runner.worker.wait_s = self._config.wait_s
        self._runner.reset()
        self._runner.manager.latency = LatencyTracker()  # compilation says nothing about what chunks take later

    def _check_state(self, actions: list[str]) -> None:
        """There has to be one, and the last action stands for it only where both have the same order."""
        if OBS_STATE not in self._features:
            raise ValueError(f"robot: got one that gives {', '.join(self._features)}, wanted {OBS_STATE} among them")
        if self._settings.async_mode != VLASH or self._settings.state_estimator != LAST_ACTION:
            return
        state = list(self._features[OBS_STATE]["names"])
        if state != actions and sorted(state) == sorted(actions):
            raise ValueError(
                f"state_estimator: got 'last_action', but the state is {', '.join(state)} and an action "
                f"{', '.join(actions)}; wanted 'delta_masked' and state_from_action={[actions.index(n) for n in state]}"
            )


def _relative_steps(policy: PreTrainedPolicy, preprocessor: PolicyProcessorPipeline) -> list[Any]:
    """Steps that make actions relative to the state, some of whose coordinates they know by name."""
    pipelines = [preprocessor]
    if isinstance(policy, VLASHPolicy):
        pipelines.append(policy.processors.before)
    return [step for line in pipelines for step in line.steps if isinstance(step, RelativeActionsProcessorStep)]


# LeRobot's own function knows no engines but its own.
let_configurations_create()
