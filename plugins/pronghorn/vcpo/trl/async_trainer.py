"""Asynchronous GRPO with VCPO's estimator: a sampler elsewhere runs ahead, whole groups are learned from."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.trainer_utils import SaveStrategy
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.async_grpo.async_grpo_trainer import _TrainBeginCallback

from pronghorn.files.json_files import save_json
from pronghorn.trl.async_rollouts import Position
from pronghorn.trl.devices import any_device
from pronghorn.trl.group_stream import GroupSource, RolloutError, StepLoader, StepTotals
from pronghorn.trl.group_worker import GroupWorker
from pronghorn.trl.rollouts import Rollout
from pronghorn.vcpo.trl.async_config import AsyncVCPOConfig
from pronghorn.vcpo.trl.learner import FORMAT, Learner, load_rollout_state, load_state, save_state
from pronghorn.vcpo.trl.quantized import refuse_quantized

WAITING = "waiting_rollouts.safetensors"
STATE = "rollout_state.json"  # TRL's, whose keys it has beside ours


class AsyncVCPOTrainer(AsyncGRPOTrainer):
    """An `AsyncGRPOTrainer` that stays stable when rollouts are many updates old.

    It takes what `AsyncGRPOTrainer` takes; `args` is an `AsyncVCPOConfig`. All rollouts of a prompt are learned from in
    one optimizer step, on one process; where a conversation was cut into several rows, each is a trajectory with the
    conversation's reward. Groups that are too old are dropped whole, and counted. A rollout without a reward teaches
    nothing; its group's other rewards stand in for its own.

    A checkpoint holds the groups that wait, which a resumed run learns from first, and the place in the sequence of
    prompts. With TRL's vLLM worker and the in-process one, no prompt is then trained twice and none is left out: what
    was being made at the checkpoint is made anew. Another worker goes on where it sees fit.

    Raises:
        ValueError: a setting has no meaning here, an optimizer step cannot hold whole groups, or the model is quantized
            and the sampler takes no adapters.
        RolloutError: while training, what makes rollouts has failed. Where checkpoints are saved, the last update
            has one then.

    Source: Stable Asynchrony: Variance-Controlled Off-Policy RL for LLMs (arXiv 2602.17616).
    """

    _tag_names: ClassVar = ["trl", "async-vcpo"]
    _name = "AsyncVCPO"
    args: AsyncVCPOConfig
    rollout_worker: Any
    control: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        named = inspect.signature(AsyncGRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        del named["self"]
        if named.get("args") is None:
            named["args"] = AsyncVCPOConfig(f"{named['model'].split('/')[-1]}-{self._name}")
        config = named["args"]
        if not isinstance(config, AsyncVCPOConfig):
            raise TypeError(f"args: got {type(config).__name__}, wanted an AsyncVCPOConfig")
        with any_device(config.device):
            super().__init__(**named)
        if not self._lora_sync:
            refuse_quantized(self.model, "weight_transfer: got one that sends whole weights to the sampler")
        policy: Any = self.model
        policy.set_attn_implementation(config.attn_implementation)
        self._learner = Learner(self, self.processing_class.pad_token_id)
        self.add_callback(self._learner.scaling)
        self._collected: list[Rollout] = []
        self.rollouts: GroupSource | None = None
        if self.accelerator.is_main_process:
            if named.get("rollout_worker") is None:
                self.rollout_worker = GroupWorker.like(self.rollout_worker)
                self.rollout_queue = self.rollout_worker.rollout_buffer
            self.rollouts = GroupSource(
                self.rollout_worker, num_generations=config.num_generations, groups_per_step=config.groups_per_step,
                max_age=config.max_age, metrics=self._metrics["train"], stale_after_s=config.heartbeat_stale_after_s,
            )  # fmt: skip
        self._rollout_dataset: Any = self.rollouts  # where TRL looks for the seconds of waiting

    def get_train_dataloader(self) -> Any:
        """A `StepLoader`; the main process reads the worker's queue."""
        return StepLoader(
            self.rollouts, lambda: self.state.global_step, self.args.gradient_accumulation_steps,
            self.accelerator.num_processes, self.accelerator.device,
        )  # fmt: skip

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Collect trajectories; learn from them with the last micro-batch of an optimizer step."""
        started = time.perf_counter()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self._collected += [rollout.to(self.accelerator.device) for rollout in inputs["rollouts"]]
        self._step_microbatches += 1
        loss = torch.zeros((), device=self.accelerator.device)
        if self.accelerator.sync_gradients:
            collected, self._collected = self._collected, []
            loss = self._learner.learn(model, collected)
            self._count(inputs["totals"])
        self._current_train_step_time += time.perf_counter() - started
        return loss

    def _count(self, totals: StepTotals) -> None:
        """For TRL's figures of a step."""
        self._trained_groups.update(totals.groups)
        self._step_samples, self._step_trained_tokens = totals.rows, totals.sampled_tokens
        self._step_forward_tokens, self._step_seq_len_weighted = totals.tokens, totals.tokens**2 / totals.rows

    def _log_step_metrics(self) -> None:
        super()._log_step_metrics()
        del self._metrics["train"]["perf/fwd_s"]  # forwards take turns with backwards, and are not timed

    def _sync_weight(self) -> None:
        try:
            super()._sync_weight()
        except Exception as error:
            raise RolloutError(f"the sampler took no weights: {type(error).__name__}: {error}") from error
        if self.rollouts is not None:
            self.rollouts.published(self.model_version, self.state.global_step)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._saved_step = 0
        self._trained_groups.clear()
        self._last_groups_trained = 0
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, _TrainBeginCallback):
                callback._fired = False  # TRL starts its worker for the first training alone
        if self.rollouts is not None:
            self.rollouts.start()
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except RolloutError:
            self._save_last_update(kwargs.get("trial"))
            raise

    def _save_last_update(self, trial: Any) -> None:
        # Every process comes to the same answer: whether the folder is there changes while the first one writes it.
        if self.args.save_strategy == SaveStrategy.NO or self._saved_step == self.state.global_step:
            return
        self._write_checkpoint(self.model_wrapped, trial)  # a queue whose writer died must not be read
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.rollouts is not None:
            self.rollouts.drain()
        self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        self._saved_step = self.state.global_step
        if self.rollouts is not None:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_state(folder, self.args, self._learner.scaling)
            self.rollouts.buffer.save(folder / WAITING)
            position = self.rollouts.buffer.position
            state = {
                "prompt_index": position.first, "beyond": sorted(position.beyond), "trained": self.rollouts.trained,
                "dropped": self.rollouts.dropped, "model_version": self.model_version,
            }  # fmt: skip
            save_json(folder / STATE, state, format=FORMAT)
        super(AsyncGRPOTrainer, self)._save_checkpoint(model, trial)  # TRL's would write a state that knows less

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._saved_step = self.state.global_step
        folder = Path(checkpoint)
        load_state(folder, self.args, self._learner.scaling)
        if self.rollouts is not None:
            state = load_rollout_state(folder / STATE)
            position = Position(state["prompt_index"], set(state["beyond"]))
            self.rollouts.start(position, state["trained"], state["dropped"])
            self.rollouts.buffer.load(folder / WAITING)
            self._groups_before_resume = state["trained"]
            self.model_version = state["model_version"]
            self.rollout_worker.update_model_version(self.model_version)
