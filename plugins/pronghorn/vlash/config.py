"""Every knob of VLASH, its default and where it comes from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pronghorn.configuration import from_values

SYNC, NAIVE, RTC, RTC_FULL, VLASH = "sync", "naive", "rtc", "rtc_full", "vlash"
LAST_ACTION, SUM_DELTA, DELTA_MASKED, MEASURED = "last_action", "sum_delta", "delta_masked", "measured"
HOLD, CONTINUE = "hold", "continue"
AUTO = "auto"

CHOICES = {
    "async_mode": (SYNC, NAIVE, RTC, RTC_FULL, VLASH),
    "state_estimator": (LAST_ACTION, SUM_DELTA, DELTA_MASKED, MEASURED),
    "late_chunk": (HOLD, CONTINUE),
}
SWITCHES = ("legacy_sum", "shared_observation", "use_state_ground_truth", "state_cond", "delay_conditioning")
COUNTS = {"chunk_size": 1, "n_action_steps": 1, "action_quant_ratio": 1, "max_delay_steps": 0}
SECONDS = ("fps", "stale_after_s")


@dataclass
class VLASHSettings:
    """How chunks of actions follow each other on a robot, and how a policy is trained for that.

    Attributes:
        async_mode: how the next chunk is asked for while one runs: "vlash" (for the state that the robot will have
            then), "naive" (for the state it has now), "rtc" and "rtc_full" (naive, guided to agree with what runs: with
            the identity, or the network's own, in place of the Jacobian), or "sync" (only when the chunk has ended).
        chunk_size: actions that the policy predicts (H).
        n_action_steps: actions of a chunk that are executed (K).
        inference_overlap_steps: actions before a chunk's end at which the next is asked for (d), 0 to
            `n_action_steps`; "auto" takes what the measured latency needs.
        action_quant_ratio: actions that are merged into one (q).
        delta_dims: the actions' coordinates that are changes rather than goals; others are goals. None: all of them
            with `state_estimator="sum_delta"`, none with any other.
        legacy_sum: whether merging sums every coordinate, as the authors' LIBERO evaluation does, grippers included.
        state_estimator: the state a chunk is asked for: "last_action" of the running chunk, "sum_delta" (measured plus
            the pending changes), "delta_masked" (each coordinate of the state as `state_from_action` says), or
            "measured" (no estimate).
        state_from_action: for each coordinate of the state, the action's coordinate that moves it, or None where none
            does and it stays as measured.
        action_low: the least value of each coordinate of a command that the robot gets, -inf for none; None for no
            limits.
        action_high: the greatest value, likewise.
        late_chunk: what is done until a chunk arrives that is late: "hold" the last goal (no change, where actions are
            changes), or "continue" with the rest of the old chunk, then hold.
        stale_after_s: seconds a chunk may be late before `StaleCommandError`.
        fps: control steps per second. Where it was left as it is, training with LeRobot takes the data set's.
        max_delay_steps: the largest delay trained for, in control steps (D).
        shared_observation: train all delays of a sample in one pass over its observation.
        use_state_ground_truth: train with the state that was recorded δ steps later, not the action before it.
        state_cond: pi0.5 sees the state through its adaptive norms (a projection that starts at zero) and not in words.
        delay_conditioning: the policy is told the delay too.

    Raises:
        ValueError, TypeError: a value is not one of those, or has no meaning beside another.

    Source: VLASH: Real-Time VLAs via Future-State-Aware Asynchronous Inference (arXiv 2512.01031).
    """

    async_mode: str = VLASH
    chunk_size: int = 50
    n_action_steps: int = 32
    inference_overlap_steps: int | str = 4
    action_quant_ratio: int = 1
    delta_dims: list[int] | None = None
    legacy_sum: bool = False
    state_estimator: str = LAST_ACTION
    state_from_action: list[int | None] | None = None
    action_low: list[float] | None = None
    action_high: list[float] | None = None
    late_chunk: str = HOLD
    stale_after_s: float = 1.0
    fps: float = 30.0
    max_delay_steps: int = 8
    shared_observation: bool = False
    use_state_ground_truth: bool = False
    state_cond: bool = False
    delay_conditioning: bool = False

    def __post_init__(self) -> None:
        for name, accepted in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in accepted:
                raise ValueError(f"{name}: got {value!r}, accepted are {', '.join(accepted)}")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted True or False")
        for name, least in COUNTS.items():
            if not _is_integer(getattr(self, name), least):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted an integer of at least {least}")
        for name in SECONDS:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value!r}, wanted a positive number")
        self._check_overlap()
        self._check_coordinates()

    def _check_overlap(self) -> None:
        overlap, steps = self.inference_overlap_steps, self.n_action_steps
        if steps > self.chunk_size:
            raise ValueError(f"n_action_steps: got {steps}, wanted at most chunk_size, {self.chunk_size}")
        skips = self.async_mode in (NAIVE, RTC, RTC_FULL)
        if overlap == AUTO and self.async_mode != SYNC:
            if skips and steps == self.chunk_size:
                raise ValueError(
                    f"n_action_steps: got {steps} with async_mode={self.async_mode!r}, which leaves out actions of a "
                    f"chunk, wanted less than chunk_size, {self.chunk_size}"
                )
            return
        if not _is_integer(overlap, 0) or int(overlap) > steps:
            raise ValueError(
                f"inference_overlap_steps: got {overlap!r}, wanted 0 to n_action_steps, {steps}, or 'auto'"
            )
        skipped = min(int(overlap) * self.action_quant_ratio, steps) if skips else 0
        if steps + skipped > self.chunk_size:
            raise ValueError(
                f"inference_overlap_steps: got {overlap} with async_mode={self.async_mode!r}, which leaves out "
                f"{skipped} actions of a chunk; n_action_steps, {steps}, and they may be chunk_size, "
                f"{self.chunk_size}, together"
            )

    def _check_coordinates(self) -> None:
        for name in ("delta_dims", "state_from_action"):
            value = getattr(self, name)
            allowed = (int, type(None)) if name == "state_from_action" else (int,)
            if value is not None and not (
                isinstance(value, list | tuple)
                and all(isinstance(item, allowed) and not isinstance(item, bool) and (item or 0) >= 0 for item in value)
            ):
                raise TypeError(f"{name}: got {value!r}, wanted a list of coordinates, or None")
        for name in ("action_low", "action_high"):
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value)
            ):
                raise TypeError(f"{name}: got {value!r}, wanted a list of numbers, or None")
            nowhere = -math.inf if name == "action_high" else math.inf
            if any(math.isnan(item) or item == nowhere for item in value or ()):
                raise ValueError(f"{name}: got {value!r}, which no command keeps to, wanted numbers")
        low, high = self.action_low, self.action_high
        if low is not None and high is not None and any(least > most for least, most in zip(low, high, strict=False)):
            raise ValueError(f"action_low, action_high: got {low} and {high}, wanted none above the other's")
        if self.state_estimator == DELTA_MASKED and self.state_from_action is None:
            raise ValueError("state_from_action: got None, which state_estimator='delta_masked' needs")
        steps, ratio = self.n_action_steps, self.action_quant_ratio
        changes = self.delta_dims or self.legacy_sum or (self.state_estimator == SUM_DELTA and self.delta_dims is None)
        if changes and steps % ratio:
            raise ValueError(
                f"action_quant_ratio: got {ratio}, wanted a divisor of n_action_steps, {steps}: changes are summed "
                "within a chunk"
            )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VLASHSettings:
        """From what `to_dict` gave.

        Raises:
            ValueError, TypeError: there are other names, or values that are none.
        """
        return from_values(cls, values)


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
