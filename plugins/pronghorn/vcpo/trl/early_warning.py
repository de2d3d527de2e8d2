"""Acts while effective samples are few, before the collapse that follows."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pronghorn.vcpo.trl.scaling import ESSScaling

_log = logging.getLogger(__name__)
WARN, LOWER, PAUSE, ROLLBACK = "warn", "lower", "pause", "rollback"


class EarlyWarning(TrainerCallback):
    """Warns of an effective sample size that stays low, and lowers the learning rate, pauses or rolls back.

        trainer.add_callback(EarlyWarning(trainer.scaling, action="rollback"))

    Args:
        scaling: the trainer's, or a `VCPOCallback`.
        threshold: the share of effective samples, of that without lag, below which an update counts.
        patience: updates in a row before it acts.
        action: "warn"; "lower" multiplies the learning rate, from there on, with `factor`; "pause" saves a checkpoint
            and ends training; "rollback" takes weights and optimizer back to the last update that was kept.
        factor: see above.
        keep_every: updates between those that are kept for "rollback", in host memory; only sound ones are kept.

    Attributes:
        acted: the updates at which it did.

    Raises:
        ValueError: a value is not accepted.
    """

    def __init__(
        self,
        scaling: ESSScaling,
        *,
        threshold: float = 0.3,
        patience: int = 3,
        action: str = WARN,
        factor: float = 0.5,
        keep_every: int = 10,
    ) -> None:
        if action not in (WARN, LOWER, PAUSE, ROLLBACK):
            raise ValueError(f"action: got {action!r}, accepted are {WARN}, {LOWER}, {PAUSE}, {ROLLBACK}")
        for name, value in (("threshold", threshold), ("factor", factor)):
            if not 0 < value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted a number between 0 and 1")
        for name, count in (("patience", patience), ("keep_every", keep_every)):
            if type(count) is not int or count < 1:
                raise ValueError(f"{name}: got {count!r}, wanted a whole number of at least 1")
        self.acted: list[int] = []
        self._scaling, self._threshold, self._patience = scaling, threshold, patience
        self._action, self._factor, self._keep_every = action, factor, keep_every
        self._low = 0
        self._kept: tuple[int, list[Tensor], dict[str, Any]] = (0, [], {})  # filled before the first update

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Keep the start."""
        if self._action == ROLLBACK:
            self._keep(model, optimizer, state.global_step)

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the update that was made."""
        share = self._scaling.ratio_to_reference
        self._low = self._low + 1 if share < self._threshold else 0
        if self._low < self._patience:
            if self._action == ROLLBACK and not self._low and state.global_step % self._keep_every == 0:
                self._keep(model, optimizer, state.global_step)
            return
        self._low = 0
        self.acted.append(state.global_step)
        _log.warning(
            "update %d: effective samples are %.0f %% of those without lag for %d updates in a row; action: %s",
            state.global_step, 100 * share, self._patience, self._action,
        )  # fmt: skip
        if self._action == PAUSE:
            control.should_save = control.should_training_stop = True
        elif self._action == LOWER:
            for group in optimizer.param_groups:
                group["lr"] *= self._factor
                group["initial_lr"] *= self._factor
            lr_scheduler.base_lrs = [rate * self._factor for rate in lr_scheduler.base_lrs]
            lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged for the next
        elif self._action == ROLLBACK:
            self._restore(model, optimizer)

    def _keep(self, model: Any, optimizer: Any, step: int) -> None:
        weights = [parameter.detach().to("cpu", copy=True) for parameter in model.parameters()]
        self._kept = (step, weights, copy.deepcopy(optimizer.state_dict()))

    def _restore(self, model: Any, optimizer: Any) -> None:
        step, weights, state = self._kept
        rates = [group["lr"] for group in optimizer.param_groups]
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)
        optimizer.load_state_dict(copy.deepcopy(state))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        _log.warning("weights and optimizer are those of update %d again", step)
