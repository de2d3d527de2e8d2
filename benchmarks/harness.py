"""Measures in one process, writes one JSON file a topic."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
# Measured on the machine that the results come from: device-to-device copy, counting bytes read and written.
BYTES_PER_SECOND = {"NVIDIA H100 80GB HBM3": 3.0e12}
PACKAGES = ("torch", "triton", "transformers", "diffusers", "vllm", "torch_geometric", "lerobot", "metaworld")
FLUSH_BYTES = 256 << 20  # more than any L2 cache


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_vllm() -> None:
    """Settings for engines of random weights; before vLLM is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Takes more than a minute to compile, for what greedy decoding does not do.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def measure(run: Callable[[], Any], *, repeats: int = 50, warmup: int = 5, graphed: bool = True) -> dict[str, float]:
    """Seconds a call as {"p20", "p50", "p80"}; on a GPU the replay of a CUDA graph, with a cold L2 cache.

    Where a call cannot be captured, as one that waits for the GPU or replays a graph itself, it is timed as it is.
    """
    for _ in range(warmup):
        run()
    times = _gpu_times(run, repeats, graphed) if torch.cuda.is_available() else _cpu_times(run, max(5, repeats // 10))
    ordered = sorted(times)
    return {name: ordered[int(q * (len(ordered) - 1))] for name, q in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8))}


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


def _gpu_times(run: Callable[[], Any], repeats: int, graphed: bool) -> list[float]:
    replay = run
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The flush keeps the GPU busy while the host queues the rest, so that launch time does not count.
        start.record()
        replay()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _cpu_times(run: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def row(
    what: str,
    against: str,
    shape: str,
    ours: dict[str, float],
    theirs: dict[str, float],
    *,
    unit: str = "s",
    reach: float | None = None,
    roofline: float | None = None,
    note: str = "",
    higher_is_better: bool = False,
) -> dict[str, Any]:
    """One row of a results file; `ratio` is above 1 where ours is better, None where it would be of zero."""
    part, whole = (ours, theirs) if higher_is_better else (theirs, ours)
    ratio = part["p50"] / whole["p50"] if whole["p50"] else None
    return {
        "what": what,
        "against": against,
        "shape": shape,
        "unit": unit,
        "ours": ours,
        "theirs": theirs,
        "ratio": ratio,
        "reach": reach,
        "roofline": roofline,
        "note": note,
    }


def share_of_bandwidth(bytes_moved: float, seconds: float) -> float | None:
    """Achieved share of the device's memory bandwidth; None where that was never measured."""
    peak = BYTES_PER_SECOND.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if peak is None else bytes_moved / seconds / peak


def write(topic: str, rows: list[dict[str, Any]]) -> Path:
    """Write `results/<topic>-<device>.json` (under $OUT on a lent machine) and print its table."""
    content = {
        "topic": topic,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "driver": _driver(),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": os.environ.get("PRONGHORN_COMMIT") or _git("rev-parse", "HEAD"),
        "dirty": os.environ.get(
            "PRONGHORN_DIRTY", str(bool(_git("status", "--porcelain", "--", ":!benchmarks", ":!docs/assets")))
        )
        == "True",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }
    folder = Path(os.environ.get("OUT") or RESULTS)
    path = folder / f"{topic}-{slug()}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    for entry in rows:
        share = "" if entry["roofline"] is None else f"  {entry['roofline']:.0%} of bandwidth"
        sys.stdout.write(
            f"{entry['what']:40} {entry['shape']:34} {entry['ours']['p50']:.3e} against {entry['theirs']['p50']:.3e} "
            f"{entry['unit']} ({entry['against']}): {entry['ratio'] or 0:.2f}x{share}\n"
        )
    sys.stdout.write(f"-> {path}\n")
    return path


def slug() -> str:
    """Short name of the device, for file names."""
    if not torch.cuda.is_available():
        return "cpu"
    found = re.search(r"[A-Z]+\d+", torch.cuda.get_device_name())
    return (found[0] if found else "gpu").lower()


def median(values: list[float]) -> dict[str, float]:
    """{"p20", "p50", "p80"} of values measured elsewhere."""
    if len(values) < 2:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
