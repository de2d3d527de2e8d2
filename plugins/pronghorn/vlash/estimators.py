"""The state that a robot will be in when the next chunk begins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pronghorn.vlash.config import DELTA_MASKED, LAST_ACTION, MEASURED, SUM_DELTA, VLASHSettings
from pronghorn.vlash.quantization import clip, is_delta, merge_chunk

StateEstimator = Callable[[Tensor, Tensor], Tensor]
"""(state [..., state_dim] as measured, pending [..., delay, action_dim]) -> [..., state_dim], after those actions."""


def state_estimator(settings: VLASHSettings) -> StateEstimator:
    """The estimator that `settings.state_estimator` names.

    A coordinate of the state that goals move is where the last pending goal is; one that changes move is the measured
    one plus the pending changes; others stay as measured. Goals and changes count as the robot takes them: merged by
    `action_quant_ratio`, then clipped to `action_low` and `action_high`.

    - "last_action": all coordinates of the state follow the goals of the same coordinates of the action.
    - "sum_delta": the same with changes (where `delta_dims` is given, for those).
    - "delta_masked": each coordinate of the state follows the action's that `state_from_action` names, if any.
    - "measured": no coordinate follows anything.

    The estimator gives the measured state where nothing is pending, and always its dtype and device. It raises
    ValueError where the sizes of states and actions do not fit the settings.
    """
    if settings.state_estimator == MEASURED:
        return _measured

    def estimate(state: Tensor, pending: Tensor) -> Tensor:
        _check_shapes(state, pending)
        sources = _sources(settings, state.shape[-1], pending.shape[-1])
        if not pending.shape[-2]:
            return state
        deltas = is_delta(settings, pending.shape[-1])
        if settings.state_estimator == LAST_ACTION:
            deltas = [False] * len(deltas)
        moved = _after(state, pending.to(state), sources, deltas, settings)
        follows = [source is not None for source in sources]
        return moved if all(follows) else torch.where(torch.tensor(follows, device=state.device), moved, state)

    return estimate


def _measured(state: Tensor, pending: Tensor) -> Tensor:
    return state


def _check_shapes(state: Tensor, pending: Tensor) -> None:
    if pending.dim() < 2 or state.shape[:-1] != pending.shape[:-2]:
        raise ValueError(
            f"pending: got {list(pending.shape)} with a state of {list(state.shape)}, wanted [..., delay, action_dim] "
            "with [..., state_dim]"
        )


def _sources(settings: VLASHSettings, state_dim: int, action_dim: int) -> list[int | None]:
    """For each coordinate of the state, the action's coordinate that it follows."""
    if settings.state_estimator in (LAST_ACTION, SUM_DELTA):
        if state_dim != action_dim:
            raise ValueError(
                f"state_estimator: got {settings.state_estimator!r} with {state_dim} coordinates of the state and "
                f"{action_dim} of an action, wanted as many of both; {DELTA_MASKED!r} with state_from_action says "
                "which coordinate of an action moves which of the state"
            )
        return list(range(state_dim))
    sources = settings.state_from_action or []
    if len(sources) != state_dim or any(source is not None and source >= action_dim for source in sources):
        raise ValueError(
            f"state_from_action: got {sources}, wanted {state_dim} entries, one a coordinate of the state, each None "
            f"or below action_dim, {action_dim}"
        )
    return list(sources)


def _after(
    state: Tensor, pending: Tensor, sources: list[int | None], deltas: list[bool], settings: VLASHSettings
) -> Tensor:
    """Every coordinate moved by its source (coordinate 0 stands in where there is none)."""
    columns = [source or 0 for source in sources]
    goals = clip(pending[..., -1, :], settings)[..., columns]
    changing = [deltas[column] for column in columns]
    if not any(changing):
        return goals
    changes = clip(merge_chunk(pending, settings), settings).sum(-2)[..., columns]
    return torch.where(torch.tensor(changing, device=state.device), state + changes, goals)
