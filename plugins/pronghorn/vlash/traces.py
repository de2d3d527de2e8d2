"""The official manager's traces, replayed."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pronghorn.verification import Check
from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.manager import RollForwardManager

FIRST_ACTION = 100.0  # of their stub policy's first chunk; the next ones begin at 200, 300, …
DRIFT = 0.25  # their stub robot's state at a step, over the step


def replay_traces(path: Path) -> list[Check]:
    """Drive our manager through each trace of a file; every event, policy call and command is to be the same.

    Args:
        path: JSON, as golden `async_manager_traces.json`.
    """
    checks = []
    for number, trace in enumerate(json.loads(path.read_text())):
        ours = _run(trace)
        about = "K={n_action_steps} d={inference_overlap_steps} q={action_quant_ratio}".format(**trace)
        for name, value in ours.items():
            checks.append(Check(f"{number} ({about}): {name}", 0.0 if value == trace[name] else math.inf, 0.0))
    return checks


def _run(trace: dict[str, Any]) -> dict[str, Any]:
    settings = VLASHSettings(
        chunk_size=trace["n_action_steps"], n_action_steps=trace["n_action_steps"],
        inference_overlap_steps=trace["inference_overlap_steps"], action_quant_ratio=trace["action_quant_ratio"],
    )  # fmt: skip
    calls: list[dict[str, Any]] = []
    step = 0

    def policy(request: ChunkRequest) -> Tensor:
        first = FIRST_ACTION * (len(calls) + 1)
        calls.append({"step": step, "camera_tick": request.observation.content, "state": request.state.tolist()})
        column = first + torch.arange(settings.chunk_size, dtype=torch.float32)
        return torch.stack([column, -column], -1)

    manager = RollForwardManager(settings, policy)
    events: list[list[float]] = []
    for step in range(len(trace["events_step_fetched_action_sent"])):
        tick = manager.tick(partial(Observation, step, torch.tensor([DRIFT * step, -DRIFT * step])))
        events.append([step, int(tick.fetched), float(tick.action[0]), int(tick.send)])
    return {
        "effective_overlap": manager.overlap,
        "events_step_fetched_action_sent": events,
        "policy_calls": calls,
        "sent": [action for _, _, action, sent in events if sent],
    }
