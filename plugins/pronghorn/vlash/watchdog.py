"""What must never reach a robot, and the errors that keep it away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class VLASHError(RuntimeError):
    """Something went wrong while a robot was controlled; nothing is emitted after it until `reset()`."""


class PolicyError(VLASHError):
    """The policy raised; its exception is the cause."""


class WorkerDiedError(VLASHError):
    """The thread in which the policy ran is gone."""


class InvalidChunkError(VLASHError):
    """The policy gave something that cannot be executed."""


class InvalidStateError(VLASHError):
    """The state that was measured, or estimated, is not finite: nothing is asked for from there."""


class StaleCommandError(VLASHError):
    """The next chunk is later than `stale_after_s` allows."""


class NeedsResetError(VLASHError):
    """There was an error, which is the cause, and no `reset()` since."""


def check_chunk(chunk: Tensor, batch: torch.Size, steps: int) -> Tensor:
    """Give a chunk back that can be executed.

    Args:
        chunk: [*batch, at least `steps`, action_dim], what a policy gave.
        batch: the leading dimensions of the state that it was asked for.
        steps: how many actions may be used.

    Raises:
        InvalidChunkError: it is no tensor, has another shape, or holds NaN or infinity.
    """
    if not isinstance(chunk, Tensor):
        raise InvalidChunkError(f"chunk: got {type(chunk).__name__}, wanted a Tensor")
    if not chunk.is_floating_point():
        raise InvalidChunkError(f"chunk: got {chunk.dtype}, wanted floating-point numbers")
    if chunk.dim() < 2 or chunk.shape[:-2] != batch or chunk.shape[-2] < steps or not chunk.shape[-1]:
        wanted = ", ".join([*map(str, batch), f"at least {steps}", "action_dim"])
        raise InvalidChunkError(f"chunk: got {list(chunk.shape)}, wanted [{wanted}]")
    return _finite(chunk, "chunk", InvalidChunkError)


def check_command(action: Tensor) -> Tensor:
    """Give back a command, [..., action_dim], merged of several actions.

    Raises:
        InvalidChunkError: their sum is NaN or infinity.
    """
    return _finite(action, "command", InvalidChunkError)


def check_state(state: Tensor, source: str) -> Tensor:
    """Give back a state, [..., state_dim], that a chunk can be asked for from.

    Args:
        state: measured or estimated.
        source: where it comes from, for the error.

    Raises:
        InvalidStateError: it holds NaN or infinity.
    """
    return _finite(state, source, InvalidStateError)


def _finite(values: Tensor, name: str, error: type[VLASHError]) -> Tensor:
    finite = values.isfinite()
    if not finite.all():
        first = (~finite).nonzero()[0].tolist()
        raise error(
            f"{name}: got {int((~finite).sum())} values of {values.numel()} that are NaN or infinity, the first at "
            f"{first}, wanted finite numbers"
        )
    return values


class StaleWatchdog:
    """Counts the time since a chunk was first missed.

    Args:
        stale_after_s: seconds that are borne.
        clock: seconds, monotonic.
    """

    def __init__(self, stale_after_s: float, clock: Callable[[], float]) -> None:
        self._limit, self._clock = stale_after_s, clock
        self._since: float | None = None

    def missed(self) -> None:
        """The chunk is not there.

        Raises:
            StaleCommandError: it has been missed for longer than `stale_after_s`.
        """
        now = self._clock()
        if self._since is None or now < self._since:  # a clock that was set back starts anew
            self._since = now
        if now - self._since > self._limit:
            raise StaleCommandError(
                f"the next chunk is {now - self._since:.3f} s late, stale_after_s is {self._limit}: nothing is sent now"
            )

    def came(self) -> None:
        """The chunk is there, or nobody waits for it any more."""
        self._since = None
