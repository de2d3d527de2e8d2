"""What passes between a control loop and a policy: observations in, chunks of actions out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What was seen at one moment.

    Attributes:
        content: images, text and whatever else the policy takes; only the policy looks at it.
        state: floating-point [..., state_dim], what was measured of the robot then.

    Raises:
        TypeError: `state` is something else.
    """

    content: Any
    state: Tensor

    def __post_init__(self) -> None:
        # Estimates and actions take its dtype: whole numbers would cut them off.
        if not isinstance(self.state, Tensor) or not self.state.is_floating_point():
            got = self.state.dtype if isinstance(self.state, Tensor) else type(self.state).__name__
            raise TypeError(f"state: got {got}, wanted a Tensor of floating-point numbers")


@dataclass(frozen=True)
class ChunkRequest:
    """What a policy is asked: one chunk of actions.

    Attributes:
        observation: what was seen when the request was made.
        state: [..., state_dim], the state that the policy is to act from: measured, or what it will be.
        delay: control steps from the observation until the chunk is used.
        leftover: [..., steps, action_dim], the running chunk's actions from the observation on, as many as it has;
            None when nothing runs. The first `delay` will have been executed before the new chunk is used.
    """

    observation: Observation
    state: Tensor
    delay: int = 0
    leftover: Tensor | None = None


Policy = Callable[[ChunkRequest], Tensor]
"""Gives [..., chunk_size, action_dim] for a request."""
