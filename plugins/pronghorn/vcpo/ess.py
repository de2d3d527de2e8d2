"""Effective sample size of a minibatch, and the learning rate that it allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.vcpo.config import AUTO, LOG, OFF, SQRT, VCPOSettings
from pronghorn.vcpo.ratios import clipped_log_ratios

REFERENCE_EPSILON = 1e-8


def effective_sample_size(log_ratios: Tensor, space: str = LOG) -> float:
    """(Σw)² / Σw²: how many samples of equal ratio would tell as much.

    Args:
        log_ratios: log w of all trajectories of the minibatch, on all ranks, not truncated, [trajectories].
        space: "log" is exact for any ratios; "reference" adds 1e-8 to the divisor and overflows to NaN, as the
            authors' code does.

    Returns:
        From 1 to the number of trajectories.

    Raises:
        ValueError: there are no trajectories, or a log-ratio is not finite.
    """
    if log_ratios.dim() != 1 or not log_ratios.numel():
        raise ValueError(f"log_ratios: got {list(log_ratios.shape)}, wanted [trajectories], at least one")
    if not log_ratios.isfinite().all():
        raise ValueError("log_ratios: got NaN or infinity, wanted finite numbers")
    log_ratios = log_ratios.double()
    if space == LOG:
        return float((2 * log_ratios.logsumexp(0) - (2 * log_ratios).logsumexp(0)).exp())
    ratios = log_ratios.exp()
    return float(ratios.sum().square() / (ratios.square().sum() + REFERENCE_EPSILON))


@dataclass(frozen=True)
class MinibatchESS:
    """Effective samples of a minibatch, by its ratios as they are and truncated.

    Attributes:
        ess: effective samples.
        ess_ratio: the same over samples.
        ess_clipped: effective samples by truncated ratios.
        ess_ratio_clipped: the same over samples.
    """

    ess: float
    ess_ratio: float
    ess_clipped: float
    ess_ratio_clipped: float

    @classmethod
    def of(cls, log_ratios: Tensor, config: VCPOSettings) -> MinibatchESS:
        """From log-ratios of all trajectories on all ranks, [trajectories].

        Raises:
            ValueError: as of `effective_sample_size`.
        """
        ess = effective_sample_size(log_ratios, config.ess_space)
        clipped = effective_sample_size(clipped_log_ratios(log_ratios, config), config.ess_space)
        return cls(ess, ess / len(log_ratios), clipped, clipped / len(log_ratios))

    def used(self, config: VCPOSettings) -> float:
        """The share that scales the learning rate."""
        return self.ess_ratio_clipped if config.ess_use_clipped else self.ess_ratio


def learning_rate_scale(ess_ratio: float, reference: float, rule: str) -> float:
    """What the learning rate of one step is multiplied with: min(1, ess_ratio / reference), or its square root.

    Args:
        ess_ratio: effective samples over samples.
        reference: the same of minibatches without lag.
        rule: "sqrt", "linear" or "off".

    Raises:
        ValueError: `ess_ratio` is NaN, as `space="reference"` gives where ratios overflow. The authors' code would
            take the whole rate there, on its worst minibatch.
    """
    if not 0 <= ess_ratio < math.inf:
        raise ValueError(f"ess_ratio: got {ess_ratio}, wanted a number of at least 0; ess_space='log' cannot overflow")
    if not reference > 0:
        raise ValueError(f"reference: got {reference}, wanted a positive number")
    if rule == OFF:
        return 1.0
    scale = min(1.0, ess_ratio / reference)
    return math.sqrt(scale) if rule == SQRT else scale


class ReferenceESS:
    """The share of effective samples without lag: given, or a running mean of what minibatches without lag had.

    Until there was one it is 1, which damps rather too much than too little.

    Args:
        config: its `ess_reference` and `ess_reference_decay`.
    """

    def __init__(self, config: VCPOSettings) -> None:
        self._given = None if config.ess_reference == AUTO else float(config.ess_reference)
        self._decay = config.ess_reference_decay
        self._mean: float | None = None

    @property
    def value(self) -> float:
        """The present reference."""
        if self._given is not None:
            return self._given
        return 1.0 if self._mean is None else self._mean

    def update(self, ess_ratio: float, staleness: int) -> None:
        """Take a minibatch into account whose oldest trajectory is `staleness` updates old.

        Raises:
            ValueError: `staleness` is negative.
        """
        if type(staleness) is not int or staleness < 0:
            raise ValueError(f"staleness: got {staleness!r}, wanted a whole number of at least 0")
        if staleness == 0:
            mean = self._mean
            self._mean = ess_ratio if mean is None else self._decay * mean + (1 - self._decay) * ess_ratio

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"ess_ema": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave.

        Raises:
            KeyError, ValueError: it gave something else.
        """
        mean = state["ess_ema"]
        if mean is not None and (isinstance(mean, bool) or not isinstance(mean, int | float) or not 0 <= mean <= 1):
            raise ValueError(f"ess_ema: got {mean!r}, wanted a share of samples or None")
        self._mean = mean


@contextmanager
def scaled_learning_rate(optimizer: torch.optim.Optimizer, scale: float) -> Iterator[None]:
    """Multiply the learning rate of every parameter group for as long as this lasts; schedulers see nothing of it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
