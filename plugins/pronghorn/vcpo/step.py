"""One step of the optimizer: clipping, the learning rate that the ratios allow, and what to log of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from pronghorn.vcpo.config import VCPOSettings
from pronghorn.vcpo.ess import MinibatchESS, ReferenceESS, learning_rate_scale, scaled_learning_rate
from pronghorn.vcpo.gradient import Accumulated
from pronghorn.vcpo.minibatch import Minibatch
from pronghorn.vcpo.ranks import Alone, Ranks
from pronghorn.vcpo.ratios import clipped_log_ratios


@dataclass(frozen=True)
class TrajectoryStats:
    """What one trajectory was in a step.

    Attributes:
        group: of its prompt.
        response_length: sampled tokens.
        reward: as given.
        advantage: as given.
        grad_norm: `grad_norm_unscaled` · |advantage|.
        grad_norm_unscaled: of the gradient of its log-probability, times its truncated ratio.
        k3_kl: divergence of the sampler from the learner.
        geometric_mean_ratio: of its tokens.
        ratio: of the sequence.
        clipped_ratio: the same, truncated.
    """

    group: int
    response_length: int
    reward: float
    advantage: float
    grad_norm: float
    grad_norm_unscaled: float
    k3_kl: float
    geometric_mean_ratio: float
    ratio: float
    clipped_ratio: float

    def to_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


@dataclass(frozen=True)
class StepMetrics(MinibatchESS):
    """What a step was, beside the effective samples of its minibatch.

    Attributes:
        ess_reference: the share at which the learning rate is whole.
        learning_rates: that were used, one for each parameter group.
        grad_norm: of the gradient before it was clipped.
        baselines: one for each group, one in all, or none.
        trajectories: one record each.
    """

    ess_reference: float
    learning_rates: list[float]
    grad_norm: float
    baselines: list[float]
    trajectories: list[TrajectoryStats]


def vcpo_step(
    found: Accumulated,
    optimizer: torch.optim.Optimizer,
    minibatch: Minibatch,
    config: VCPOSettings,
    reference: ReferenceESS,
    staleness: int,
    ranks: Ranks | None = None,
) -> StepMetrics:
    """Update parameters by one minibatch: clip the gradient's norm, then step at the rate that the ratios allow.

    Where an error is raised, parameters, optimizer and reference are as they were.

    Args:
        found: what `accumulate` or `accumulate_batched` gave. Its gradients become the parameters', and are clipped.
        optimizer: over its parameters; learning rates are as before afterwards.
        minibatch: its trajectories.
        config: how.
        reference: the share of effective samples without lag; it learns of this minibatch after the step.
        staleness: how many updates the oldest trajectory is behind.
        ranks: those of `accumulate`.

    Raises:
        ValueError: `staleness` is negative, or the effective sample size overflowed, which it does with
            `ess_space="reference"` alone.
        FloatingPointError: the gradient is not finite.
    """
    if type(staleness) is not int or staleness < 0:
        raise ValueError(f"staleness: got {staleness!r}, wanted a whole number of at least 0")
    ess = MinibatchESS.of((ranks or Alone()).gather(found.statistics.log_ratios), config)
    scale = learning_rate_scale(ess.used(config), reference.value, config.ess_scaling)
    for parameter, gradient in zip(found.parameters, found.gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    limit = config.max_grad_norm or float("inf")
    norm = float(torch.nn.utils.clip_grad_norm_(found.parameters, limit))
    if not norm < float("inf"):
        raise FloatingPointError(f"the norm of the step's gradient is {norm}, wanted a finite number")
    rate_reference = reference.value
    with scaled_learning_rate(optimizer, scale):
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        optimizer.step()
    reference.update(ess.used(config), staleness)
    records = trajectory_stats(found, minibatch, config)
    return StepMetrics(**asdict(ess), ess_reference=rate_reference, learning_rates=rates, grad_norm=norm,
                       baselines=found.baselines, trajectories=records)  # fmt: skip


def trajectory_stats(found: Accumulated, minibatch: Minibatch, config: VCPOSettings) -> list[TrajectoryStats]:
    """A record of each trajectory, for diagnosis."""
    of, advantages = found.statistics, minibatch.advantages.double().cpu()
    norms = found.score_norms * found.weights
    columns = (
        minibatch.groups, of.counts, minibatch.rewards.double(), advantages, norms * advantages.abs(), norms, of.k3,
        of.geometric_mean, of.log_ratios.exp(), clipped_log_ratios(of.log_ratios, config).exp(),
    )  # fmt: skip
    return [TrajectoryStats(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
