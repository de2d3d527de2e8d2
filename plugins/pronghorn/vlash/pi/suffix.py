"""How actions, the time, the state and the delay enter the expert for actions.

An `owner` is whatever has the projections as attributes: LeRobot's PI0Pytorch and PI05Pytorch, or our SuffixEmbedder.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pronghorn.vlash.pi.preprocessing import sincos

PI0, PI05 = "pi0", "pi05"


class DelayEmbedding(nn.Embedding):
    """A learned vector for each delay, 0 to `max_delay_steps`, that starts at zero.

    Longer delays than trained ones take the vector of the longest.

    Raises:
        ValueError: a delay is negative (looked at on the CPU alone, where it costs no waiting).
    """

    def __init__(self, max_delay_steps: int, width: int) -> None:
        super().__init__(max_delay_steps + 1, width)
        nn.init.zeros_(self.weight)

    def forward(self, delay: Tensor) -> Tensor:
        """Int64 [...] to [..., width]."""
        if delay.device.type == "cpu" and bool((delay < 0).any()):
            raise ValueError(f"delay: got {delay.tolist()}, wanted 0 or more")
        return super().forward(delay.clamp(0, self.num_embeddings - 1))


def add_state_condition(owner: nn.Module, state_dim: int) -> None:
    """Let a pi0.5 see the state through its adaptive norms; without effect until trained.

    Args:
        owner: gets `state_proj`, `state_mlp_in` and `state_mlp_out`; the last is zero.
        state_dim: coordinates of a state, padding included.

    Raises:
        ValueError: it is a pi0, or has them.

    Source: the projected state of the authors' code (`state_cond`).
    """
    if kind_of(owner) == PI0 or has_state_condition(owner):
        raise ValueError("state_cond: a pi0 sees the state as a token, and one condition is enough")
    width, like = _width_and_like(owner)
    owner.state_proj = nn.Linear(state_dim, width, **like)
    owner.state_mlp_in = nn.Linear(width, width, **like)
    owner.state_mlp_out = nn.Linear(width, width, **like)
    nn.init.zeros_(owner.state_mlp_out.weight)
    nn.init.zeros_(owner.state_mlp_out.bias)


def add_delay_condition(owner: nn.Module, max_delay_steps: int) -> None:
    """Tell a model the delay that it acts after; without effect until trained.

    Args:
        owner: gets `delay_embedding`.
        max_delay_steps: the largest delay that will be trained.
    """
    width, like = _width_and_like(owner)
    owner.delay_embedding = DelayEmbedding(max_delay_steps, width).to(**like)


def kind_of(owner: Any) -> str:
    """Whether these are the projections of a "pi0" or a "pi05".

    Raises:
        TypeError: they are of neither.
    """
    if hasattr(owner, "action_time_mlp_in"):
        return PI0
    if hasattr(owner, "time_mlp_in"):
        return PI05
    raise TypeError(
        f"owner: got {type(owner).__name__}, wanted one with action_time_mlp_in (pi0) or time_mlp_in (pi05)"
    )


def has_state_condition(owner: Any) -> bool:
    """Whether a pi0.5 sees the state through its norms."""
    return hasattr(owner, "state_mlp_in")


def suffix_condition(
    owner: Any, state: Tensor | None, time: Tensor, delay: Tensor | None, periods: tuple[float, float]
) -> Tensor | None:
    """What the adaptive norms of a pi0.5 get: the time and, where the model has them, state and delay.

    Args:
        owner: of the projections.
        state: [..., state_dim]; a pi0.5 that reads the state in its prompt takes none.
        time: [...].
        delay: int64 [...], control steps; only for models with delay conditioning.
        periods: the shortest and the longest of the sines of the time.

    Returns:
        [..., width], or None for a pi0, which has plain norms.

    Raises:
        ValueError: the model needs a state or a delay and has none.
    """
    if kind_of(owner) == PI0:
        return None
    condition = F.silu(owner.time_mlp_out(F.silu(owner.time_mlp_in(_embedded_time(owner, time, periods)))))
    if has_state_condition(owner):
        projected = owner.state_proj(_needed("state", state).to(owner.state_proj.weight.dtype))
        condition = condition + F.silu(owner.state_mlp_out(F.silu(owner.state_mlp_in(projected))))
    return _with_delay(owner, condition, delay)


def suffix_tokens(
    owner: Any, state: Tensor | None, noisy: Tensor, time: Tensor, delay: Tensor | None, periods: tuple[float, float],
    state_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The tokens of an action chunk, and before them that of the state for a pi0.

    Args:
        owner: of the projections.
        state: [rows, state_dim], for a pi0.
        noisy: [rows, H, action_dim], actions on their way from noise.
        time: [rows].
        delay: int64 [rows]; only for a pi0 with delay conditioning.
        periods: as in `suffix_condition`.
        state_dtype: to which the state's token is rounded: the authors' pi0 has bfloat16 even in a float32 model.

    Returns:
        [rows, H, width], or [rows, 1 + H, width] for a pi0.

    Raises:
        ValueError: the model needs a state or a delay and has none.
    """
    tokens = owner.action_in_proj(noisy.to(owner.action_in_proj.weight.dtype))
    if kind_of(owner) == PI05:
        return tokens
    embedded = _embedded_time(owner, time, periods)[:, None].expand_as(tokens).to(tokens.dtype)
    tokens = owner.action_time_mlp_in(torch.cat([tokens, embedded], dim=-1))
    tokens = _with_delay(owner, owner.action_time_mlp_out(F.silu(tokens)), delay)
    state_token = owner.state_proj(_needed("state", state).to(owner.state_proj.weight.dtype))[:, None]
    if state_dtype is not None:
        state_token = state_token.to(state_dtype)
    return torch.cat([state_token.to(tokens.dtype), tokens], dim=1)


def _embedded_time(owner: Any, time: Tensor, periods: tuple[float, float]) -> Tensor:
    weight = owner.action_in_proj.weight
    return sincos(time, weight.shape[0], *periods).to(weight.dtype)


def _with_delay(owner: Any, x: Tensor, delay: Tensor | None) -> Tensor:
    if not hasattr(owner, "delay_embedding"):
        return x
    learned = owner.delay_embedding(_needed("delay", delay)).to(x.dtype)
    return x + learned.reshape(*learned.shape[:-1], *[1] * (x.dim() - learned.dim()), -1)


def _needed(name: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"{name}: got None, which this model needs")
    return value


def _width_and_like(owner: Any) -> tuple[int, dict[str, Any]]:
    weight = owner.action_in_proj.weight
    return weight.shape[0], {"device": weight.device, "dtype": weight.dtype}
