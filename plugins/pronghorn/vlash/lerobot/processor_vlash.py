"""The processors outside of a `vlash` policy: they rename, batch and move, and leave all numbers as the robot's."""

from __future__ import annotations

from typing import Any

from lerobot.processor import PolicyProcessorPipeline, make_default_pre_post_processors

from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig


def make_vlash_pre_post_processors(
    config: VLASHConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """What LeRobot runs before and after the policy.

    The wrapped policy's own processors, which normalise and make prompts, are inside the policy: the state that they
    see is the one that the robot will have.

    Args:
        config: of the policy.
        dataset_stats: of no use here.
    """
    return make_default_pre_post_processors(config, None)
