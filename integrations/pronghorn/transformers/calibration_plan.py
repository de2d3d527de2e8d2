"""What a calibration will take, said before it starts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pronghorn.transformers.decoder import Block

if TYPE_CHECKING:
    from pronghorn.transformers.calibration import CalibrationRunner

RESULT_SHARE = 0.1  # of the weights' bytes: what results are assumed to take on disk


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
    runner: CalibrationRunner,
    estimate: Callable[[Block, int], tuple[float, int]],
    run_block: Callable[[], Any],
    hidden_states: Tensor,
    arguments: Sequence[dict[str, Any]],
) -> CalibrationPlan:
    """The plan of a run.

    Args:
        runner: the run.
        estimate: FLOPs and bytes of workspace of the search of a block with so many tokens.
        run_block: runs the first block on one sample, on the run's device.
        hidden_states: that sample's, [batch, tokens, hidden].
        arguments: the sample's further arguments of every block.
    """
    tokens = sum(ids.numel() for ids in runner.samples)
    estimates = [estimate(block, tokens) for block in runner.blocks]
    forward = [2.0 * sum(p.numel() for p in block.module.parameters()) for block in runner.blocks]  # FLOPs a token
    sample_tokens = hidden_states.shape[0] * hidden_states.shape[1]
    rate = forward[0] * sample_tokens / _seconds_of(run_block, runner.device)
    weights = _weights_of(runner.model)
    in_memory, _ = _travelling_bytes(runner)
    host = _process_bytes(weights) + in_memory + _bytes_of(arguments)
    workspace = max(needed for _, needed in estimates)
    on_cpu = runner.device.type == "cpu"
    largest = max(_weights_of(block.module) for block in runner.blocks)
    at_home = next(runner.blocks[0].module.parameters()).device == runner.device
    return CalibrationPlan(
        blocks=len(runner.blocks),
        tokens=tokens,
        peak_memory_bytes=host + workspace if on_cpu else (weights if at_home else largest) + workspace,
        host_memory_bytes=host + workspace if on_cpu else host,
        disk_bytes=disk_bytes_of(runner),
        seconds=(sum(flops for flops, _ in estimates) + sum(forward) * tokens) / rate,
    )


def disk_bytes_of(runner: CalibrationRunner) -> int:
    """What a run writes at most: activations beyond the budget, and results where they are kept."""
    _, spilled = _travelling_bytes(runner)
    return spilled + (int(RESULT_SHARE * _weights_of(runner.model)) if runner.state_dir is not None else 0)


def _travelling_bytes(runner: CalibrationRunner) -> tuple[int, int]:
    """Bytes of activations in memory and on disk: a block's inputs and outputs, each with half of the budget."""
    tokens = sum(ids.numel() for ids in runner.samples)
    element = next(runner.blocks[0].module.parameters()).element_size()
    side = tokens * runner.model.config.get_text_config().hidden_size * element
    in_memory = min(side, runner.activation_budget // 2)
    return 2 * in_memory, 2 * (side - in_memory)


def _weights_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
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
