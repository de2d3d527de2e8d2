"""Training for a robot that has moved on: actions, and the state, are taken some steps after the images.

A sample at step t of an episode is drawn with a delay of 0 to D control steps. Images and text stay those of t. The
actions begin `delay` steps later, and the state is what the robot will have reached by then: the action before them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class OffsetSamples(NamedTuple):
    """Every delay of samples, N of them, in one tensor.

    Attributes:
        actions: [..., N, H, action_dim].
        is_pad: bool [..., N, H], actions after the episode's end.
        states: [..., N, state_dim].
        offset_mask: bool [..., N], False for a delay that the sample does not have.
    """

    actions: Tensor
    is_pad: Tensor
    states: Tensor
    offset_mask: Tensor


def draw_offset(max_delay_steps: int, rng: random.Random) -> int:
    """A delay for one sample: 0 to `max_delay_steps`, all as likely, wherever in its episode the sample is.

    Source: VLASH (arXiv 2512.01031), section 4.2, and the order in which the authors' data set draws.
    """
    return rng.randint(0, max_delay_steps)


def draw_offsets(count: int, max_delay_steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Delays for a batch: int64 [count], each 0 to `max_delay_steps`."""
    return torch.randint(0, max_delay_steps + 1, (count,), generator=generator)


def offset_indices(t: int, offset: int, begin: int, end: int, horizon: int) -> tuple[Tensor, Tensor]:
    """Which actions of a data set a sample at `t` is to predict, `offset` steps later.

    Args:
        t: the sample's row.
        offset: the delay in control steps.
        begin: the first row of its episode.
        end: the row after the episode's last.
        horizon: actions to predict (H).

    Returns:
        Rows, int64 [H], kept within the episode; and bool [H], whether a row was outside of it.

    Raises:
        ValueError: `t` is not of the episode or a count is negative.
    """
    _check_place(t, offset, begin, end)
    wanted = torch.arange(t + offset, t + offset + horizon)
    return wanted.clamp(begin, end - 1), (wanted < begin) | (wanted >= end)


def state_index(t: int, offset: int, begin: int, end: int, *, ground_truth: bool = False) -> int:
    """The row whose action (or, as `ground_truth`, whose state) stands for the state after `offset` steps.

    Without a delay it is `t`, and its state is taken.

    Raises:
        ValueError: `t` is not of the episode or the delay is negative.
    """
    _check_place(t, offset, begin, end)
    reached = t + offset if ground_truth or not offset else t + offset - 1
    return min(max(reached, begin), end - 1)


def proxy_state(measured: Tensor, action: Tensor, state_from_action: Sequence[int | None] | None = None) -> Tensor:
    """The state that an action leads to, in the raw units of the data set.

    Normalise it afterwards as a state, with the statistics of states.

    Args:
        measured: [..., state_dim].
        action: [..., action_dim], of goals, not of changes.
        state_from_action: for each coordinate of the state the action's coordinate that is its goal, or None where
            none is, which keeps what was measured. By default they are the same, one by one.

    Returns:
        [..., state_dim].

    Raises:
        ValueError: the sizes differ and nothing says which coordinate is which, or a coordinate does not exist.
    """
    size, actions = measured.shape[-1], action.shape[-1]
    if state_from_action is None:
        if size != actions:
            raise ValueError(
                f"action: got {actions} coordinates for a state of {size}, wanted as many, to stand for the state; "
                "set use_state_ground_truth, or state_from_action for the coordinates that actions move"
            )
        return action
    if len(state_from_action) != size or any(index is not None and index >= actions for index in state_from_action):
        raise ValueError(
            f"state_from_action: got {list(state_from_action)}, wanted {size} coordinates of an action of {actions}"
        )
    columns = [
        measured[..., own] if index is None else action[..., index] for own, index in enumerate(state_from_action)
    ]
    return torch.stack(columns, dim=-1)


def apply_offset(
    actions: Tensor, is_pad: Tensor, state: Tensor, offset: Tensor, horizon: int, *,
    state_from_action: Sequence[int | None] | None = None, future_states: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Cut each sample's actions and state out of a window that holds those of every delay.

    Args:
        actions: [batch, H + D, action_dim], from each sample's own step on, in raw units.
        is_pad: bool [batch, H + D], actions after the episode's end; they repeat its last.
        state: [batch, state_dim], measured at the sample's own step.
        offset: int64 [batch], 0 to D.
        horizon: actions to predict (H).
        state_from_action: of `proxy_state`.
        future_states: [batch, D + 1, state_dim], the recorded states; where given they are taken in place of actions.

    Returns:
        Actions [batch, H, action_dim], their padding [batch, H], and states [batch, state_dim].

    Raises:
        ValueError: shapes do not fit each other, or (on the CPU) a delay is not 0 to D.
    """
    delays = _check_window(actions, is_pad, state, horizon, future_states)
    if offset.shape != actions.shape[:1]:
        raise ValueError(f"offset: got shape {tuple(offset.shape)}, wanted ({len(actions)},)")
    if offset.device.type == "cpu" and offset.numel() and not 0 <= int(offset.min()) <= int(offset.max()) < delays:
        raise ValueError(f"offset: got {offset.tolist()}, wanted 0 to {delays - 1}")
    rows = torch.arange(len(actions), device=actions.device)
    columns = offset[:, None] + torch.arange(horizon, device=offset.device)
    if future_states is not None:
        state = future_states[rows, offset]
    elif delays > 1:
        moved = proxy_state(state, actions[rows, (offset - 1).clamp(min=0)], state_from_action)
        state = torch.where((offset > 0)[:, None], moved.to(state), state)
    return actions[rows[:, None], columns], is_pad[rows[:, None], columns], state


def all_offsets(
    actions: Tensor, is_pad: Tensor, state: Tensor, horizon: int, *,
    state_from_action: Sequence[int | None] | None = None, future_states: Tensor | None = None,
) -> OffsetSamples:  # fmt: skip
    """Every delay of every sample at once, N = D + 1 of them, for training over a shared observation.

    Args:
        actions: as in `apply_offset`, like all that follow.
        is_pad: bool [batch, H + D].
        state: [batch, state_dim].
        horizon: actions to predict (H).
        state_from_action: of `proxy_state`.
        future_states: [batch, D + 1, state_dim], or None.

    Returns:
        Delay k of a sample is what `apply_offset` gives for k.

    Raises:
        ValueError: shapes do not fit each other.
    """
    delays = _check_window(actions, is_pad, state, horizon, future_states)
    if future_states is None:
        future_states = state[:, None]
        if delays > 1:
            measured = future_states.expand(-1, delays - 1, -1)
            moved = proxy_state(measured, actions[:, : delays - 1], state_from_action)
            future_states = torch.cat([future_states, moved.to(state)], dim=1)
    return OffsetSamples(
        actions.unfold(1, horizon, 1).transpose(2, 3), is_pad.unfold(1, horizon, 1), future_states,
        torch.ones(len(actions), delays, dtype=torch.bool, device=actions.device),
    )  # fmt: skip


def collate(samples: Sequence[OffsetSamples]) -> OffsetSamples:
    """A batch of samples that have different numbers of delays: each is padded to the most, and `offset_mask` tells.

    Args:
        samples: without a batch dimension.

    Returns:
        With a batch dimension in front; what is padded is zero, and marked as padding.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("samples: got none, wanted at least one")
    most = max(len(sample.offset_mask) for sample in samples)

    def padded(part: Tensor, value: float = 0) -> Tensor:
        return F.pad(part, (0, 0) * (part.dim() - 1) + (0, most - len(part)), value=value)

    return OffsetSamples(
        torch.stack([padded(sample.actions) for sample in samples]),
        torch.stack([padded(sample.is_pad, True) for sample in samples]),
        torch.stack([padded(sample.states) for sample in samples]),
        torch.stack([padded(sample.offset_mask, False) for sample in samples]),
    )


def _check_place(t: int, offset: int, begin: int, end: int) -> None:
    if not begin <= t < end:
        raise ValueError(f"t: got {t}, wanted a row of the episode, {begin} to {end - 1}")
    if offset < 0:
        raise ValueError(f"offset: got {offset}, wanted at least 0")


def _check_window(actions: Tensor, is_pad: Tensor, state: Tensor, horizon: int, future_states: Tensor | None) -> int:
    """How many delays the window holds, 0 among them."""
    if actions.dim() != 3 or is_pad.shape != actions.shape[:2]:
        raise ValueError(
            f"actions, is_pad: got {tuple(actions.shape)} and {tuple(is_pad.shape)}, wanted [batch, H + D, action_dim] "
            "and [batch, H + D]"
        )
    if state.dim() != 2 or len(state) != len(actions):
        raise ValueError(f"state: got shape {tuple(state.shape)}, wanted ({len(actions)}, state_dim)")
    if not 1 <= horizon <= actions.shape[1]:
        raise ValueError(f"horizon: got {horizon}, wanted 1 to the window's {actions.shape[1]} actions")
    delays = actions.shape[1] - horizon + 1
    if future_states is not None and future_states.shape != (len(actions), delays, state.shape[-1]):
        wanted = (len(actions), delays, state.shape[-1])
        raise ValueError(f"future_states: got shape {tuple(future_states.shape)}, wanted {wanted}")
    return delays
