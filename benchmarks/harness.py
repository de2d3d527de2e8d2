"""What the benchmarks of this repository share."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pronghorn import measurement
from pronghorn.checkpoint.provenance import git
from pronghorn.measurement import device, measure, row, slug

__all__ = [
    "device", "measure", "measure_in_turn", "median", "prepare_vllm", "row", "share_of_bandwidth", "slug", "write",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"
# Measured on the machine that the results come from: device-to-device copy, counting bytes read and written.
BYTES_PER_SECOND = {"NVIDIA H100 80GB HBM3": 3.0e12}


def prepare_vllm() -> None:
    """Settings for engines of random weights; before vLLM is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Takes more than a minute to compile, for what greedy decoding does not do.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def measure_in_turn(runs: Sequence[Callable[[], Any]], *, repeats: int = 20) -> dict[str, float]:
    """Seconds a run of several that follow each other in one CUDA graph, as in a model: quantiles over replays.

    Let each have a weight of its own, together more than the L2 cache: then every weight comes from memory.
    """
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(runs))
    ordered = sorted(times[1:])
    return {name: ordered[int(q * (len(ordered) - 1))] for name, q in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8))}


def share_of_bandwidth(bytes_moved: float, seconds: float) -> float | None:
    """Achieved share of the device's memory bandwidth; None where that was never measured."""
    peak = BYTES_PER_SECOND.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if peak is None else bytes_moved / seconds / peak


def picture_folder() -> Path:
    """The folder for pictures: that of the docs, or $OUT."""
    return Path(os.environ.get("OUT") or RESULTS.parents[1] / "docs" / "assets")


def write(topic: str, rows: list[dict[str, Any]]) -> Path:
    """Write `results/<topic>-<device>.json` (under $OUT on a lent machine) and print its table."""
    commit = os.environ.get("PRONGHORN_COMMIT") or git(RESULTS.parents[1], "rev-parse", "HEAD") or ""
    changed = str(bool(git(RESULTS.parents[1], "status", "--porcelain", "--", ":!benchmarks", ":!docs/assets")))
    dirty = os.environ.get("PRONGHORN_DIRTY", changed) == "True"
    folder = Path(os.environ.get("OUT") or RESULTS)
    return measurement.write(topic, rows, folder, commit=commit, dirty=dirty)


def median(values: list[float]) -> dict[str, float]:
    """{"p20", "p50", "p80"} of values measured elsewhere."""
    if len(values) < 2:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}
