"""Real-time chunking under the same engine: LeRobot's own, and the one that goes through the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from torch import Tensor

from pronghorn.vlash.flow import Guide
from pronghorn.vlash.guidance import guided_velocity


def guide(leftover: Tensor, delay: int, rtc: RTCConfig, *, full_jacobian: bool) -> Guide:
    """Has a chunk begin like the one that runs.

    Args:
        leftover: [batch, steps, action_dim], the running chunk from the observation on, in the policy's units.
        delay: control steps until the new chunk is used.
        rtc: how much it is to agree with what runs.
        full_jacobian: through the network's Jacobian, as the paper does, or with the identity in its place, as LeRobot
            0.6.1 does: it evaluates the velocity before it turns gradients on.
    """

    def guided(field: Callable[[Tensor], Tensor], x: Tensor, time: float) -> Tensor:
        return guided_velocity(
            field, x, time, leftover, delay, execution_end=rtc.execution_horizon, cap=rtc.max_guidance_weight,
            full_jacobian=full_jacobian, schedule=rtc.prefix_attention_schedule.value.lower(),
        )  # fmt: skip

    return guided


class NetworkRTCProcessor(RTCProcessor):
    """LeRobot's `RTCProcessor`, its correction taken through the network's Jacobian."""

    def denoise_step(
        self, x_t: Tensor, prev_chunk_left_over: Tensor | None, inference_delay: int, time: float,
        original_denoise_step_partial: Callable[[Tensor], Tensor], execution_horizon: int | None = None,
    ) -> Tensor:  # fmt: skip
        """The guided velocity; arguments as in LeRobot's, of which `execution_horizon` is that of the configuration."""
        if prev_chunk_left_over is None:
            return original_denoise_step_partial(x_t)
        through = guide(prev_chunk_left_over, inference_delay, self.rtc_config, full_jacobian=True)
        return through(original_denoise_step_partial, x_t, time)


def guide_through_network(policy: Any) -> None:
    """Have a policy of LeRobot that knows real-time chunking use `NetworkRTCProcessor`."""
    policy.rtc_processor = policy.model.rtc_processor = NetworkRTCProcessor(policy.config.rtc_config)


def for_autograd(batch: dict[str, Any]) -> dict[str, Any]:
    """Copies that autograd may keep, of tensors that were made in inference mode; to be called outside of it."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
