"""From a rollout worker's queue to the ranks of a trainer: optimizer steps of whole groups that are not too old."""

from __future__ import annotations

import logging
import math
import queue
import statistics
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pronghorn.trl.async_rollouts import (
    GROUP_ROWS,
    STAMPS,
    VERSION_END,
    GroupBuffer,
    Position,
    decoded,
    encoded,
    rollout_of,
)
from pronghorn.trl.messages import scatter_tensors
from pronghorn.trl.rollouts import Rollout

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
LONG_AGO = -(1 << 30)  # updates, of weights that were there before this run
ERROR, TOTALS = "error", "totals."  # of the tensors that ranks are sent


class RolloutError(RuntimeError):
    """What makes rollouts has failed: training cannot go on, and can be resumed when that is mended."""


@runtime_checkable
class PacedWorker(Protocol):
    """A rollout worker that starts groups in the order of prompts, as many as it may, and can go on where a run was.

    Its samples' `group_id` is the number of the prompt, as of `Position`.
    """

    def allow(self, groups: int) -> None:
        """Groups below this number may be started."""

    def go_on(self, position: Position) -> None:
        """Before the start: make the groups that are not done at this position, in order."""


class GroupSource:
    """The groups of each optimizer step; the main process has one.

    Args:
        worker: of TRL's `RolloutWorkerProtocol`. Where it does not say how many rows a group has, they are
            `num_generations`.
        num_generations: rollouts of a prompt.
        groups_per_step: that an optimizer step learns from.
        max_age: updates that a rollout's first weights may be behind at the update that learns from it. So many steps'
            groups and one step's more may be outstanding: begun, and neither learned from nor dropped.
        metrics: lists of numbers by name, of a trainer of TRL.
        stale_after_s: seconds without a sign of life after which the worker counts as hung.

    Attributes:
        buffer: groups that wait.
        trained: groups that were learned from.
        dropped: groups that were too old.
        wait_s: seconds that training waited for the worker; whoever logs them sets them back.
    """

    def __init__(
        self, worker: Any, *, num_generations: int, groups_per_step: int, max_age: int,
        metrics: MutableMapping[str, list[Any]], stale_after_s: float,
    ) -> None:  # fmt: skip
        self.buffer = GroupBuffer()
        self.trained = self.dropped = 0
        self.wait_s = 0.0
        self._worker, self._metrics, self._stale_after_s = worker, metrics, stale_after_s
        self._num_generations, self._groups_per_step, self._max_age = num_generations, groups_per_step, max_age
        self._updates_of: dict[int, int] = {}  # model version -> updates that it had seen
        self._trained_when_published = 0
        self._first_group = 0  # what the numbers of a worker that starts from zero begin with

    def start(self, position: Position | None = None, trained: int = 0, dropped: int = 0) -> None:
        """Before the worker starts: forget what is there, and go on from a position, or from the first prompt."""
        left = sum(1 for _ in self._in_queue())
        if left:
            _log.warning("%d rows that the queue held before the start are not used: they will be made anew", left)
        self.buffer = GroupBuffer()
        self.buffer.position = position or Position()
        self.trained, self.dropped, self.wait_s = trained, dropped, 0.0
        self._updates_of.clear()
        self._first_group = 0
        if isinstance(self._worker, PacedWorker):
            self._worker.go_on(self.buffer.position)
        elif position is not None:
            self._first_group = max([position.first, *(number + 1 for number in position.beyond)])
            _log.warning("%s cannot go on where the run was: it starts over", type(self._worker).__name__)

    def published(self, model_version: int, updates: int) -> None:
        """The worker samples with the weights after so many updates, and tags samples with this version."""
        self._updates_of[model_version] = updates
        self._trained_when_published = self.trained
        self._allow()

    def next_groups(self, updates: int) -> list[list[Rollout]]:
        """The groups for the update that follows so many others; waits for them.

        Raises:
            RolloutError: the worker is dead, or hung.
            ValueError: a sample is not as it must be.
        """
        started, dropped = time.perf_counter(), self._drop(updates)
        while len(self.buffer.waiting) < self._groups_per_step:
            self._receive()
            dropped += self._drop(updates)
        self.wait_s += time.perf_counter() - started
        self._metrics["sample/dropped_groups_total"].append(float(dropped))
        self._metrics["sample/rollout_queue_size"].append(float(self._worker.rollout_buffer.qsize()))
        self._metrics["sample/waiting_groups"].append(float(len(self.buffer.waiting)))
        groups = self.buffer.take(self._groups_per_step)
        self.trained += len(groups)
        self._log_groups(groups, updates)
        return groups

    def drain(self) -> None:
        """Take all that lies in the worker's queue."""
        for sample in self._in_queue():
            self._add(sample)

    def _in_queue(self) -> Iterator[Any]:
        while True:
            try:
                sample = self._worker.rollout_buffer.get_nowait()
            except queue.Empty:
                return
            yield sample

    def _receive(self) -> None:
        try:
            sample = self._worker.rollout_buffer.get(timeout=POLL_SECONDS)
        except queue.Empty:
            try:
                self._worker.check_health(self._stale_after_s)
            except Exception as error:
                reason = error.__cause__ or error
                raise RolloutError(f"the rollout worker failed: {type(reason).__name__}: {reason}") from error
            return
        self._add(sample)

    def _add(self, sample: Any) -> None:
        versions = (sample.model_version, int(sample.metrics.get(VERSION_END, sample.model_version)))
        rollout = rollout_of(sample, *map(self._updates_at, versions))
        rollout.group += self._first_group
        rows = int(sample.metrics.get(GROUP_ROWS, self._num_generations))
        for name, value in sample.metrics.items():
            if name not in (*STAMPS, "reward", "reward_std") and not math.isnan(value):
                self._metrics[name].append(value)
        self.buffer.add(rollout, rows)

    def _updates_at(self, model_version: int) -> int:
        if model_version in self._updates_of:
            return self._updates_of[model_version]
        if model_version < min(self._updates_of, default=0):
            return LONG_AGO
        raise ValueError(
            f"sample: got model_version {model_version}, which no update_model_version told; known are "
            f"{', '.join(map(str, self._updates_of)) or 'none'}"
        )

    def _drop(self, updates: int) -> int:
        dropped = self.buffer.drop(updates - self._max_age)
        if dropped:
            _log.info("%d groups are more than %d updates old, and dropped", dropped, self._max_age)
            self.dropped += dropped
            self._allow()
        return dropped

    def _allow(self) -> None:
        if isinstance(self._worker, PacedWorker):
            outstanding = (self._max_age + 1) * self._groups_per_step
            self._worker.allow(self._trained_when_published + self.dropped + outstanding)

    def _log_groups(self, groups: Sequence[Sequence[Rollout]], updates: int) -> None:
        rewards = [[rollout.reward for rollout in group if not math.isnan(rollout.reward)] for group in groups]
        known = [group for group in rewards if group]
        if known:
            self._metrics["reward"].append(statistics.fmean(reward for group in known for reward in group))
            self._metrics["reward_std"].append(statistics.fmean(map(statistics.pstdev, known)))
        ages = [float(updates - rollout.policy_version) for group in groups for rollout in group]
        self._metrics["sample/staleness_mean"].append(statistics.fmean(ages))
        self._metrics["sample/staleness_max"].append(max(ages))


@dataclass(frozen=True)
class StepTotals:
    """What all ranks learn from in one optimizer step.

    Attributes:
        groups: their numbers.
        rows: trajectories.
        tokens: of prompts and completions.
        sampled_tokens: those that are trained.
    """

    groups: list[int]
    rows: int
    tokens: int
    sampled_tokens: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[Rollout]]) -> StepTotals:
        """Of some groups."""
        rollouts = [rollout for group in groups for rollout in group]
        sampled = sum(int(rollout.sampled.sum()) for rollout in rollouts)
        return cls([group[0].group for group in groups], len(rollouts), sum(map(len, rollouts)), sampled)


class StepLoader:
    """What a trainer iterates over: for each optimizer step, this rank's rollouts in some micro-batches.

    It asks for a step's groups when the trainer does, after the update before; a loader that fetches ahead, as
    accelerate's do, would ask for groups of weights that do not exist yet. A micro-batch has `rollouts`, a list that
    may be empty, and `totals`, the step's on all ranks.

    Args:
        source: of groups; None in processes other than the main one.
        updates: says how many there were.
        micro_batches: of a step.
        ranks: how many processes share a step.
        device: where those communicate.
    """

    def __init__(
        self, source: GroupSource | None, updates: Callable[[], int], micro_batches: int, ranks: int,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self._source, self._updates, self._micro_batches, self._ranks = source, updates, micro_batches, ranks
        self._device = device

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            rollouts, totals = self._own_share()
            size = math.ceil(len(rollouts) / self._micro_batches)
            for number in range(self._micro_batches):
                yield {"rollouts": rollouts[number * size : (number + 1) * size], "totals": totals}

    def _own_share(self) -> tuple[list[Rollout], StepTotals]:
        if self._source is None:
            return _unpacked(scatter_tensors(None, self._device))
        try:
            groups = self._source.next_groups(self._updates())
        except Exception as error:
            # The others wait for their share, and are to end too.
            self._send([{ERROR: _bytes_of(f"{type(error).__name__}: {error}")}] * self._ranks)
            raise
        totals, shares = StepTotals.of(groups), shares_of(groups, self._ranks)
        self._send([_packed(share, totals) for share in shares])
        return shares[0], totals

    def _send(self, shares: list[dict[str, Tensor]]) -> None:
        if self._ranks > 1:
            scatter_tensors(shares, self._device)


def _packed(rollouts: Sequence[Rollout], totals: StepTotals) -> dict[str, Tensor]:
    return encoded(rollouts) | {f"{TOTALS}{name}": torch.tensor(value) for name, value in vars(totals).items()}


def _unpacked(tensors: dict[str, Tensor]) -> tuple[list[Rollout], StepTotals]:
    if ERROR in tensors:
        raise RolloutError(f"process 0: {bytes(tensors[ERROR].tolist()).decode()}")
    totals: dict[str, Any] = {
        name.removeprefix(TOTALS): tensors.pop(name).tolist() for name in [*tensors] if name.startswith(TOTALS)
    }
    return decoded(tensors, "process 0"), StepTotals(**totals)


def _bytes_of(text: str) -> Tensor:
    return torch.tensor([*text.encode()], dtype=torch.uint8)


def shares_of(groups: Sequence[Sequence[Rollout]], ranks: int) -> list[list[Rollout]]:
    """Whole groups for each of some ranks, with about as many tokens each, and one group at least."""
    shares: list[list[Sequence[Rollout]]] = [[] for _ in range(ranks)]
    for group in sorted(groups, key=_tokens, reverse=True):
        min(shares, key=lambda share: sum(map(_tokens, share))).append(group)
    ordered = [sorted(share, key=lambda group: group[0].group) for share in shares]
    return [[rollout for group in share for rollout in group] for share in ordered]


def _tokens(group: Sequence[Rollout]) -> int:
    return sum(map(len, group))
