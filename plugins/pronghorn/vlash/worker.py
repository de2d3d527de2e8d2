"""Where chunks are computed: at once, or in a thread beside the control loop."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from pronghorn.vlash.watchdog import PolicyError, StaleCommandError, VLASHError, WorkerDiedError

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 5.0
WAIT_SECONDS = 60.0
LOOKING_SECONDS = 0.1  # between looks whether what is waited for can still come


class Pending(Protocol):
    """A chunk that was asked for."""

    @property
    def seconds(self) -> float:
        """How long it took; of no meaning before it is done."""
        ...

    def done(self) -> bool:
        """Whether `result` would give it, or its error, without waiting."""
        ...

    def result(self) -> Tensor:
        """The chunk, waited for, but not without end. Raises what its computation raised."""
        ...

    def cancel(self) -> None:
        """Nobody wants it any more."""
        ...


class Executor(Protocol):
    """Computes chunks, one at a time."""

    def submit(self, compute: Callable[[], Tensor]) -> Pending:
        """Have a chunk computed."""
        ...


class Immediate:
    """Computes at once, in the caller's thread: for simulators, whose time stands still meanwhile."""

    def submit(self, compute: Callable[[], Tensor]) -> Pending:
        """Compute; raises what `compute` raises."""
        start = time.monotonic()
        chunk = compute()
        _finish(chunk)
        return _Done(chunk, time.monotonic() - start)


class _Done:
    def __init__(self, chunk: Tensor, seconds: float) -> None:
        self._chunk, self.seconds = chunk, seconds

    def done(self) -> bool:
        return True

    def result(self) -> Tensor:
        return self._chunk

    def cancel(self) -> None:
        """It is there already."""


class Worker:
    """One thread that computes chunks, so that the control loop never waits for one.

    On a GPU it has a stream of its own, which begins where the control thread's stream was when it asked; a chunk is
    given only when it is ready there. Modes that torch keeps for each thread, like autocast, are the policy's to set.
    Whatever the policy raises comes out where its chunk is taken; a thread that is gone nevertheless is noticed there,
    and replaced at the next request.

    Args:
        device: the CUDA device of that stream; by default the one that is current when the first chunk is asked for,
            if CUDA is in use by then.
        wait_s: seconds that a chunk is waited for where nothing else can be done; a policy may hang.
        stop: ends waiting too.

    Raises:
        ValueError: `wait_s` is not positive.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        wait_s: float = WAIT_SECONDS,
        stop: threading.Event | None = None,
    ) -> None:
        if not wait_s > 0:
            raise ValueError(f"wait_s: got {wait_s}, wanted a positive number of seconds")
        self.wait_s, self._stop = wait_s, stop
        self._device = None if device is None else torch.device(device)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._latest: _Job | None = None
        self._stream: torch.cuda.Stream | None = None
        self._closed = False

    def submit(self, compute: Callable[[], Tensor]) -> Pending:
        """Have a chunk computed, after one that was cancelled but still runs.

        Raises:
            VLASHError: it is closed, or a chunk is under way that was not cancelled.
        """
        if self._closed:
            raise VLASHError("the worker is closed: make a new one")
        if self._latest is not None and not (self._latest.done() or self._latest.cancelled):
            raise VLASHError("a chunk is under way: take or cancel it first")
        if self._thread is None or not self._thread.is_alive():
            self._jobs = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._run, args=(self._jobs,), name="vlash-policy", daemon=True)
            self._thread.start()
        self._latest = _Job(compute, self._thread, self._asking_stream(), self.wait_s, self._stop)
        self._jobs.put(self._latest)
        return self._latest

    def close(self) -> None:
        """End the thread, after the chunk that it computes; one that takes seconds is left behind, with a warning."""
        self._closed = True
        if self._latest is not None:
            self._latest.cancel()
        if self._thread is None or self._thread is threading.current_thread():
            return
        self._jobs.put(None)
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            logger.warning("The policy still computes after %.0f s; its thread is left behind.", CLOSING_SECONDS)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _asking_stream(self) -> torch.cuda.Stream | None:
        if self._device is None and torch.cuda.is_available() and torch.cuda.is_initialized():
            self._device = torch.device("cuda", torch.cuda.current_device())
        if self._device is None or self._device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return torch.cuda.current_stream(self._device)

    def _run(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        while (job := jobs.get()) is not None:
            if not job.cancelled:
                job.run(self._stream)


class _Job:
    """A request on its way through the thread."""

    def __init__(
        self,
        compute: Callable[[], Tensor],
        thread: threading.Thread,
        asking: torch.cuda.Stream | None,
        wait_s: float,
        stop: threading.Event | None,
    ) -> None:
        self._compute, self._asking = compute, asking
        self._wait_s, self._stop = wait_s, stop
        self._asked = None if asking is None else asking.record_event()
        self._thread, self._finished = thread, threading.Event()
        self._outcome: Tensor | BaseException | None = None
        self.cancelled, self._taken = False, False
        self.seconds = 0.0

    def done(self) -> bool:
        return self._finished.is_set() or not self._thread.is_alive()

    def result(self) -> Tensor:
        end = time.monotonic() + self._wait_s
        while not self._finished.wait(min(LOOKING_SECONDS, max(end - time.monotonic(), 0))) and self._thread.is_alive():
            if self._stop is not None and self._stop.is_set():
                raise VLASHError("the program is to end, so the chunk is not waited for any more")
            if time.monotonic() >= end:
                raise StaleCommandError(f"no chunk came within wait_s, {self._wait_s} s: nothing is sent now")
        self._taken = True
        if isinstance(self._outcome, Tensor):
            return self._outcome
        raise self._outcome or WorkerDiedError("the policy's thread has ended, and gave no chunk")

    def cancel(self) -> None:
        self.cancelled = True
        if self.done():
            self._tell_of_error()

    def _tell_of_error(self) -> None:
        """Nobody takes the result of a cancelled job, so an error would pass unseen."""
        if isinstance(self._outcome, BaseException) and not self._taken:
            logger.warning("A chunk that is no longer wanted had failed: %s", self._outcome)

    def run(self, stream: torch.cuda.Stream | None) -> None:
        """In the worker's thread."""
        start = time.monotonic()
        try:
            with self._on(stream):
                chunk = self._compute()
                _finish(chunk)
                if chunk.is_cuda and self._asking is not None and chunk.device == self._asking.device:
                    chunk.record_stream(self._asking)  # its memory waits for what the control thread does with it
                self._outcome = chunk
        except Exception as error:  # noqa: BLE001
            self._outcome = error
        except BaseException as error:  # noqa: BLE001
            self._outcome = PolicyError(f"the policy wanted to end its thread: {error!r}")
            self._outcome.__cause__ = error
        finally:
            self.seconds = time.monotonic() - start
            self._finished.set()
            if self.cancelled:
                self._tell_of_error()

    def _on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
        if stream is None or self._asked is None:
            return nullcontext()
        stream.wait_event(self._asked)
        return torch.cuda.stream(stream)


def _finish(chunk: Tensor) -> None:
    """Wait, in the thread that computed it, until a chunk is really there."""
    if chunk.is_cuda:
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(chunk.device))
        event.synchronize()
