"""VLASH: robots that do not stand still while their policy thinks.

For whoever runs or trains vision-language-action policies that predict chunks of actions. The next chunk is computed
while the running one is executed, for the state that the robot will have when it begins; policies are fine-tuned for
that with random offsets, all offsets of a sample in one pass (VLASH: Real-Time VLAs via Future-State-Aware Asynchronous
Inference, arXiv 2512.01031).

    lerobot-train --policy.type=vlash --policy.base=act --dataset.repo_id=…

    from pronghorn.vlash import AsyncRunner, VLASHSettings

    with AsyncRunner(policy, VLASHSettings(n_action_steps=32, inference_overlap_steps="auto")) as runner:
        command = runner.step(observation)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.vlash.chunks import ChunkRequest, Observation
    from pronghorn.vlash.config import VLASHSettings
    from pronghorn.vlash.control import ControlRecord, control_loop
    from pronghorn.vlash.estimators import state_estimator
    from pronghorn.vlash.guidance import guided_velocity
    from pronghorn.vlash.latency import LatencyTracker
    from pronghorn.vlash.manager import RollForwardManager, Tick
    from pronghorn.vlash.metrics import ControlMetrics
    from pronghorn.vlash.offsets import OffsetSamples, all_offsets, apply_offset
    from pronghorn.vlash.runner import AsyncRunner
    from pronghorn.vlash.watchdog import VLASHError
    from pronghorn.vlash.worker import Worker

__all__ = [
    "AsyncRunner",
    "ChunkRequest",
    "ControlMetrics",
    "ControlRecord",
    "LatencyTracker",
    "Observation",
    "OffsetSamples",
    "RollForwardManager",
    "Tick",
    "VLASHError",
    "VLASHSettings",
    "Worker",
    "all_offsets",
    "apply_offset",
    "control_loop",
    "guided_velocity",
    "state_estimator",
]

_ROOMS = {
    "AsyncRunner": "runner",
    "ChunkRequest": "chunks",
    "ControlMetrics": "metrics",
    "ControlRecord": "control",
    "LatencyTracker": "latency",
    "Observation": "chunks",
    "OffsetSamples": "offsets",
    "RollForwardManager": "manager",
    "Tick": "manager",
    "VLASHError": "watchdog",
    "VLASHSettings": "config",
    "Worker": "worker",
    "all_offsets": "offsets",
    "apply_offset": "offsets",
    "control_loop": "control",
    "guided_velocity": "guidance",
    "state_estimator": "estimators",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
