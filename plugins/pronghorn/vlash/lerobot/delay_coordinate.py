"""How a policy that is no pi0 or pi0.5 is told the delay: by one more coordinate of the state."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from lerobot.configs import PolicyFeature, PreTrainedConfig
from lerobot.utils.constants import OBS_STATE
from torch import Tensor


def with_room_for_delay(config: PreTrainedConfig) -> PreTrainedConfig:
    """A policy's configuration, for a state with one more coordinate."""
    state = config.input_features[OBS_STATE]
    wider = copy(config)
    wider.input_features = {
        **config.input_features,
        OBS_STATE: PolicyFeature(type=state.type, shape=(state.shape[0] + 1,)),
    }
    return wider


def with_delay(prepared: dict[str, Any], delay: Tensor, longest: int) -> dict[str, Any]:
    """Put the delay into the state.

    Args:
        prepared: after the policy's processors; its state is [batch, (steps,) state_dim].
        delay: int64 [batch], control steps.
        longest: that is trained for; it is told as 1, and so are longer ones.

    Returns:
        A state of [batch, (steps,) state_dim + 1].
    """
    state = prepared[OBS_STATE]
    told = (delay.to(state) / max(longest, 1)).clamp(max=1).view(-1, *[1] * (state.dim() - 1))
    return {**prepared, OBS_STATE: torch.cat([state, told.expand(*state.shape[:-1], 1)], dim=-1)}
