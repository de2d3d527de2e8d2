"""A data set's batch as a robot would see it whose images are some steps old."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lerobot.utils.constants import ACTION
from torch import Tensor

from pronghorn.vlash.estimators import state_estimator
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.history import latest_state, with_latest_state
from pronghorn.vlash.lerobot.recorded_states import RecordedStates
from pronghorn.vlash.offsets import OffsetSamples, all_offsets, apply_offset, draw_offsets
from pronghorn.vlash.quantization import hold

PAD = "action_is_pad"


class DelayedBatch(NamedTuple):
    """A batch with one delay for each sample.

    Attributes:
        batch: in the robot's units; its actions, their padding and its latest state are those after the delay.
        delay: int64 [batch], control steps.
    """

    batch: dict[str, Any]
    delay: Tensor


class Delays:
    """Gives samples delays.

    The state after a delay is what `state_estimator` makes of the actions that were recorded meanwhile, as it will be
    when the policy runs.

    Args:
        config: of the policy.
        recorded: the data set's states, where they are to be taken instead.
    """

    def __init__(self, config: VLASHConfig, recorded: RecordedStates | None) -> None:
        self._indices = list(config.wrapped().action_delta_indices)
        self._recorded = recorded
        # Single actions add up to what merged ones do, whatever their number is.
        self._settings = replace(config.settings(), action_quant_ratio=1)
        self._estimate = state_estimator(self._settings)

    @property
    def knows_states(self) -> bool:
        """Whether states come from the data set."""
        return self._recorded is not None

    def draw(self, batch: dict[str, Any]) -> DelayedBatch:
        """Give each sample a delay, all as likely.

        Args:
            batch: with `action` [batch, H + D, action_dim]; the window says the largest delay, D.

        Raises:
            ValueError: the window is shorter than the chunk, or the estimator does not fit state and actions.
        """
        actions, is_pad, state, future = self._window(batch)
        horizon, past = len(self._indices), self._past
        delay = draw_offsets(len(actions), future.shape[1] - 1).to(actions.device)
        after = apply_offset(actions[:, past:], is_pad[:, past:], state, delay, horizon - past, future_states=future)
        if past:
            # Such a chunk begins with the oldest observation that the policy sees, and the state is the latest one's.
            rows = torch.arange(len(actions), device=actions.device)[:, None]
            columns = delay[:, None] + torch.arange(horizon, device=actions.device)
            actions, is_pad = actions[rows, columns], is_pad[rows, columns]
        else:
            actions, is_pad = after[:2]
        return DelayedBatch({**with_latest_state(batch, after[2]), ACTION: actions, PAD: is_pad}, delay)

    def all(self, batch: dict[str, Any]) -> OffsetSamples:
        """Every delay of every sample; arguments as in `draw`, for policies that see one observation."""
        actions, is_pad, state, future = self._window(batch)
        return all_offsets(actions, is_pad, state, len(self._indices), future_states=future)

    @property
    def _past(self) -> int:
        """Actions of the window before the sample's own step."""
        return -self._indices[0]

    def _window(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Actions, their padding, the measured state, and the states after each delay [batch, D + 1, state_dim]."""
        actions = batch[ACTION]
        is_pad = batch.get(PAD)
        if is_pad is None:
            is_pad = torch.zeros(actions.shape[:2], dtype=torch.bool, device=actions.device)
        state = latest_state(batch)
        delays = actions.shape[1] - len(self._indices) + 1
        if delays < 1:
            raise ValueError(f"action: got {actions.shape[1]} steps, wanted at least {len(self._indices)}")
        if self._recorded is not None:
            return actions, is_pad, state, self._recorded.after(batch["index"], delays).to(state)
        # What pads an episode repeats its last action, of which changes must not be added again.
        pending = torch.where(is_pad[..., None], hold(actions, self._settings), actions)[:, self._past :]
        states = [self._estimate(state, pending[:, :delay]) for delay in range(delays)]
        return actions, is_pad, state, torch.stack(states, dim=1)
