"""A delay sweep of one's own policy: any checkpoint of LeRobot's, in any environment of LeRobot's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import draccus
from draccus.utils import DraccusException
from lerobot.configs import PreTrainedConfig
from lerobot.envs import EnvConfig
from lerobot.policies import PreTrainedPolicy, get_policy_class, make_pre_post_processors
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.utils.import_utils import register_third_party_plugins
from safetensors import SafetensorError
from torch import Tensor

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.config import NAIVE, RTC, RTC_FULL, SYNC, VLASH, VLASHSettings
from pronghorn.vlash.lerobot.chunk_length import predicted_actions, with_chunk_size
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.environment import LeRobotEnvironment
from pronghorn.vlash.lerobot.policy_chunks import PolicyChunks, Seen
from pronghorn.vlash.lerobot.runner import check_estimator, settings_for
from pronghorn.vlash.sweep import Method

REAL_TIME = "sync_real_time"
_MODES = {SYNC: SYNC, REAL_TIME: SYNC, NAIVE: NAIVE, RTC: RTC, RTC_FULL: RTC_FULL, VLASH: VLASH}
_SWEPT = ("async_mode", "inference_overlap_steps", "fps")
_SAMPLED = 1024  # entries of each weight that its digest is of


class EnvironmentTask:
    """A policy in an environment as a task for `sweep`; time is simulated, a seed is another episode.

    Its modes are those of `VLASHSettings`, and "sync_real_time": sync in a world that does not wait for it. All have
    the same policy and execute as many actions of a chunk, whatever the delay.

    Args:
        env: type of the environment: pusht, metaworld …
        policy: a folder with a checkpoint, or a repository of the Hub.
        episodes: of a seed, in lock step.
        device: where the policy computes.
        options: of the environment's configuration, such as `task` or `episode_length`.
        settings: of `VLASHSettings`, in place of the policy's own.
        rename_map: the environment's names of what is seen to the policy's; None as the checkpoint has them.

    Raises:
        ValueError: the environment or an option is unknown, the checkpoint is none, or they do not fit each other.
        ImportError: the environment's package is not installed.
    """

    modes = tuple(_MODES)

    def __init__(
        self, env: str, policy: str, *, episodes: int = 1, device: str = "cpu",
        options: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None,
        rename_map: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        register_third_party_plugins()
        self.name, self._path, self._episodes = env, policy, episodes
        self._options, self._given = dict(options or {}), dict(settings or {})
        if taken := sorted(set(_SWEPT) & set(self._given)):
            raise ValueError(f"setting: got {taken[0]}, which the sweep sets itself")
        self._world = _environment(env, self._options)
        self._config = _configuration(policy, device)
        if self._config.type == "diffusion":
            # It would give away no more than it executes, and naive execution leaves out some.
            self._given.setdefault("n_action_steps", self._config.n_action_steps)
            with_chunk_size(self._config, predicted_actions(self._config))
        self._settings(SYNC, 0)
        self._renamed = dict(rename_map or {})
        self._policy, self._before, self._after = _loaded(policy, self._config, self._renamed)
        self._environment = LeRobotEnvironment(self._world, self._config, episodes)
        self._check_fit(self._environment.reset(0))

    def about(self) -> dict[str, Any]:
        """For JSON."""
        about = {
            "policy": self._path, "type": self._config.type, "weights": _digest(self._policy),
            "episodes": self._episodes, "options": self._options, "settings": self._given,
        }  # fmt: skip
        return {**about, "rename_map": self._renamed} if self._renamed else about

    def environment(self) -> LeRobotEnvironment:
        """One for all methods, since some take long to make."""
        return self._environment

    def close(self) -> None:
        """End the simulator."""
        self._environment.close()

    def check(self, modes: Sequence[str], delays: Sequence[int]) -> None:
        """Raise ValueError, before anything is run, where the policy cannot do a mode or bear a delay."""
        for mode in modes:
            for delay in delays:
                self.method(mode, delay, 0, self._environment)

    def method(self, mode: str, delay: int, seed: int, environment: LeRobotEnvironment) -> Method:
        """See `sweep.Task`."""
        if mode not in _MODES:
            raise ValueError(f"modes: got {mode}, accepted for {self.name} are {', '.join(self.modes)}")
        try:
            settings = self._settings(_MODES[mode], delay)
            check_estimator(settings, self._config)
            chunks = PolicyChunks(self._policy, self._before, self._after, settings)
        except ValueError as error:
            raise ValueError(f"modes: {mode} at a delay of {delay}: {error}") from error
        return Method(settings, chunks, world_waits=mode != REAL_TIME)

    def _settings(self, async_mode: str, delay: int) -> VLASHSettings:
        """For a policy that takes `delay` control periods."""
        overlap = 0 if async_mode == SYNC else delay
        settings = settings_for(
            self._config, **{**self._given, "async_mode": async_mode, "inference_overlap_steps": overlap},
            fps=float(self._world.fps),
        )  # fmt: skip
        longest = settings.n_action_steps // settings.action_quant_ratio
        if overlap > longest:
            raise ValueError(f"delays: got {delay}, wanted at most {longest} commands, which a chunk lasts")
        return settings

    def _check_fit(self, seen: Observation) -> None:
        """Raise ValueError where the policy wants to see, or gives, something else than the environment has."""
        content: Seen = seen.content
        frame, where = content.frames[-1], f"policy: got {self._path}"
        names = dict(zip(frame, frame, strict=True))
        for step in self._before.steps:
            if isinstance(step, RenameObservationsProcessorStep):
                names = {step.rename_map.get(name, name): given for name, given in names.items()}
        wanted = self._config.input_features
        missing = [name for name in wanted if name not in names]
        if missing:
            given = ", ".join(sorted(name for name in names if name.startswith("observation")))
            raise ValueError(f"{where}, which looks at {', '.join(missing)}; {self.name} gives {given}")
        sizes = [
            (name, wanted[name].shape[-1], frame[names[name]].shape[-1])
            for name in wanted if len(wanted[name].shape) == 1
        ]  # fmt: skip
        sizes.append(("action", self._config.action_feature.shape[0], self._environment.action_dim))
        for name, size, has in sizes:
            if size != has:
                raise ValueError(f"{where}, whose {name} has {size} coordinates; that of {self.name} has {has}")


def _environment(name: str, options: Mapping[str, Any]) -> EnvConfig:
    known = sorted(EnvConfig.get_known_choices())
    if name not in known:
        raise ValueError(f"env: got {name!r}, accepted are {', '.join(known)}")
    try:
        return draccus.decode(EnvConfig, {**options, "type": name})
    except (DraccusException, ValueError, TypeError) as error:
        raise ValueError(f"env_option: got {dict(options)} for {name}: {error}") from error


def _configuration(path: str, device: str) -> PreTrainedConfig:
    try:
        config = PreTrainedConfig.from_pretrained(path)
        if not isinstance(config, VLASHConfig):
            predicted_actions(config)
    except (OSError, DraccusException, ValueError, TypeError) as error:
        raise ValueError(
            f"policy: got {path!r}, wanted a checkpoint of a LeRobot policy that predicts chunks, a folder or a "
            f"repository of the Hub; {error}"
        ) from error
    if config.action_feature is None or not config.input_features:
        raise ValueError(f"policy: got {path}, whose config.json names no action, or nothing that it looks at")
    config.device = device
    return config


def _loaded(path: str, config: PreTrainedConfig, renamed: dict[str, str]) -> tuple[PreTrainedPolicy, Any, Any]:
    """The policy, and what is run before and after it."""
    overrides: dict[str, Any] = {"device_processor": {"device": config.device}}
    if renamed:
        overrides["rename_observations_processor"] = {"rename_map": renamed}
    try:
        policy = get_policy_class(config.type).from_pretrained(path, config=config).to(config.device).eval()
        return policy, *make_pre_post_processors(config, pretrained_path=path, preprocessor_overrides=overrides)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"policy: got {path}, whose weights or processors cannot be loaded: {error}") from error


def _digest(policy: PreTrainedPolicy) -> str:
    """Of entries all over the weights: it tells one training from another, in no time."""
    found = hashlib.sha256()
    for name, weight in policy.state_dict().items():
        if isinstance(weight, Tensor) and weight.numel():
            entries = weight.detach().flatten()[:: -(-weight.numel() // _SAMPLED)]
            found.update(name.encode() + entries.double().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
