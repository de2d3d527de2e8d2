"""LeRobot's configuration of the policy type `vlash`: the settings of VLASH, and the policy that they drive."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

import draccus
import lerobot.policies  # noqa: F401 - registers the configurations of LeRobot's own policies
from draccus.utils import DraccusException
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import LRSchedulerConfig, OptimizerConfig
from lerobot.utils.constants import ACTION, OBS_STATE

from pronghorn.vlash.config import RTC, RTC_FULL, VLASHSettings
from pronghorn.vlash.lerobot.authors_checkpoint import base_configuration
from pronghorn.vlash.lerobot.chunk_length import predicted_actions, with_chunk_size

logger = logging.getLogger(__name__)

TYPE = draccus.CHOICE_TYPE_KEY
QUANTIZATIONS = ("nf4", "fp4")
PI0, PI05 = "pi0", "pi05"
ONLY_FOR = {
    "shared_observation": (PI0, PI05), "state_cond": (PI05,), "fuse_projections": (PI0, PI05),
    "cuda_graphs": (PI0, PI05), "vision_dtype": (PI0, PI05),
}  # fmt: skip
# What the wrapped policy has from its wrapper, which alone is asked for it.
SHARED = {item.name for item in fields(PreTrainedConfig)} - {"n_obs_steps"} | {"n_action_steps"}


@PreTrainedConfig.register_subclass("vlash")
@dataclass
class VLASHConfig(PreTrainedConfig, VLASHSettings):
    """How a LeRobot policy is trained for delays and run without being waited for.

    All settings of `VLASHSettings` are here too, each an option like `--policy.inference_overlap_steps=4`.

    Attributes:
        base: the policy type that predicts the actions: "act", "diffusion", "smolvla", "pi0", "pi05", or another whose
            configuration has a `chunk_size` and that looks at one observation.
        base_config: options of that policy, as JSON: `--policy.base_config='{"num_inference_steps": 5}'`; others are as
            in `base_path`, or that policy's defaults. Once read, it is complete.
        base_path: a folder, or repository of the Hub, with a checkpoint of that policy to start from, by
            LeRobot or by VLASH's authors.
        tokenizer: a folder or repository of the tokenizer that is used in place of the policy's own.
        lora_quantization: how `--peft` stores the weights that it freezes: "nf4" or "fp4", in 4 bits by bitsandbytes;
            None as they are.
        chunk_size: actions that the policy predicts; by default as many as it does.
        n_action_steps: of these, executed; by default 32, or all of a shorter chunk.
        fuse_projections: pi0 and pi0.5: join queries, keys and values, gate and up, and what all adaptive norms make of
            the time, to one product each, once the weights are loaded. For inference.
        cuda_graphs: pi0 and pi0.5: on a GPU, record how a chunk is computed, for each of the last shapes of what is
            seen, and replay it. For inference; what real-time chunking guides is computed without.
        vision_dtype: pi0 and pi0.5: "bfloat16" rounds the vision tower's weights, once they are loaded, and computes it
            so; a checkpoint that is saved has them so. For inference. None leaves it as LeRobot has it: in float32,
            slow without `torch.set_float32_matmul_precision("high")`, which lerobot-eval sets.
        state_cond: as in `VLASHSettings`; `shared_observation` of a pi05 sets it, with a warning.
        loss_padding: pi0 and pi0.5: count in the loss what pads an action to `max_action_dim`, and steps after the
            episode's end as no error, as the authors do; False leaves both out.

    Raises:
        ValueError, TypeError: an option is unknown, or has no meaning beside another.
    """

    base: str = "pi05"
    base_config: dict[str, Any] = field(default_factory=dict)
    base_path: str | None = None
    tokenizer: str | None = None
    lora_quantization: str | None = None
    chunk_size: int = None  # type: ignore[assignment]
    n_action_steps: int = None  # type: ignore[assignment]
    fuse_projections: bool = False
    cuda_graphs: bool = False
    vision_dtype: str | None = None
    loss_padding: bool = True

    def __post_init__(self) -> None:
        PreTrainedConfig.__post_init__(self)
        if self.lora_quantization not in (None, *QUANTIZATIONS):
            raise ValueError(
                f"lora_quantization: got {self.lora_quantization!r}, accepted are {', '.join(QUANTIZATIONS)}, or None"
            )
        if self.vision_dtype not in (None, "bfloat16"):
            raise ValueError(f"vision_dtype: got {self.vision_dtype!r}, accepted are 'bfloat16' and None")
        self._check_base()
        if TYPE not in self.base_config:
            self.base_config = self._completed(self.base_config)
        elif self.base_config[TYPE] != self.base:
            raise ValueError(f"base: got {self.base!r}, but the options are those of {self.base_config[TYPE]!r}")
        predicted = predicted_actions(self._decoded())
        if self.chunk_size is None:
            self.chunk_size = predicted
        if self.n_action_steps is None:
            self.n_action_steps = min(VLASHSettings.n_action_steps, self.chunk_size)
        VLASHSettings.__post_init__(self)
        self.n_obs_steps = self.wrapped().n_obs_steps

    def settings(self) -> VLASHSettings:
        """The settings of VLASH alone."""
        return VLASHSettings(**{item.name: getattr(self, item.name) for item in fields(VLASHSettings)})

    def wrapped(self) -> Any:
        """A new configuration of the wrapped policy.

        Raises:
            ValueError: it cannot predict `chunk_size` actions, or cannot be led as `async_mode` says.
        """
        config = with_chunk_size(self._decoded(), self.chunk_size)
        for name in ("input_features", "output_features"):
            setattr(config, name, deepcopy(getattr(self, name)))
        if self.async_mode in (RTC, RTC_FULL):
            if not hasattr(config, "rtc_config"):
                raise ValueError(
                    f"async_mode: got {self.async_mode!r} with {self.base!r}, which LeRobot cannot guide by real-time "
                    "chunking; pi0, pi05 and smolvla can be"
                )
            from lerobot.policies.rtc.configuration_rtc import RTCConfig

            config.rtc_config = config.rtc_config or RTCConfig(execution_horizon=self.chunk_size)
        return config

    @property
    def normalization_mapping(self) -> dict[str, NormalizationMode]:
        """Nothing is normalised outside: the wrapped policy's own processors do it, on what it is really given."""
        return dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)

    @property
    def dtype(self) -> str:
        """The wrapped policy's, from which LeRobot chooses autocast; AttributeError where it has none."""
        return self._decoded().dtype

    @property
    def action_feature_names(self) -> list[str] | None:
        """The names of an action's coordinates that the wrapped policy was trained with, where it keeps them."""
        return self.base_config.get("action_feature_names")

    @action_feature_names.setter
    def action_feature_names(self, names: list[str] | None) -> None:
        if "action_feature_names" in self.base_config:
            self.base_config["action_feature_names"] = names

    @property
    def drop_n_last_frames(self) -> int:
        """Frames at an episode's end at which no sample begins, which the wrapped policy chooses."""
        return getattr(self._decoded(), "drop_n_last_frames", 0)

    @property
    def observation_delta_indices(self) -> list[int] | None:
        """Those of the wrapped policy."""
        return self.wrapped().observation_delta_indices

    @property
    def action_delta_indices(self) -> list[int]:
        """Those of the wrapped policy, and `max_delay_steps` more."""
        indices = list(self.wrapped().action_delta_indices)
        return [*indices, *range(indices[-1] + 1, indices[-1] + 1 + self.max_delay_steps)]

    @property
    def reward_delta_indices(self) -> list[int] | None:
        """Those of the wrapped policy."""
        return self.wrapped().reward_delta_indices

    def get_optimizer_preset(self) -> OptimizerConfig:
        """That of the wrapped policy."""
        return self.wrapped().get_optimizer_preset()

    def get_scheduler_preset(self) -> LRSchedulerConfig | None:
        """That of the wrapped policy."""
        return self.wrapped().get_scheduler_preset()

    def validate_features(self) -> None:
        """Raise ValueError unless there are a state and an action."""
        if self.robot_state_feature is None:
            raise ValueError(f"input_features: got {sorted(self.input_features or {})}, wanted {OBS_STATE} among them")
        if self.action_feature is None:
            raise ValueError(f"output_features: got {sorted(self.output_features or {})}, wanted {ACTION} among them")

    def _check_base(self) -> None:
        known = sorted(set(PreTrainedConfig.get_known_choices()) - {"vlash"})
        if self.base not in known:
            raise ValueError(f"base: got {self.base!r}, accepted are {', '.join(known)}")
        for name, bases in ONLY_FOR.items():
            if getattr(self, name) and self.base not in bases:
                value = getattr(self, name)
                raise ValueError(f"{name}: got {value!r} with base={self.base!r}, which takes {' or '.join(bases)}")
        if self.shared_observation and self.base == PI05 and not self.state_cond:
            logger.warning(
                "shared_observation: all delays share one prompt, so pi05 is given the state through its norms: "
                "state_cond is set to True."
            )
            self.state_cond = True

    def _completed(self, options: dict[str, Any]) -> dict[str, Any]:
        """All options of the wrapped policy: these, then those of `base_path`, then its defaults."""
        if self.base_path is None:
            start = PreTrainedConfig.get_choice_class(self.base)(device=self.device)
        else:
            start, state_cond = base_configuration(self.base_path)
            if state_cond and not self.state_cond:
                logger.warning("%s was trained with a projected state: state_cond is set to True.", self.base_path)
                self.state_cond = True
        if start.type != self.base:
            raise ValueError(f"base: got {self.base!r}, but {self.base_path} holds a policy of type {start.type!r}")
        complete = {
            name: value for name, value in draccus.encode(start, PreTrainedConfig).items() if name not in SHARED
        }
        unknown = set(options) - set(complete)
        if unknown:
            accepted = sorted(set(complete) - {TYPE})
            raise ValueError(f"base_config: got {', '.join(sorted(unknown))}, accepted are {', '.join(accepted)}")
        return _merged(complete, options)

    def _decoded(self) -> Any:
        values = {name: value for name, value in self.base_config.items() if name != TYPE}
        values.update(device=self.device, use_amp=self.use_amp)
        if "chunk_size" in values:
            values["n_action_steps"] = values["chunk_size"]
        try:
            return draccus.decode(PreTrainedConfig.get_choice_class(self.base), values)
        except (DraccusException, NotImplementedError) as error:
            raise ValueError(f"base_config: {error} {error.__cause__ or ''}") from error


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
