"""One command a control period: the manager, with the policy in a thread beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType

from torch import Tensor

from pronghorn.vlash.chunks import Observation, Policy
from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.estimators import StateEstimator
from pronghorn.vlash.manager import Counts, RollForwardManager, Tick
from pronghorn.vlash.worker import WAIT_SECONDS, Worker


@dataclass
class RunnerStatistics(Counts):
    """What has happened since the runner was made: its counts, and the policy's latest latencies.

    Attributes:
        latency_p50: seconds that half of the latest chunks took at most; None before the first.
        latency_p95: the same for 95 %.
        latency_max: the longest of them.
        overlap: actions before the running chunk's end at which the next one is asked for.
    """

    latency_p50: float | None = None
    latency_p95: float | None = None
    latency_max: float | None = None
    overlap: int = 0


class AsyncRunner:
    """Controls one robot, or a batch in lock step, with a policy that is slower than the control loop.

        with AsyncRunner(policy, VLASHSettings(n_action_steps=32, inference_overlap_steps="auto")) as runner:
            control_loop(runner, robot.observe, robot.act, fps=30, steps=900)

    Args:
        policy: gives chunks; called in a thread of its own.
        settings: how chunks follow each other.
        estimator: (state, pending actions) -> state; by default the one that `settings` names.
        threaded: False computes each chunk at once in the caller's thread, which then waits for it.
        clock: seconds, monotonic.
        wait_s: seconds that a chunk is waited for where nothing runs: at an episode's start, and with an overlap of 0;
            then there is a `StaleCommandError`. Of no effect where it is not `threaded`.
        stop: ends waiting too.

    Raises:
        TypeError: `settings` are none.
        ValueError: `wait_s` is not positive.
    """

    def __init__(
        self,
        policy: Policy,
        settings: VLASHSettings,
        estimator: StateEstimator | None = None,
        threaded: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wait_s: float = WAIT_SECONDS,
        stop: threading.Event | None = None,
    ) -> None:
        if not isinstance(settings, VLASHSettings):
            raise TypeError(f"settings: got {type(settings).__name__}, wanted VLASHSettings")
        self.worker = Worker(wait_s=wait_s, stop=stop) if threaded else None
        self.manager = RollForwardManager(settings, policy, estimator, self.worker, clock)

    def step(self, observation: Observation | Callable[[], Observation]) -> Tensor:
        """The command of one control period; `action_quant_ratio` actions of the policy are used up.

        It waits for the policy only where nothing runs: at the start of an episode, and with an overlap of 0.

        Args:
            observation: what is seen now, or what reads it, called only if it is needed.

        Returns:
            [..., action_dim].

        Raises:
            VLASHError, ValueError: as of `RollForwardManager.tick`.
            TypeError: `observation` is neither.
        """
        if isinstance(observation, Observation):
            return self.tick(lambda: observation).action
        if not callable(observation):
            raise TypeError(
                f"observation: got {type(observation).__name__}, wanted an Observation, or a function that gives one"
            )
        return self.tick(observation).action

    def tick(self, observe: Callable[[], Observation]) -> Tick:
        """The same as `step`, with what the manager tells of the command."""
        tick = self.manager.tick(observe)
        while not tick.send:
            tick = self.manager.tick(observe)
        return tick

    def reset(self) -> None:
        """A new episode: nothing of the old one is given any more, and an error is forgotten."""
        self.manager.reset()

    def statistics(self) -> RunnerStatistics:
        """As of now."""
        latency = self.manager.latency
        return RunnerStatistics(
            **asdict(self.manager.counts), latency_p50=latency.p50, latency_p95=latency.p95, latency_max=latency.max,
            overlap=self.manager.overlap,
        )  # fmt: skip

    def close(self) -> None:
        """End the policy's thread."""
        self.manager.reset()
        if self.worker is not None:
            self.worker.close()

    def __enter__(self) -> AsyncRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
