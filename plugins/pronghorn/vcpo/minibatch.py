"""The trajectories of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Minibatch:
    """What a step must know of its trajectories beside the learner's log-probabilities.

    A group that was cut short counts with those that are there; one of a single trajectory is its own baseline under
    `opob="group"`, and teaches nothing. An empty completion has the ratio 1 and no gradient, and counts as a sample.

    Attributes:
        sampler_log_probs: recorded at generation, [trajectories, tokens]; NaN where the sampler had none.
        mask: tokens that were sampled, neither padding nor a tool's, bool [trajectories, tokens].
        rewards: [trajectories].
        advantages: [trajectories], as of GRPO.
        groups: a number for each prompt, integers [trajectories]; rollouts of a prompt stand side by side.

    Raises:
        ValueError, TypeError: shapes or dtypes differ from those, a reward or an advantage is not finite, or a group
            is scattered.
    """

    sampler_log_probs: Tensor
    mask: Tensor
    rewards: Tensor
    advantages: Tensor
    groups: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.sampler_log_probs, Tensor):
            raise TypeError(
                f"sampler_log_probs: got {type(self.sampler_log_probs).__name__}, wanted a tensor; record the "
                "log-probabilities of sampled tokens at generation, those of the learner are no substitute"
            )
        if self.mask.dim() != 2 or not len(self.mask):
            raise ValueError(f"mask: got {list(self.mask.shape)}, wanted [trajectories, tokens], at least one")
        if self.mask.dtype != torch.bool:
            raise TypeError(f"mask: got {self.mask.dtype}, wanted torch.bool")
        if self.sampler_log_probs.shape != self.mask.shape:
            raise ValueError(
                f"sampler_log_probs: got {list(self.sampler_log_probs.shape)}, wanted mask's {list(self.mask.shape)}"
            )
        for name in ("rewards", "advantages", "groups"):
            tensor = getattr(self, name)
            if tensor.shape != self.mask.shape[:1]:
                raise ValueError(f"{name}: got {list(tensor.shape)}, wanted {list(self.mask.shape[:1])}")
            if not tensor.isfinite().all():
                raise ValueError(f"{name}: got NaN or infinity, wanted finite numbers")
        if self.groups.is_floating_point():
            raise TypeError(f"groups: got {self.groups.dtype}, wanted integers")
        runs = self.groups.unique_consecutive().tolist()
        scattered = [group for group in runs if runs.count(group) > 1]
        if scattered:
            raise ValueError(f"groups: {scattered[0]} is scattered, wanted the rollouts of a prompt side by side")

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def lengths(self) -> Tensor:
        """Numbers of sampled tokens, [trajectories]."""
        return self.mask.sum(-1)

    def group_rows(self) -> list[range]:
        """The rows of each group."""
        sizes = self.groups.unique_consecutive(return_counts=True)[1].tolist()
        ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
