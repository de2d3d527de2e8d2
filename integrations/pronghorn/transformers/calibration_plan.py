"""What a calibration will take, said before it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.estimate import now
from pronghorn.transformers.decoder import Block

RESULT_SHARE = 0.1  # of the weights' bytes: what results are assumed to take on disk


@dataclass(frozen=True)
class Undertaking:
    """A run to be planned: what of it decides what it takes."""

    model: Any
    blocks: Sequence[Block]
    tokens: int
    device: torch.device
    activation_budget: int
    keeps_results: bool


@dataclass(frozen=True)
class CalibrationPlan:
    """What a run will take, before anything starts.

    Attributes:
        blocks: decoder blocks.
        tokens: calibration tokens.
        peak_memory_bytes: where blocks run: of the process on a CPU, allocated by torch on a GPU.
        host_memory_bytes: of the process; the same as above on a CPU.
        disk_bytes: activations beyond the budget, and an upper bound of the results.
        seconds: of the run.
    """

    blocks: int
    tokens: int
    peak_memory_bytes: int
    host_memory_bytes: int
    disk_bytes: int
    seconds: float

    def __str__(self) -> str:
        host = self.host_memory_bytes
        beside = "" if host == self.peak_memory_bytes else f" on the device and {host / 2**30:.2f} GiB beside it"
        return (
            f"{self.blocks} blocks, {self.tokens} calibration tokens: "
            f"peak memory {self.peak_memory_bytes / 2**30:.2f} GiB{beside}, disk {self.disk_bytes / 2**20:.0f} MiB, "
            f"about {self.seconds / 60:.1f} minutes"
        )


def plan_of(
    run: Undertaking,
    estimate: Callable[[Block, int], tuple[float, int]],
    run_block: Callable[[], Any],
    hidden_states: Tensor,
    arguments: Sequence[dict[str, Any]],
) -> CalibrationPlan:
    """The plan of a run.

    Args:
        run: what is planned.
        estimate: FLOPs and bytes of workspace of the search of a block with so many tokens.
        run_block: runs the first block on one sample, on the run's device.
        hidden_states: that sample's, [batch, tokens, hidden].
        arguments: the sample's further arguments of every block.
    """
    estimates = [estimate(block, run.tokens) for block in run.blocks]
    forward = [2.0 * sum(p.numel() for p in block.module.parameters()) for block in run.blocks]  # FLOPs a token
    sample_tokens = hidden_states.shape[0] * hidden_states.shape[1]
    rate = forward[0] * sample_tokens / _seconds_of(run_block, run.device)
    weights = _weights_of(run.model)
    in_memory, _ = _travelling_bytes(run)
    host = _process_bytes(weights) + in_memory + _bytes_of(arguments)
    workspace = max(needed for _, needed in estimates)
    on_cpu = run.device.type == "cpu"
    largest = max(_weights_of(block.module) for block in run.blocks)
    at_home = next(run.blocks[0].module.parameters()).device == run.device
    return CalibrationPlan(
        blocks=len(run.blocks),
        tokens=run.tokens,
        peak_memory_bytes=host + workspace if on_cpu else (weights if at_home else largest) + workspace,
        host_memory_bytes=host + workspace if on_cpu else host,
        disk_bytes=disk_bytes_of(run),
        seconds=(sum(flops for flops, _ in estimates) + sum(forward) * run.tokens) / rate,
    )


def disk_bytes_of(run: Undertaking) -> int:
    """What a run writes at most: activations beyond the budget, and results where they are kept."""
    _, spilled = _travelling_bytes(run)
    return spilled + (int(RESULT_SHARE * _weights_of(run.model)) if run.keeps_results else 0)


def _travelling_bytes(run: Undertaking) -> tuple[int, int]:
    """Bytes of activations in memory and on disk: a block's inputs and outputs, each with half of the budget."""
    element = next(run.blocks[0].module.parameters()).element_size()
    side = run.tokens * run.model.config.get_text_config().hidden_size * element
    in_memory = min(side, run.activation_budget // 2)
    return 2 * in_memory, 2 * (side - in_memory)


def _weights_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    best = float("inf")
    for _ in range(3):
        start = now(device)
        work()
        best = min(best, now(device) - start)
    return best


def _process_bytes(weights: int) -> int:
    """Resident bytes of this process; where the system does not say, at least the model's weights."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return weights
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _bytes_of(arguments: Sequence[dict[str, Any]]) -> int:
    """Of all distinct tensors in the arguments."""
    found: dict[int, int] = {}
    pending: list[Any] = list(arguments)
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            found[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
    return sum(found.values())
