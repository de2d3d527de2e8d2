"""VLASH in LeRobot: the policy type `vlash`, which wraps any policy that predicts chunks of actions."""

from __future__ import annotations

from pronghorn.versions import require

require("lerobot")


def register() -> None:
    """Make `--policy.type=vlash` known; LeRobot finds its policy and processors by the names of these modules.

    `--inference.type=vlash` too.
    """
    import pronghorn.vlash.lerobot.configuration_vlash
    import pronghorn.vlash.lerobot.rollout  # noqa: F401
