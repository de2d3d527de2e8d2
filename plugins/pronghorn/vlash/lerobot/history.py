"""The observations that a policy has seen of late, for those that take several at a time."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from lerobot.utils.constants import OBS_PREFIX, OBS_STATE
from torch import Tensor

STACKED = 3  # dimensions of states that are stacked


class ObservationHistory:
    """Keeps the latest observations.

    Args:
        steps: how many the policy takes, stacked along a dimension after the batch's; 0 for one without that dimension.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._seen: deque[dict[str, Any]] = deque(maxlen=max(steps, 1))

    def reset(self) -> None:
        """A new episode: what was seen is forgotten."""
        self._seen.clear()

    def add(self, batch: dict[str, Any]) -> None:
        """One more; the first of an episode fills the history."""
        self._seen.extend([batch] * (self._seen.maxlen if not self._seen else 1))  # type: ignore[operator]

    def batch(self) -> dict[str, Any]:
        """What the policy takes: the latest batch, its observations with those before them.

        Returns:
            Tensors of observations are [batch, steps, ...], the oldest first.
        """
        latest = dict(self._seen[-1])
        if not self._steps:
            return latest
        for name, value in latest.items():
            if name.startswith(OBS_PREFIX) and isinstance(value, Tensor):
                latest[name] = torch.stack([batch[name] for batch in self._seen], dim=1)
        return latest


def latest_state(batch: dict[str, Any]) -> Tensor:
    """[batch, state_dim], what was measured last in a batch of one observation or of several."""
    state: Tensor = batch[OBS_STATE]
    return state[:, -1] if state.dim() == STACKED else state


def with_latest_state(batch: dict[str, Any], state: Tensor) -> dict[str, Any]:
    """The batch as if that state had been measured last; those before it stay.

    Args:
        batch: as `ObservationHistory.batch` gives it, or a data set.
        state: [batch, state_dim].
    """
    measured = batch[OBS_STATE]
    if measured.dim() == STACKED:
        state = torch.cat([measured[:, :-1], state[:, None].to(measured)], dim=1)
    return {**batch, OBS_STATE: state}
