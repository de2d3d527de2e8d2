"""Rollouts of an asynchronous worker, put together to groups, for as long as they wait to be learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pronghorn.files.tensor_files import load_tensors, save_tensors
from pronghorn.trl.rollouts import Rollout

# What a worker may tell of a sample beside TRL's metrics: rows of its group, and the weights of its last token.
GROUP_ROWS, VERSION_END = "group_rows", "model_version_end"
STAMPS = (GROUP_ROWS, VERSION_END)

FORMAT = 2  # of the file of groups that wait
_NUMBERS = {"rewards": torch.float64, "advantages": torch.float64, "groups": torch.int64, "versions": torch.int64,
            "version_ends": torch.int64, "prompt_lengths": torch.int64, "completion_lengths": torch.int64}  # fmt: skip
_TOKENS = {"prompt_ids": torch.int64, "completion_ids": torch.int64, "sampled": torch.bool,
           "sampler_log_probs": torch.float32}  # fmt: skip


def rollout_of(sample: Any, policy_version: int, policy_version_end: int) -> Rollout:
    """One row of TRL's asynchronous worker.

    Its prompt ends before the first token that is trained, and has one token at least; tokens after that which are not
    trained, such as a tool's, belong to the completion, and were not sampled.

    Args:
        sample: a `RolloutSample` of TRL.
        policy_version: updates that the weights had seen which sampled its first token.
        policy_version_end: the same of its last token.

    Raises:
        ValueError: its lengths differ, or its metrics hold no reward.
    """
    tokens = torch.tensor(sample.input_ids, dtype=torch.long)
    mask = torch.tensor(sample.completion_mask, dtype=torch.bool)
    log_probs = torch.tensor(sample.old_log_probs, dtype=torch.float32)
    if not len(tokens) == len(mask) == len(log_probs) > 0:
        raise ValueError(
            f"sample: got {len(tokens)} input_ids, {len(mask)} of completion_mask and {len(log_probs)} old_log_probs, "
            "wanted as many of each, at least one"
        )
    if "reward" not in sample.metrics:
        raise ValueError(f"sample: got metrics {', '.join(sample.metrics) or 'without any'}, wanted reward among them")
    start = int(mask.int().argmax()) if mask.any() else len(tokens)
    start = max(start, 1)  # the first token of all has no probability
    return Rollout(
        tokens[:start], tokens[start:], mask[start:], log_probs[start:], float(sample.metrics["reward"]),
        float(sample.advantage), int(sample.group_id), policy_version, policy_version_end=policy_version_end,
    )  # fmt: skip


@dataclass
class Position:
    """Where a run is in the endless sequence of its prompts.

    A group's number is the place of its prompt in that sequence, in which the dataset follows itself.

    Attributes:
        first: the first prompt whose group is not done.
        beyond: prompts after it whose groups are, because they were done sooner.
    """

    first: int = 0
    beyond: set[int] = field(default_factory=set)

    def add(self, group: int) -> None:
        """This group is done."""
        self.beyond.add(group)
        while self.first in self.beyond:
            self.beyond.remove(self.first)
            self.first += 1


class GroupBuffer:
    """Groups that wait, and those that are not whole yet.

    Attributes:
        position: of the run; a group that waits, was learned from or was dropped is done.
        waiting: whole groups, each with its rollouts side by side.
    """

    def __init__(self) -> None:
        self.position = Position()
        self.waiting: list[list[Rollout]] = []
        self._incomplete: dict[int, list[Rollout]] = {}

    def add(self, rollout: Rollout, rows: int) -> bool:
        """Take in a rollout of a group of so many rows; say whether the group is whole with it.

        Raises:
            ValueError: `rows` differs within the group in a way that it cannot be whole.
        """
        members = self._incomplete.setdefault(rollout.group, [])
        members.append(rollout)
        if len(members) > rows:
            raise ValueError(f"group {rollout.group}: got {len(members)} rows, and it said that it has {rows}")
        if len(members) < rows:
            return False
        self.waiting.append(self._incomplete.pop(rollout.group))
        self.position.add(rollout.group)
        return True

    def drop(self, oldest: int) -> int:
        """Drop whole groups of which a rollout was begun before so many updates; say how many they were."""
        before = len(self.waiting)
        self.waiting = [group for group in self.waiting if version_of(group) >= oldest]
        return before - len(self.waiting)

    def take(self, count: int) -> list[list[Rollout]]:
        """So many groups, the oldest first."""
        self.waiting.sort(key=lambda group: (version_of(group), group[0].group))
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    def save(self, path: Path) -> None:
        """Write the groups that wait; what is not whole is not done, and will be made anew."""
        save_tensors(path, encoded([rollout for group in self.waiting for rollout in group]), format=FORMAT)

    def load(self, path: Path) -> None:
        """Take up what `save` wrote.

        Raises:
            ValueError: the file is damaged, or holds something else.
        """
        self._incomplete.clear()
        groups: dict[int, list[Rollout]] = {}
        for rollout in decoded(load_tensors(path, newest=FORMAT)[0], path):
            groups.setdefault(rollout.group, []).append(rollout)
        self.waiting = list(groups.values())


def version_of(group: Sequence[Rollout]) -> int:
    """Updates that the oldest weights of a group had seen."""
    return min(rollout.policy_version for rollout in group)


def encoded(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Rollouts of an asynchronous worker as a few tensors, exactly."""
    columns = {
        "rewards": [rollout.reward for rollout in rollouts],
        "advantages": [rollout.advantage for rollout in rollouts],
        "groups": [rollout.group for rollout in rollouts],
        "versions": [rollout.policy_version for rollout in rollouts],
        "version_ends": [rollout.policy_version_end for rollout in rollouts],
        "prompt_lengths": [len(rollout.prompt_ids) for rollout in rollouts],
        "completion_lengths": [len(rollout.completion_ids) for rollout in rollouts],
    }
    numbers = {name: torch.tensor(columns[name], dtype=dtype) for name, dtype in _NUMBERS.items()}
    tokens = {
        name: torch.cat([getattr(rollout, name) for rollout in rollouts] or [torch.zeros(0)]).to(dtype)
        for name, dtype in _TOKENS.items()
    }
    return {**numbers, **tokens}


def decoded(tensors: dict[str, Tensor], source: Path | str) -> list[Rollout]:
    """What `encoded` encoded.

    Args:
        tensors: by name.
        source: where they come from, which errors name.

    Raises:
        ValueError: they are damaged, or something else.
    """
    wanted = _NUMBERS | _TOKENS
    if {name: (tensor.dtype, tensor.dim()) for name, tensor in tensors.items()} != {
        name: (dtype, 1) for name, dtype in wanted.items()
    }:
        raise ValueError(f"{source}: got {', '.join(tensors)}, wanted {', '.join(wanted)}, all of one dimension")
    lengths = {name: tensors[f"{name}_lengths"].tolist() for name in ("prompt", "completion")}
    sizes = {"prompt_ids": sum(lengths["prompt"])} | dict.fromkeys(list(_TOKENS)[1:], sum(lengths["completion"]))
    sizes |= dict.fromkeys(_NUMBERS, len(tensors["groups"]))
    wrong = [name for name, size in sizes.items() if len(tensors[name]) != size]
    wrong += [f"{name}_lengths" for name in lengths if min(lengths[name], default=0) < 0]
    wrong += [name for name in ("prompt_ids", "completion_ids") if (tensors[name] < 0).any()]
    if wrong or not all(map(math.isfinite, tensors["advantages"].tolist())):
        raise ValueError(f"{source}: {', '.join(wrong) or 'advantages'} cannot be right; what came is damaged")
    prompts = tensors["prompt_ids"].split(lengths["prompt"])
    completions = [tensors[name].split(lengths["completion"]) for name in list(_TOKENS)[1:]]
    numbers = [tensors[name].tolist() for name in ("rewards", "advantages", "groups", "versions", "version_ends")]
    return [
        Rollout(prompt, ids, sampled, log_probs, reward, advantage, group, version, policy_version_end=end)
        for prompt, ids, sampled, log_probs, reward, advantage, group, version, end in zip(
            prompts, *completions, *numbers, strict=True
        )
    ]
