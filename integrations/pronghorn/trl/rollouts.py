"""Trajectories one by one, as trainers of TRL hold them in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

# What a batch may hold for a model's forward beside tokens.
FORWARD_KEYS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


@dataclass
class Rollout:
    """One trajectory.

    Attributes:
        prompt_ids: int64 [prompt tokens].
        completion_ids: int64 [completion tokens].
        sampled: which tokens of the completion the policy sampled, not a tool, bool [completion tokens].
        sampler_log_probs: of the completion's tokens as they were sampled, NaN where unknown, float32
            [completion tokens]; None where the learner itself sampled them, and has not changed since.
        reward: weighted sum over reward functions; NaN where none gave one.
        advantage: as of GRPO.
        group: a number for its prompt, the same for all rollouts of that prompt.
        policy_version: updates that the sampler's weights had seen.
        forward: what else the model's forward takes, with a batch dimension of 1.
        policy_version_end: the same of the weights that sampled its last token; None where all sampled with one.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    sampled: Tensor
    sampler_log_probs: Tensor | None
    reward: float
    advantage: float
    group: int
    policy_version: int
    forward: dict[str, Any] = field(default_factory=dict)
    policy_version_end: int | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def to(self, device: torch.device | str) -> Rollout:
        """The same on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        moved["forward"] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.forward.items()
        }
        return replace(self, **moved)


def rollouts_of(batch: dict[str, Any]) -> list[Rollout]:
    """The rows of a batch of `GroupedRollouts`, without their padding."""
    from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

    split = split_pixel_values_by_grid({key: batch[key] for key in FORWARD_KEYS if batch.get(key) is not None})
    log_probs = batch.get("sampling_per_token_logps")
    found = []
    for row in range(len(batch["prompt_ids"])):
        there = batch["completion_mask"][row].bool()
        sampled = there if "tool_mask" not in batch else there & batch["tool_mask"][row].bool()
        found.append(
            Rollout(
                batch["prompt_ids"][row][batch["prompt_mask"][row].bool()],
                batch["completion_ids"][row][there],
                sampled[there],
                None if log_probs is None else log_probs[row][there],
                float(batch["rewards"][row]),
                float(batch["advantages"][row]),
                int(batch["groups"][row]),
                int(batch["policy_versions"][row]),
                unsplit_pixel_values_by_grid({key: value[row : row + 1] for key, value in split.items()}),
            )
        )
    return found


@dataclass(frozen=True)
class PaddedRollouts:
    """Rollouts of different lengths as one batch.

    Attributes:
        input_ids: prompts, padded on the left, and completions, padded on the right, int64 [rollouts, positions].
        attention_mask: int64 [rollouts, positions].
        completion_length: positions of the completions, the last ones.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_length: int

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], pad_token_id: int) -> PaddedRollouts:
        """Of some rollouts; where all completions are empty, they have one position of padding."""
        prompts = _padded([rollout.prompt_ids for rollout in rollouts], pad_token_id, "left")
        completions = _padded([rollout.completion_ids for rollout in rollouts], pad_token_id, "right")
        missing = max(0, 1 - completions[0].shape[1])
        ids, there = completions
        completions = pad(ids, (0, missing), value=pad_token_id), pad(there, (0, missing))
        ids, mask = (torch.cat(parts, dim=1) for parts in zip(prompts, completions, strict=True))
        return cls(ids, mask, completions[0].shape[1])


def _padded(rows: list[Tensor], value: int, side: str) -> tuple[Tensor, Tensor]:
    ids = pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
    there = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids, there
