"""GRPO's batches with what off-policy methods need of a trajectory, and groups that stay whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid


class GroupedRollouts(GRPOTrainer):
    """A `GRPOTrainer` whose training batches also tell rewards, groups and the sampler of each trajectory.

    The batch of a generation is shuffled by groups, not by trajectories, so that all rollouts of a prompt are on one
    rank and follow each other. A batch has, beside what GRPO's has: `rewards` float32 [trajectories], NaN where no
    reward function gave one; `groups` int64 [trajectories]; `policy_versions` int64 [trajectories], the number of
    updates of the weights that sampled (`rollout_func` may return its own as `policy_version`, a list); and
    `sampling_per_token_logps` float32 [trajectories, tokens], left out only where the learner sampled itself and will
    not change before the batch is used. A completion of a `rollout_func` may be empty.

    Raises:
        ValueError: a sampler other than the learner gave no log-probabilities, or a rank's part of a generation batch
            or of an optimizer step does not hold whole groups.
    """

    _buffered_inputs: list[dict[str, Any]] | None
    rollout_func: Callable[..., dict[str, Any]] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._generations = 0
        self._weighted_rewards = torch.zeros(0)
        if self.rollout_func is not None:
            self.rollout_func = partial(_without_empty_completions, self.rollout_func)
        rows, size = self.args.per_device_train_batch_size, self.num_generations
        for name in ("steps_per_generation", "gradient_accumulation_steps"):
            if rows * getattr(self.args, name) % size:
                raise ValueError(
                    f"per_device_train_batch_size * {name}: got {rows} * {getattr(self.args, name)}, wanted a multiple "
                    f"of num_generations ({size}), so that all rollouts of a prompt are in one step of one process"
                )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        found = super()._calculate_rewards(*args, **kwargs)  # of all ranks, [trajectories, functions]
        self._weighted_rewards = (found * self.reward_weights.to(found)).nansum(dim=1)
        self._weighted_rewards[found.isnan().all(dim=1)] = torch.nan
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        count, device = len(inputs), batch["completion_ids"].device
        start = self.accelerator.process_index * count
        batch["rewards"] = self._weighted_rewards[start : start + count].to(device)
        size = self.num_generations if self.model.training else self.num_generations_eval
        numbers = (start + torch.arange(count, device=device)) // size
        groups_at_once = count * self.accelerator.num_processes // size
        batch["groups"] = self._generations * groups_at_once + numbers
        self._generations += 1
        step = self.state.global_step
        batch["policy_versions"] = torch.tensor([row.get("policy_version", step) for row in inputs], device=device)
        if batch.get("sampling_per_token_logps") is None and (self.use_vllm or self.rollout_func is not None):
            raise ValueError(
                "sampling_per_token_logps: the sampler gave none, and the learner's own are no substitute; wanted "
                "`logprobs` of the rollout_func, or of vLLM"
            )
        if batch.get("sampling_per_token_logps") is None and "old_per_token_logps" in batch:
            # TRL computes these right after generation where the learner will be ahead of what it sampled.
            batch["sampling_per_token_logps"] = batch["old_per_token_logps"]
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            parts = split_tensor_dict(_shuffled_groups(batch, self.num_generations), steps)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in parts]
        return self._buffered_inputs[self._step % steps]


def _without_empty_completions(
    sample: Callable[..., dict[str, Any]], prompts: list[Any], trainer: GRPOTrainer
) -> dict[str, Any]:
    """What a rollout_func gives, where an empty completion, which TRL cannot hold, is an end that nobody sampled."""
    found = sample(prompts, trainer)
    completions = found.get("completion_ids", ())
    if all(len(ids) for ids in completions):
        return found
    masks = found.get("env_mask") or [[1] * len(ids) for ids in completions]
    end = [trainer._tokenizer.eos_token_id]
    changed = {"completion_ids": end, "logprobs": [0.0], "env_mask": [0]}
    return {
        **found,
        **{
            name: [values if len(ids) else changed[name] for values, ids in zip(column, completions, strict=True)]
            for name, column in {**found, "env_mask": masks}.items()
            if name in changed and column is not None
        },
    }


def _shuffled_groups(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """Groups in random order, each with its trajectories in order."""
    count = len(batch["groups"])
    rows = (torch.randperm(count // size)[:, None] * size + torch.arange(size)).flatten()

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.dim() == 0 else value[rows.to(value.device)]
        return None if value is None else [value[row] for row in rows.tolist()]

    return {key: moved(value) for key, value in batch.items()}
