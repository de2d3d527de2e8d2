"""GRPO with VCPO's estimator: each optimizer step sees all of its trajectories, whole groups at a time."""

from __future__ import annotations

import inspect
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from pronghorn.trl.grouped_rollouts import GroupedRollouts
from pronghorn.trl.lagged_sampler import LaggedSampler
from pronghorn.trl.rollouts import Rollout, rollouts_of
from pronghorn.vcpo.config import VCPOSettings
from pronghorn.vcpo.trl.callback import VCPOCallback
from pronghorn.vcpo.trl.config import TRL, VCPOConfig
from pronghorn.vcpo.trl.learner import Learner, load_state, save_state
from pronghorn.vcpo.trl.quantized import refuse_quantized
from pronghorn.vcpo.trl.scaling import ESSScaling


class VCPOTrainer(GroupedRollouts):
    """A `GRPOTrainer` that stays stable when rollouts are many updates old.

    It takes what `GRPOTrainer` takes; `args` is a `VCPOConfig`. Rollouts come from transformers, from vLLM in either
    mode, or from a `rollout_func` that returns log-probabilities, and maybe `policy_version`, a list.

    A completion that no reward function scores teaches nothing; its group's other rewards stand in for its own. One
    that `mask_truncated_completions` masks, or that is empty, has the ratio 1 and no gradient.

    Raises:
        ValueError: a setting has no meaning here, a `rollout_func` gave no log-probabilities, an optimizer step cannot
            hold whole groups, or a quantized model is to be sampled by vLLM.

    Source: Stable Asynchrony: Variance-Controlled Off-Policy RL for LLMs (arXiv 2602.17616).
    """

    _tag_names: ClassVar = ["trl", "vcpo"]
    _name = "VCPO"
    args: VCPOConfig
    _current_train_step_time: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        named = inspect.signature(GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        del named["self"]
        if named.get("args") is None:
            named["args"] = VCPOConfig(f"{_name_of(named['model'])}-VCPO")
        config = named["args"]
        if not isinstance(config, VCPOConfig):
            raise TypeError(f"args: got {type(config).__name__}, wanted a VCPOConfig")
        if config.use_vllm:
            refuse_quantized(named["model"], "use_vllm: got True, by which TRL hands whole weights to vLLM")
        self.lagged_sampler: LaggedSampler | None = None
        if config.lag:
            if named.get("rollout_func") is not None:
                raise ValueError("lag: got one beside a rollout_func, which samples itself; wanted one of both")
            self.lagged_sampler = named["rollout_func"] = LaggedSampler(config.lag)
        super().__init__(**named)
        if self.lagged_sampler is not None:
            self.add_callback(self.lagged_sampler)
        self._collected: list[Rollout] = []
        self._learner: Learner | None = None
        if config.estimator == TRL:
            settings = {entry.name: getattr(config, entry.name) for entry in fields(VCPOSettings)}
            self.scaling: ESSScaling = VCPOCallback(self, **settings)
        else:
            self._learner = Learner(self, self._tokenizer.pad_token_id)
            self.scaling = self._learner.scaling
        self.add_callback(self.scaling)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """Collect trajectories; learn from them with the last micro-batch of an optimizer step."""
        if self._learner is None:
            return super().training_step(model, inputs, num_items_in_batch)
        started = time.perf_counter()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self._collected += rollouts_of(self._prepare_inputs(inputs))
        self._step += 1
        loss = torch.zeros((), device=self.accelerator.device)
        if self.accelerator.sync_gradients:
            collected, self._collected = self._collected, []
            loss = self._learner.learn(model, collected)
        self._current_train_step_time += time.perf_counter() - started
        if self.accelerator.sync_gradients:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's own loss, with ratios to the sampler."""
        sampler = inputs.get("sampling_per_token_logps")
        if self._learner is None and sampler is not None:
            if sampler.isnan().any():
                raise ValueError("sampling_per_token_logps: got NaN, which estimator='trl' has no rule for")
            inputs = {**inputs, "old_per_token_logps": sampler}
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            save_state(folder, self.args, self.scaling, generations=self._generations)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._generations = load_state(Path(checkpoint), self.args, self.scaling, generations=int)["generations"]
        if self.lagged_sampler is not None:
            self.lagged_sampler.load(checkpoint, self.accelerator.unwrap_model(self.model))


def _name_of(model: Any) -> str:
    name = model if isinstance(model, str) else model.config._name_or_path
    return str(name).split("/")[-1]
