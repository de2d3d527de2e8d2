"""The policy type `vlash`: any LeRobot policy that predicts chunks, asked for the state that the robot will have."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from pronghorn.files.sealed import check_seal, seal
from pronghorn.files.tensor_files import read_tensors
from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.config import AUTO, RTC, RTC_FULL, VLASH, VLASHSettings
from pronghorn.vlash.estimators import state_estimator
from pronghorn.vlash.lerobot.checkpoint import ADAPTERS, PROCESSORS, checkpoint_folder
from pronghorn.vlash.lerobot.configuration_vlash import PI0, PI05, VLASHConfig
from pronghorn.vlash.lerobot.delay_coordinate import with_delay, with_room_for_delay
from pronghorn.vlash.lerobot.delayed_batch import PAD, Delays
from pronghorn.vlash.lerobot.guided import for_autograd, guide, guide_through_network
from pronghorn.vlash.lerobot.history import ObservationHistory, latest_state, with_latest_state
from pronghorn.vlash.lerobot.pi import PiComputation
from pronghorn.vlash.lerobot.prompt import leave_state_out
from pronghorn.vlash.lerobot.recorded_states import RecordedStates
from pronghorn.vlash.lerobot.wrapped_policy import build_policy, load_state, tell_of_dataset
from pronghorn.vlash.lerobot.wrapped_processors import Processors, load_processors, make_processors
from pronghorn.vlash.manager import RollForwardManager
from pronghorn.vlash.pi.fusion import unfuse_state_dict

logger = logging.getLogger(__name__)

MEAN = "mean"
DELAY_BEYOND = (
    "inference_overlap_steps x action_quant_ratio is a delay of %d control steps, and the policy is trained for at "
    "most max_delay_steps, %d."
)
SEALED = ("*.safetensors", "config.json", f"{PROCESSORS}/*", f"{ADAPTERS}/*")


class VLASHPolicy(PreTrainedPolicy):
    """Wraps a LeRobot policy and its processors.

    What comes in and goes out is in the robot's units. Inside, the wrapped policy's own processors see the state that
    the robot will have, so that it is normalised, and put into prompts, like any state.

    Args:
        config: of this policy.
        dataset_stats: the data set's statistics, for the wrapped policy's processors.
        dataset_meta: the data set's metadata.
        checkpoint: a folder that this policy was saved in, for its processors and adapters; where None, it starts from
            `config.base_path`, or anew.

    Raises:
        ValueError: the settings do not fit the sizes of state and action, or a checkpoint does not fit.
    """

    config_class = VLASHConfig
    name = "vlash"

    def __init__(
        self,
        config: VLASHConfig,
        dataset_stats: dict[str, Any] | None = None,
        dataset_meta: Any = None,
        checkpoint: Path | None = None,
    ) -> None:
        super().__init__(config)
        config.validate_features()
        self.config = config
        self._checkpoint, self._has_adapters = checkpoint, False
        _check_estimator(config, dataset_meta is not None)
        self._told_of_delay = _told_of_delay(config)
        if dataset_meta is not None:
            _tell_of_training(config, dataset_meta.fps)
        self._build(dataset_stats, dataset_meta, checkpoint)
        recorded = None
        if config.use_state_ground_truth and dataset_meta is not None:
            recorded = RecordedStates(dataset_meta)
        self._history_steps = config.n_obs_steps if config.base == "diffusion" else 0
        self._history = ObservationHistory(self._history_steps)
        self._delays = Delays(config, recorded)
        self.reset()
        if checkpoint is None:
            self._prepare()

    def _build(self, stats: dict[str, Any] | None, meta: Any, checkpoint: Path | None) -> None:
        """The wrapped policy, `self.base`, and its processors."""
        config = self.config
        wrapped = config.wrapped()
        if meta is not None:
            tell_of_dataset(wrapped, meta)
        is_pi = config.base in (PI0, PI05)
        source: str | Path | None = config.base_path if checkpoint is None else checkpoint / PROCESSORS
        self.processors: Processors = (
            make_processors(wrapped, stats, config.tokenizer)
            if source is None
            else load_processors(source, wrapped, stats, config.tokenizer)
        )
        if config.delay_conditioning and not is_pi:
            wrapped = with_room_for_delay(wrapped)
        self.base = build_policy(wrapped, stats, meta, config.base_path if checkpoint is None else None)
        self._pi: PiComputation | None = None
        if is_pi:
            self._pi = PiComputation(self.base, config)
        if config.state_cond:
            leave_state_out(self.processors.before)
        if config.async_mode == RTC_FULL:
            guide_through_network(self.base)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> VLASHPolicy:
        """Load what `save_pretrained` wrote.

        Args:
            pretrained_name_or_path: a folder, or a repository of the Hub.
            config: in place of the one that was saved.
            revision: of the repository.
            kwargs: as in LeRobot's; weights are loaded strictly, whatever `strict` says.

        Raises:
            ValueError: it holds another policy, or its weights do not fit.
        """
        folder = checkpoint_folder(pretrained_name_or_path, revision)
        check_seal(folder)
        policy = super().from_pretrained(
            pretrained_name_or_path, config=config, revision=revision, checkpoint=folder, **kwargs
        )
        policy._prepare()
        return policy

    @classmethod
    def _load_as_safetensor(cls, model: VLASHPolicy, model_file: str, map_location: str, strict: bool) -> VLASHPolicy:
        # Layers that a checkpoint was not trained with, but that are now asked for, begin without effect.
        added = set() if model._pi is None else {f"base.{name}" for name in model._pi.added}
        load_state(model, read_tensors(model_file), model_file, optional=added)
        return model

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        errors = None
        if self._has_adapters:
            from pronghorn.vlash.lerobot import lora

            state_dict, errors = lora.merged(self.base, state_dict or self.state_dict(), "base.")
            lora.save_adapters(self.base, save_directory / ADAPTERS)
        elif self.config.fuse_projections:
            state_dict = unfuse_state_dict(state_dict or self.state_dict())
        super()._save_pretrained(save_directory, state_dict)
        self.processors.save(save_directory / PROCESSORS)
        seal(save_directory, SEALED)
        if errors is not None:
            from pronghorn.vlash.lerobot.report import write_merge_report

            source = self.config.base_path or self._checkpoint
            write_merge_report(save_directory, self.base.peft_config[lora.ADAPTER], self.config, str(source), errors)

    def _prepare(self) -> None:
        if self._pi is not None:
            self._pi.prepare()

    def wrap_with_peft(self, peft_config: Any = None, peft_cli_overrides: dict[str, Any] | None = None) -> VLASHPolicy:
        """Freeze the wrapped policy, save adapters; what LeRobot calls for its `--peft` options.

        Checkpoints hold the weights with the adapters merged, so that they are loaded like any other, and beside them
        the adapters, with which training goes on.

        Args:
            peft_config: PEFT's LoraConfig, in place of `peft_cli_overrides`.
            peft_cli_overrides: LeRobot's options; what is None is VLASH's default.

        Returns:
            This policy, changed in place.

        Raises:
            ValueError: there is no checkpoint to start from, or an option has no meaning.
            ImportError: `lora_quantization` needs bitsandbytes.
        """
        from pronghorn.vlash.lerobot import lora

        if self._checkpoint is None and self.config.base_path is None:
            raise ValueError("peft: adapters need trained weights; name some as --policy.base_path or --policy.path")
        for name in ("fuse_projections", "cuda_graphs", "vision_dtype"):
            if value := getattr(self.config, name):
                raise ValueError(f"{name}: got {value!r}, which is for inference and cannot be trained by --peft")
        config, trained = lora.adapters(self.base, peft_cli_overrides or {})
        saved = None if self._checkpoint is None else self._checkpoint / ADAPTERS
        lora.adapt(
            self.base, peft_config or config, trained, self.config.lora_quantization,
            saved if saved is not None and saved.is_dir() else None,
        )  # fmt: skip
        self._has_adapters = True
        return self

    def get_optim_params(self) -> Any:
        """Those that the wrapped policy names, which has the layers of `state_cond` and `delay_conditioning` too."""
        return self.base.get_optim_params()

    def reset(self) -> None:
        """A new episode, with the settings that `config` has now."""
        self.base.reset()
        self._history.reset()
        self.manager = RollForwardManager(self.config.settings(), self.predict)

    def forward(self, batch: dict[str, Any], reduction: str = MEAN) -> tuple[Tensor, dict[str, Any] | None]:
        """The loss of a batch from a data set, whose samples get a delay each, or all delays (`shared_observation`).

        Args:
            batch: in the robot's units.
            reduction: "mean", or "none" for one of each sample, where the wrapped policy has that.

        Returns:
            The loss, and what is reported beside it.

        Raises:
            ValueError: the wrapped policy has no other reduction, the policy was made without the data set whose states
                it is to take, the estimator does not fit state and actions, or there is nothing to quantize for.
        """
        if self.config.lora_quantization is not None and not self._has_adapters:
            raise ValueError("lora_quantization: got one, but no adapters; train with --peft.method_type=LORA")
        if self.config.use_state_ground_truth and not self._delays.knows_states:
            raise ValueError("use_state_ground_truth: got True for a policy that was made without dataset_meta")
        if self._pi is not None:
            return self._pi_loss(self._pi, batch, reduction)
        delayed = self._delays.draw(batch)
        prepared = self._told(self.processors.before(delayed.batch), delayed.delay)
        if reduction == MEAN:
            return self.base.forward(prepared)
        if "reduction" not in inspect.signature(self.base.forward).parameters:
            raise ValueError(f"reduction: got {reduction!r}, but {self.config.base} only has {MEAN!r}")
        return self.base.forward(prepared, reduction=reduction)

    def _pi_loss(self, pi: PiComputation, batch: dict[str, Any], reduction: str) -> tuple[Tensor, dict[str, Any]]:
        if self.config.shared_observation:
            samples = self._delays.all(batch)
            rows = {ACTION: samples.actions, PAD: samples.is_pad, OBS_STATE: samples.states}
            batch = {**batch, **{name: value.flatten(0, 1) for name, value in rows.items()}}
            delay = torch.arange(samples.states.shape[1], device=samples.states.device).expand(samples.states.shape[:2])
        else:
            batch, delay = self._delays.draw(batch)
            delay = delay[:, None]
        loss = pi.loss(self.processors.before(batch), delay, reduction)
        return loss, {"loss": loss.mean().item()}

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any]) -> Tensor:
        """The next command, for all robots of the batch in step.

        One call is one command. With `action_quant_ratio` of q that is q actions merged into one, so that a delay of d
        commands is one of q d actions. While a chunk runs the next one is computed when it would be asked for, and used
        when it would be there: a simulator sees the delay without having to wait.

        Args:
            batch: the observation, in the robot's units.

        Returns:
            [batch, action_dim], in the robot's units.

        Raises:
            ValueError: a camera, or the state, is missing.
            VLASHError: no chunk that can be executed came.
        """
        self.eval()
        observation = self.observe(batch)
        while True:
            tick = self.manager.tick(lambda: observation)
            if tick.send:
                return tick.action

    def observe(self, batch: dict[str, Any]) -> Observation:
        """Take note of an observation; to be called in every control period, in order, since some policies see several.

        Args:
            batch: the observation, in the robot's units.

        Returns:
            What `predict` takes.

        Raises:
            ValueError: a camera, or the state, is missing.
        """
        self._check_observation(batch)
        self._history.add(batch)
        return _observation(self._history)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any]) -> Tensor:
        """A whole chunk for the state in the batch.

        Args:
            batch: the observation, in the robot's units.

        Returns:
            [batch, chunk_size, action_dim], in the robot's units.
        """
        self._check_observation(batch)
        history = ObservationHistory(self._history_steps)
        history.add(batch)
        observation = _observation(history)
        return self.predict(ChunkRequest(observation, observation.state))

    @torch.no_grad()
    def predict(self, request: ChunkRequest) -> Tensor:
        """The chunk that a request asks for; what a manager or a runner calls.

        Args:
            request: its observation's content is a batch, with a history where the wrapped policy takes one.

        Returns:
            [batch, chunk_size, action_dim], in the robot's units.
        """
        batch = with_latest_state(request.observation.content, request.state)
        delay = request.delay if self.config.async_mode == VLASH else 0
        if delay > self.config.max_delay_steps and not self._told_of_delay:
            self._told_of_delay = True
            logger.warning(DELAY_BEYOND, delay, self.config.max_delay_steps)
        if self.config.async_mode not in (RTC, RTC_FULL) or request.leftover is None:
            return self.processors.after(self._chunk(self.processors.before(batch), delay))
        # Guidance takes gradients, which simulators run without.
        with torch.inference_mode(False), torch.no_grad():
            prepared = self.processors.before(for_autograd({**batch, ACTION: request.leftover}))
            return self.processors.after(self._chunk(prepared, delay, prepared.pop(ACTION), request.delay))

    def _chunk(self, prepared: dict[str, Any], delay: int, leftover: Tensor | None = None, executed: int = 0) -> Tensor:
        """In the wrapped policy's units; `delay` is what it is told, `executed` how much of `leftover` will be."""
        if self._pi is None or not self._pi.samples:
            told = self._told(prepared, torch.full((len(prepared[OBS_STATE]),), delay))
            if leftover is None:
                return self.base.predict_action_chunk(told)
            return self.base.predict_action_chunk(told, inference_delay=executed, prev_chunk_left_over=leftover)
        if leftover is None:
            return self._pi.sample(prepared, delay)
        full = self.config.async_mode == RTC_FULL
        return self._pi.sample(
            prepared, delay, guide(leftover, executed, self.base.config.rtc_config, full_jacobian=full)
        )

    def _told(self, prepared: dict[str, Any], delay: Tensor) -> dict[str, Any]:
        if not self.config.delay_conditioning:
            return prepared
        return with_delay(prepared, delay, self.config.max_delay_steps)

    def _check_observation(self, batch: dict[str, Any]) -> None:
        missing = [name for name in (OBS_STATE, *self.config.image_features) if name not in batch]
        if missing:
            given = sorted(name for name in batch if name.startswith("observation"))
            raise ValueError(
                f"batch: got {', '.join(given) or 'no observation'}, but the policy was made with "
                f"{', '.join(missing)} too"
            )


def _observation(history: ObservationHistory) -> Observation:
    seen = history.batch()
    return Observation(seen, latest_state(seen))


def _check_estimator(config: VLASHConfig, trained: bool) -> None:
    """Raise ValueError where the estimator cannot work, before anything is trained or moved."""
    moves = config.async_mode == VLASH and config.inference_overlap_steps != 0
    if moves or (trained and config.max_delay_steps and not config.use_state_ground_truth):
        state, action = torch.zeros(config.robot_state_feature.shape), torch.zeros(config.action_feature.shape)
        state_estimator(config.settings())(state, action.expand(config.action_quant_ratio, -1))


def _told_of_delay(config: VLASHConfig) -> bool:
    """Whether it had to be told that the delay, known beforehand, is beyond training."""
    overlap = config.inference_overlap_steps
    if config.async_mode != VLASH or overlap == AUTO:
        return False
    delay = min(int(overlap) * config.action_quant_ratio, config.n_action_steps)
    if delay > config.max_delay_steps:
        logger.warning(DELAY_BEYOND, delay, config.max_delay_steps)
    return delay > config.max_delay_steps


def _tell_of_training(config: VLASHConfig, fps: float) -> None:
    """What training on a data set of so many frames a second does that nobody may have asked for."""
    if config.fps != fps:
        if config.fps == VLASHSettings.fps:
            config.fps = fps
        else:
            logger.warning("fps is %g, and the data set has %g frames a second.", config.fps, fps)
    if config.async_mode != VLASH and config.max_delay_steps:
        logger.warning(
            "async_mode=%r is trained with delays of up to max_delay_steps, %d, though it is asked for the state that "
            "was measured; max_delay_steps=0 trains without.", config.async_mode, config.max_delay_steps,
        )  # fmt: skip
