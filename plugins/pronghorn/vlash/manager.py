"""The tick machine: which action comes next, and when the next chunk is asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.vlash.chunks import ChunkRequest, Observation, Policy
from pronghorn.vlash.config import AUTO, CONTINUE, NAIVE, RTC, RTC_FULL, SYNC, VLASH, VLASHSettings
from pronghorn.vlash.estimators import StateEstimator, state_estimator
from pronghorn.vlash.latency import LatencyTracker, overlap_for
from pronghorn.vlash.quantization import clip, hold, is_sent, merge
from pronghorn.vlash.watchdog import (
    NeedsResetError,
    PolicyError,
    StaleWatchdog,
    VLASHError,
    check_chunk,
    check_command,
    check_state,
)
from pronghorn.vlash.worker import Executor, Immediate, Pending

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tick:
    """What one tick gives.

    Attributes:
        action: [..., action_dim]: the command, where one is sent (with `action_quant_ratio`, merged of all actions
            since the last one; within `action_low` and `action_high`); else the action that this tick adds to the next
            command.
        send: whether the robot gets it.
        fetched: whether an observation was read.
        first: whether it begins a chunk.
        late: whether it stands in for a chunk that is not there yet.
        chunk: the number of the chunk that it is of, from 0.
        index: which action of its chunk it is, from 0; beyond the chunk's last entry where the robot holds.
        observation: the number, from 0, of the observation that the chunk was computed from.
    """

    action: Tensor
    send: bool
    fetched: bool
    first: bool
    late: bool
    chunk: int
    index: int
    observation: int


@dataclass
class Counts:
    """What has happened since the manager was made.

    Attributes:
        ticks: actions given.
        commands: of these, sent.
        observations: read.
        chunks: chunks begun.
        stalls: chunks that were waited for because nothing ran.
        stall_seconds: how long.
        late_chunks: chunks that were not there when they were due.
        late_ticks: actions given in their place.
    """

    ticks: int = 0
    commands: int = 0
    observations: int = 0
    chunks: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    late_chunks: int = 0
    late_ticks: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class _Running:
    """A chunk that is executed from its entry `start` on; `index` counts from there, past K while the next is late."""

    actions: Tensor
    start: int
    number: int
    observation: int
    overlap: int
    index: int = 0


@dataclass
class _Asked:
    """A chunk that was asked for, from that observation, to be used `delay` ticks later."""

    pending: Pending
    observation: int
    delay: int


@dataclass
class _Eyes:
    """Reads the observation, once a tick and only if it is needed."""

    observe: Callable[[], Observation]
    counts: Counts
    seen: Observation | None = None

    def look(self) -> Observation:
        if self.seen is None:
            self.seen = self.observe()
            self.counts.observations += 1
            check_state(self.seen.state, "state")
        return self.seen


class RollForwardManager:
    """Runs chunks one after the other and asks for each while the one before still runs.

    With K = `n_action_steps` and an overlap of d actions (`inference_overlap_steps` times `action_quant_ratio`, at most
    K), the next chunk is asked for at action K - d. `vlash` asks for the state that the robot will have after the
    pending d actions and uses the chunk from its first entry; `naive`, `rtc` and `rtc_full` ask for the measured state
    and leave out the first d entries; `sync` is d = 0. A chunk that is late is replaced by what `late_chunk` says, and
    begins with a control period; those that leave out entries then leave out more, as long as K remain.

    After a `VLASHError` every tick raises until `reset()`.

    Args:
        settings: how chunks follow each other.
        policy: gives chunks.
        estimator: (state, pending actions) -> state; by default the one that `settings` names.
        executor: where the policy runs; by default at once, in this thread.
        clock: seconds, monotonic.

    Source: VLASH (arXiv 2512.01031), section on inference; the official `VLASHAsyncManager`, tick for tick.
    """

    def __init__(
        self,
        settings: VLASHSettings,
        policy: Policy,
        estimator: StateEstimator | None = None,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.policy = settings, policy
        self.estimator = estimator or state_estimator(settings)
        self.executor: Executor = executor or Immediate()
        self.latency = LatencyTracker()
        self.counts = Counts()
        self._clock = clock
        self._watchdog = StaleWatchdog(settings.stale_after_s, clock)
        self._skips = settings.async_mode in (NAIVE, RTC, RTC_FULL)
        self._asked: _Asked | None = None
        self._warned = False
        self.reset()

    def reset(self) -> None:
        """A new episode: nothing of the old one comes any more, and an error is forgotten. `counts` go on."""
        if self._asked is not None:
            self._asked.pending.cancel()
        self._asked = None
        self._running: _Running | None = None
        self._group: list[Tensor] = []
        self._tick = 0
        self._failure: VLASHError | None = None
        self._watchdog.came()

    @property
    def overlap(self) -> int:
        """Actions before the running chunk's end at which the next one is asked for (d)."""
        return self._overlap() if self._running is None else self._running.overlap

    def tick(self, observe: Callable[[], Observation]) -> Tick:
        """The next action.

        Args:
            observe: reads cameras and state; called only in ticks that need it.

        Raises:
            PolicyError: the policy raised.
            InvalidChunkError: it gave no chunk that can be executed.
            InvalidStateError: the state that was measured, or that the estimator gave, is not finite.
            StaleCommandError: a chunk is too late.
            WorkerDiedError: the executor's thread is gone.
            NeedsResetError: one of these was raised before.
            ValueError: the estimator does not fit the state or the actions.
        """
        if self._failure is not None:
            raise NeedsResetError("there was an error: reset() before the next tick") from self._failure
        try:
            return self._next(_Eyes(observe, self.counts))
        except VLASHError as error:
            self._failure = error
            raise

    def _next(self, eyes: _Eyes) -> Tick:
        steps = self.settings.n_action_steps
        if self._running is not None and self._running.index >= steps:
            self._switch(self._running)
        running = self._running or self._bootstrap(eyes)
        if running.overlap and running.index == steps - running.overlap:
            self._ask_ahead(running, eyes)
        action, index = self._pick(running), running.index
        running.index += 1
        action, send = self._merged(action)
        late = index >= steps
        self.counts.ticks += 1
        self.counts.commands += send
        self.counts.late_ticks += late
        return Tick(
            action, send, eyes.seen is not None, index == 0, late, running.number, running.start + index,
            running.observation,
        )  # fmt: skip

    def _switch(self, ended: _Running) -> None:
        """To the next chunk, to none if none was asked for, or not yet if it is late."""
        if self._asked is None:
            self._running = None
            return
        late = ended.index - self.settings.n_action_steps
        if self._asked.pending.done() and (not late or self._tick % self.settings.action_quant_ratio == 0):
            self._begin(self._asked, late)
            return
        self.counts.late_chunks += not late
        if not self._warned:
            self._warned = True
            logger.warning(
                "A chunk is late, asked for %d actions ahead: late_chunk=%r is done until it comes. A larger "
                "inference_overlap_steps, or 'auto', avoids that; further late chunks are only counted.",
                self._asked.delay, self.settings.late_chunk,
            )  # fmt: skip
        self._watchdog.missed()

    def _begin(self, asked: _Asked, late: int = 0) -> _Running:
        chunk = asked.pending.result()
        self._asked = None
        self._watchdog.came()
        self.latency.add(asked.pending.seconds)
        start = min(asked.delay + late, chunk.shape[-2] - self.settings.n_action_steps) if self._skips else 0
        self._running = _Running(chunk, start, self.counts.chunks, asked.observation, self._overlap())
        self.counts.chunks += 1
        return self._running

    def _bootstrap(self, eyes: _Eyes) -> _Running:
        observation = eyes.look()
        start = self._clock()
        self._asked = self._ask(ChunkRequest(observation, observation.state))
        running = self._begin(self._asked)
        self.counts.stalls += 1
        self.counts.stall_seconds += max(self._clock() - start, 0.0)
        return running

    def _ask_ahead(self, running: _Running, eyes: _Eyes) -> None:
        observation = eyes.look()
        here = running.start + running.index
        state = observation.state
        if self.settings.async_mode == VLASH:
            state = self.estimator(state, running.actions[..., here : here + running.overlap, :])
            if state.shape != observation.state.shape:
                raise ValueError(
                    f"estimator: got a state of {list(state.shape)} from it, wanted {list(observation.state.shape)}"
                )
            check_state(state, "estimator")
        leftover = running.actions[..., here:, :]
        self._asked = self._ask(ChunkRequest(observation, state, running.overlap, leftover))

    def _ask(self, request: ChunkRequest) -> _Asked:
        batch = request.state.shape[:-1]
        steps = self.settings.n_action_steps + (request.delay if self._skips else 0)

        def compute() -> Tensor:
            try:
                with torch.no_grad():
                    chunk = self.policy(request)
            except VLASHError:
                raise
            except Exception as error:
                raise PolicyError(f"the policy failed: {error!r}") from error
            return check_chunk(chunk, batch, steps)

        return _Asked(self.executor.submit(compute), self.counts.observations - 1, request.delay)

    def _overlap(self) -> int:
        """For the chunk that begins now."""
        settings, overlap = self.settings, self.settings.inference_overlap_steps
        most = settings.n_action_steps
        if settings.async_mode == SYNC:
            return 0
        if overlap == AUTO:
            latency = self.latency.p95
            overlap = most if latency is None else overlap_for(latency, settings.fps, most)
            if self._skips:
                most = min(most, settings.chunk_size - most)
        return min(int(overlap) * settings.action_quant_ratio, most)

    def _pick(self, running: _Running) -> Tensor:
        """The running chunk's action, or what stands in for the next chunk's."""
        position, planned = running.start + running.index, running.start + self.settings.n_action_steps
        usable = running.actions.shape[-2] if self.settings.late_chunk == CONTINUE else planned
        if position < usable:
            return running.actions[..., position, :]
        return hold(running.actions[..., usable - 1, :], self.settings)

    def _merged(self, action: Tensor) -> tuple[Tensor, bool]:
        """The command, if one is due in this tick, else the action as it is."""
        self._group.append(action)
        send = is_sent(self._tick, self.settings)
        self._tick += 1
        if send:
            if len(self._group) > 1:
                action = merge(torch.stack(self._group, -2), self.settings)
            action = clip(action, self.settings)
            if len(self._group) > 1:
                check_command(action)  # what is finite may add up to what is not
            self._group = []
        return action, send
