"""TRL's rollout worker, which samples from a vLLM server, with groups that are told apart, paced and gone on with."""

from __future__ import annotations

import asyncio
import functools
import queue
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from trl.experimental.async_grpo.async_rollout_worker import (
    AsyncRolloutWorker,
    RolloutGroup,
    RolloutSample,
    TrainingSequence,
    _AsyncRolloutLoop,
)

from pronghorn.trl.async_rollouts import GROUP_ROWS, VERSION_END, Position

GATE_SECONDS = 0.02
STOP_SECONDS = 15.0
REASON_SECONDS = 5.0  # the event of a failure may be here before its reason


class GroupRolloutLoop(_AsyncRolloutLoop):
    """TRL's loop; samples also tell how many rows their group has, and the first and last weights of each row.

    A group's number is its prompt's, and rollouts wait until their group may start. A conversation without a token to
    train is a row without a completion: its reward belongs to its group.

    Args:
        groups_allowed: shared; groups below that number may start.
        first_group: the number of the first prompt that the dataset gives.
        done: numbers to leave out.
    """

    def __init__(self, *, groups_allowed: Any, first_group: int = 0, done: tuple[int, ...] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._groups_allowed, self._first_group, self._done = groups_allowed, first_group, frozenset(done)
        self._versions: dict[str, tuple[int, int]] = {}  # of conversations, by their rollout_id

    def _repeat_iterator(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in super()._repeat_iterator():
            if self._first_group + number not in self._done:
                yield self._first_group + number, row

    async def _generate_one(
        self, prompt: Any, tool_dict: dict[str, Any], tools: list[Any], group_id: int = 0
    ) -> tuple[Any, ...]:
        while group_id >= self._groups_allowed.value:
            if self._stop_event.is_set():
                return [], [], [], 0, 0, None
            await asyncio.sleep(GATE_SECONDS)
        version = self.model_version
        found: tuple[Any, ...] = await super()._generate_one(prompt, tool_dict, tools, group_id)
        sequences = found[2]
        if not sequences:
            sequences.append(TrainingSequence([self.eos_token_ids[0]], [0], [0.0], f"empty-{id(sequences)}"))
        for sequence in sequences:
            self._versions[sequence.rollout_id] = (version, self.model_version)
        return found

    async def _score_group(self, group: RolloutGroup) -> list[RolloutSample]:
        samples: list[RolloutSample] = await super()._score_group(group)
        sequences = [sequence for conversation in group.completions_sequences for sequence in conversation]
        for sample, sequence in zip(samples, sequences, strict=True):
            sample.model_version, last = self._versions[sequence.rollout_id]
            sample.metrics |= {GROUP_ROWS: float(len(samples)), VERSION_END: float(last)}
        for sequence in sequences:
            self._versions.pop(sequence.rollout_id, None)
        return samples


class GroupWorker(AsyncRolloutWorker):
    """TRL's worker with `GroupRolloutLoop`. It can be started again after it was stopped.

    Raises:
        ImportError: vLLM or aiohttp is not installed.
    """

    _process: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._groups_allowed = self._mp_ctx.Value("q", 0)
        # The value reaches the child by inheritance alone, as an argument of its process.
        loop: Any = functools.partial(GroupRolloutLoop, groups_allowed=self._groups_allowed)
        self._loop_cls = loop

    @classmethod
    def like(cls, worker: AsyncRolloutWorker) -> GroupWorker:
        """What a worker of TRL that was not started would do."""
        return cls(**worker._loop_kwargs)

    def allow(self, groups: int) -> None:
        """Groups below this number may be started."""
        with self._groups_allowed.get_lock():
            self._groups_allowed.value = groups

    def go_on(self, position: Position) -> None:
        """Before the start: make the groups that are not done at this position; a streamed dataset starts over."""
        can_seek = isinstance(self._loop_kwargs["dataset"], Dataset)
        self._loop_kwargs |= {
            "dataset_start_index": position.first if can_seek else 0,
            "first_group": position.first, "done": tuple(sorted(position.beyond)),
        }  # fmt: skip

    def start(self) -> None:
        """Start the child process."""
        if self._process is None:
            event = self._mp_ctx.Event
            self._stop_event_mp, self._child_ready_event, self._failed_event = event(), event(), event()
        super().start()

    def stop(self) -> None:
        """End the child process, which may be dead."""
        process = self._process
        if process is not None and self._failed_event.is_set():
            process.join(STOP_SECONDS)
            process.kill()
            process.join()
        # TRL tells the child by an event, and telling one that a dead process waited for takes for ever.
        if process is not None and process.is_alive():
            super().stop()
        self._process = None

    def check_health(self, stale_after_s: float) -> None:
        """Raise a RuntimeError if the child failed, was killed, or shows no sign of life."""
        if self._failed_event.is_set():
            try:
                kind, message, trace = self._exception_info_queue.get(timeout=REASON_SECONDS)
            except queue.Empty:
                raise RuntimeError("the child process has failed, and did not say why") from None
            raise RuntimeError("the child process has failed") from RuntimeError(f"{kind}: {message}\n{trace}")
        super().check_health(stale_after_s)
        if self._process is not None and not self._process.is_alive():
            raise RuntimeError(f"the child process has ended with exit code {self._process.exitcode}")
