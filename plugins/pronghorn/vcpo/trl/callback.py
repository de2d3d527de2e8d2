"""VCPO's learning rate for any GRPO or RLOO trainer of TRL, with the trainer's own loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pronghorn.vcpo.config import AUTO, OFF, VCPOSettings
from pronghorn.vcpo.ranks import Alone, ProcessGroup
from pronghorn.vcpo.ratios import sequence_log_ratios, token_log_ratios
from pronghorn.vcpo.trl.scaling import ESSScaling


class VCPOCallback(ESSScaling):
    """Scales each update's learning rate by the effective sample size of its minibatch.

        trainer = GRPOTrainer(...)
        trainer.add_callback(VCPOCallback(trainer, ess_scaling="sqrt"))

    Ratios are to the sampler's log-probabilities where the trainer keeps them, as `GRPOTrainer` does with vLLM or a
    `rollout_func`; else to those that it computes itself right after a generation, as `RLOOTrainer` always does. It
    logs `vcpo/ess_ratio`, `vcpo/learning_rate_scale` and others.

    Args:
        trainer: a `GRPOTrainer` or a `RLOOTrainer`.
        settings: of `VCPOSettings`, those of the effective sample size and `is_truncation`; `ess_reference` is a
            number, for how old rollouts are is not known here.

    Raises:
        TypeError: the trainer is not one of those.
        ValueError: a setting is not accepted, the trainer scales its rate already, or while training, a batch has no
            log-probabilities of the sampler.
    """

    def __init__(self, trainer: Any, **settings: Any) -> None:
        if not hasattr(trainer, "_get_per_token_logps_and_entropies") or not hasattr(trainer, "_compute_loss"):
            raise TypeError(f"trainer: got {type(trainer).__name__}, accepted are GRPOTrainer and RLOOTrainer")
        if _scales_already(trainer):
            raise ValueError(
                f"trainer: this {type(trainer).__name__} scales its learning rate by effective samples already, and "
                "twice would be too much; wanted one VCPOCallback, or a VCPOTrainer alone"
            )
        accelerator = trainer.accelerator
        ranks = Alone() if accelerator.num_processes == 1 else ProcessGroup(accelerator.device)
        if settings.get("ess_reference") == AUTO:
            raise ValueError("ess_reference: got 'auto', which must know how old rollouts are; wanted a number")
        super().__init__(VCPOSettings(**{"opob": OFF, **settings}), ranks, trainer._metrics["train"])
        self._trainer = trainer
        self._seen: list[Tensor] = []
        self._log_probs: Tensor | None = None
        self._compute_loss, self._get_log_probs = trainer._compute_loss, trainer._get_per_token_logps_and_entropies
        # What the loss is computed from is told to nobody else.
        trainer._compute_loss, trainer._get_per_token_logps_and_entropies = self._watched_loss, self._watched_log_probs

    def _watched_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        found = self._get_log_probs(*args, **kwargs)
        if torch.is_grad_enabled():
            self._log_probs = found[0].detach()
        return found

    def _watched_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._log_probs = None
        loss: Tensor = self._compute_loss(model, inputs)
        if self._trainer.model.training and self._log_probs is not None:
            self._seen.append(self._log_ratios(self._log_probs, inputs).cpu())
        return loss

    def _log_ratios(self, log_probs: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Of this batch's sequences, [trajectories]."""
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        if "old_logps" in inputs:
            return (log_probs * mask).sum(1).double() - inputs["old_logps"].double()
        sampler = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        if sampler is None:
            trainer = self._trainer
            if trainer.use_vllm or trainer.rollout_func is not None:
                raise ValueError(
                    "sampling_per_token_logps: the batch has none, and the learner's own are no substitute; wanted "
                    "those of vLLM or of the rollout_func"
                )
            sampler = log_probs  # the learner sampled them, and is what it was
        return sequence_log_ratios(token_log_ratios(log_probs, sampler, mask))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Take in the micro-batches of this update, then lower the rate."""
        seen, self._seen = self._seen, []
        self.observe(torch.cat(seen), staleness=1)
        super().on_pre_optimizer_step(args, state, control, optimizer=optimizer, **kwargs)


def _scales_already(trainer: Any) -> bool:
    """Whether it has this method's scaling, as a callback or of its own."""
    known = any(isinstance(callback, ESSScaling) for callback in trainer.callback_handler.callbacks)
    return known or isinstance(getattr(trainer._compute_loss, "__self__", None), VCPOCallback)
