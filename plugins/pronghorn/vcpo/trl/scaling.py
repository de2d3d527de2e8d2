"""The learning rate of each update, by the effective sample size of its minibatch."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from pronghorn.vcpo.config import VCPOSettings
from pronghorn.vcpo.ess import MinibatchESS, ReferenceESS, learning_rate_scale, scaled_learning_rate
from pronghorn.vcpo.ranks import Ranks


class ESSScaling(TrainerCallback):
    """Scales the learning rate in an update, and restores it before the scheduler sees it.

    Args:
        settings: its `ess_…` and `is_truncation`.
        ranks: that have the trajectories.
        metrics: lists of numbers by name, of a trainer of TRL, that are logged and emptied by it.

    Attributes:
        reference: the share of effective samples at which the rate is whole.
        scale: what the last update's learning rate was multiplied with.
        ratio_to_reference: the share of effective samples of the last minibatch over the reference.
    """

    def __init__(self, settings: VCPOSettings, ranks: Ranks, metrics: MutableMapping[str, list[float]]) -> None:
        self.reference = ReferenceESS(settings)
        self.scale = self.ratio_to_reference = 1.0
        self._settings, self._ranks, self._metrics = settings, ranks, metrics
        self._rates = ExitStack()

    def observe(self, log_ratios: Tensor, staleness: int) -> MinibatchESS:
        """Take in the minibatch of the update that follows.

        Args:
            log_ratios: of this rank's sequences, not truncated, [trajectories].
            staleness: updates that the oldest trajectory on any rank is behind.

        Returns:
            Its effective samples, on all ranks.

        Raises:
            ValueError: as of `effective_sample_size` and `learning_rate_scale`.
        """
        ess = MinibatchESS.of(self._ranks.gather(log_ratios), self._settings)
        used = ess.used(self._settings)
        self.scale = learning_rate_scale(used, self.reference.value, self._settings.ess_scaling)
        self.ratio_to_reference = used / self.reference.value
        for name, value in (
            ("ess", ess.ess), ("ess_ratio", ess.ess_ratio), ("ess_clipped", ess.ess_clipped),
            ("ess_ratio_clipped", ess.ess_ratio_clipped), ("ess_reference", self.reference.value),
            ("learning_rate_scale", self.scale), ("staleness_max", float(staleness)),
        ):  # fmt: skip
            self._metrics[f"vcpo/{name}"].append(value)
        self.reference.update(used, staleness)
        return ess

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """After clipping: lower the rate."""
        self._rates.enter_context(scaled_learning_rate(optimizer, self.scale))
        for group in optimizer.param_groups[:1]:
            self._metrics["vcpo/learning_rate"].append(float(group["lr"]))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the scheduler: restore it."""
        self._rates.close()
