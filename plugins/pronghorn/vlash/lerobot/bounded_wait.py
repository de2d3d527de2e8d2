"""Waiting for a chunk that may never come, in a control loop that must be able to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event

from torch import Tensor

from pronghorn.vlash.watchdog import StaleCommandError, VLASHError
from pronghorn.vlash.worker import Executor, Pending

LOOKING_SECONDS = 0.001


class BoundedExecutor:
    """Computes chunks by another executor, but does not wait for them without end.

    Args:
        inner: computes them.
        seconds: that a chunk is waited for where nothing else can be done.
        stop: ends waiting too.
    """

    def __init__(self, inner: Executor, seconds: float, stop: Event | None = None) -> None:
        self.seconds = seconds
        self._inner, self._stop = inner, stop

    def submit(self, compute: Callable[[], Tensor]) -> Pending:
        """Have a chunk computed."""
        return _Bounded(self._inner.submit(compute), self.seconds, self._stop)


class _Bounded:
    def __init__(self, inner: Pending, limit: float, stop: Event | None) -> None:
        self._inner, self._limit, self._stop = inner, limit, stop

    @property
    def seconds(self) -> float:
        return self._inner.seconds

    def done(self) -> bool:
        return self._inner.done()

    def result(self) -> Tensor:
        end = time.monotonic() + self._limit
        while not self._inner.done():
            if self._stop is not None and self._stop.is_set():
                raise VLASHError("the program is to end, so the chunk is not waited for any more")
            if time.monotonic() > end:
                raise StaleCommandError(f"no chunk came within {self._limit} s: nothing is sent now")
            time.sleep(LOOKING_SECONDS)
        return self._inner.result()

    def cancel(self) -> None:
        self._inner.cancel()
