"""Actions that are changes and actions that are goals: what several come to as one, and what holds a robot still."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.vlash.config import SUM_DELTA, VLASHSettings


def is_delta(settings: VLASHSettings, action_dim: int) -> list[bool]:
    """Which of an action's coordinates are changes; the others are goals.

    Where `delta_dims` is None, `state_estimator="sum_delta"` means all of them, any other none.

    Raises:
        ValueError: `delta_dims` names a coordinate that actions do not have.
    """
    if settings.delta_dims is None:
        return [settings.state_estimator == SUM_DELTA] * action_dim
    if any(dim >= action_dim for dim in settings.delta_dims):
        raise ValueError(f"delta_dims: got {settings.delta_dims}, wanted coordinates below action_dim, {action_dim}")
    return [dim in settings.delta_dims for dim in range(action_dim)]


def merge(actions: Tensor, settings: VLASHSettings) -> Tensor:
    """One action that does what several do: changes are added up, of goals (a gripper's too) the last one stays.

    `legacy_sum` adds up every coordinate instead.

    Args:
        actions: [..., steps, action_dim], at least one step.
        settings: its `delta_dims` and `legacy_sum`.

    Returns:
        [..., action_dim].

    Raises:
        ValueError: `actions` has another shape, or `delta_dims` does not fit it.
    """
    if actions.dim() < 2 or not actions.shape[-2]:
        raise ValueError(f"actions: got {list(actions.shape)}, wanted [..., steps, action_dim], at least one step")
    deltas = [True] * actions.shape[-1] if settings.legacy_sum else is_delta(settings, actions.shape[-1])
    if not any(deltas):
        return actions[..., -1, :]
    return torch.where(torch.tensor(deltas, device=actions.device), actions.sum(-2), actions[..., -1, :])


def merge_chunk(chunk: Tensor, settings: VLASHSettings) -> Tensor:
    """Every `action_quant_ratio` actions of a chunk as one.

    Args:
        chunk: [..., steps, action_dim].
        settings: its `action_quant_ratio`, and what `merge` takes.

    Returns:
        [..., steps / action_quant_ratio, action_dim].

    Raises:
        ValueError: the steps are no multiple of `action_quant_ratio`.
    """
    ratio = settings.action_quant_ratio
    if chunk.dim() < 2 or chunk.shape[-2] % ratio:
        raise ValueError(
            f"chunk: got {list(chunk.shape)}, wanted [..., steps, action_dim] with steps a multiple of "
            f"action_quant_ratio, {ratio}"
        )
    return chunk if ratio == 1 else merge(chunk.unflatten(-2, (-1, ratio)), settings)


def is_sent(tick: int, settings: VLASHSettings) -> bool:
    """Whether a command is sent in this tick, counted from 0: with the last one of every `action_quant_ratio`."""
    return (tick + 1) % settings.action_quant_ratio == 0


def hold(action: Tensor, settings: VLASHSettings) -> Tensor:
    """The action that keeps a robot where `action` has brought it: no change, the same goals.

    Args:
        action: [..., action_dim].
        settings: its `delta_dims`.

    Raises:
        ValueError: `delta_dims` does not fit it.
    """
    deltas = is_delta(settings, action.shape[-1])
    return action.masked_fill(torch.tensor(deltas, device=action.device), 0) if any(deltas) else action


def clip(actions: Tensor, settings: VLASHSettings) -> Tensor:
    """Actions within the robot's limits.

    Args:
        actions: [..., action_dim].
        settings: its `action_low` and `action_high`.

    Raises:
        ValueError: there are not as many limits as coordinates.
    """
    for name, limit in (("action_low", torch.maximum), ("action_high", torch.minimum)):
        values = getattr(settings, name)
        if values is None:
            continue
        if len(values) != actions.shape[-1]:
            raise ValueError(f"{name}: got {len(values)} values, wanted action_dim, {actions.shape[-1]}")
        actions = limit(actions, torch.tensor(values, dtype=actions.dtype, device=actions.device))
    return actions
