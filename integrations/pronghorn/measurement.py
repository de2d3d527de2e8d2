"""Measures in one process, and keeps what was measured: one JSON file a topic."""

from __future__ import annotations

import datetime
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pronghorn.versions import versions

PACKAGES = ("torch", "triton", "transformers", "diffusers", "vllm", "torch_geometric", "lerobot", "metaworld")
FLUSH_BYTES = 256 << 20  # more than any L2 cache


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(run: Callable[[], Any], *, repeats: int = 50, warmup: int = 5, graphed: bool = True) -> dict[str, float]:
    """Seconds a call as {"p20", "p50", "p80"}; on a GPU the replay of a CUDA graph, with a cold L2 cache.

    Where a call cannot be captured, as one that waits for the GPU or replays a graph itself, it is timed as it is.
    """
    for _ in range(warmup):
        run()
    times = _gpu_times(run, repeats, graphed) if torch.cuda.is_available() else _cpu_times(run, max(5, repeats // 10))
    ordered = sorted(times)
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


def results(topic: str, rows: list[dict[str, Any]], *, commit: str = "", dirty: bool = False) -> dict[str, Any]:
    """What a results file holds.

    Args:
        topic: what was measured.
        rows: as `row` makes them.
        commit: of the code that was measured; empty where it was installed without its history.
        dirty: whether it differed from the commit.
    """
    return {
        "topic": topic,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "driver": _driver(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }


def write(
    topic: str, rows: list[dict[str, Any]], folder: Path | None = None, *, commit: str = "", dirty: bool = False
) -> Path:
    """Write `<topic>-<device>.json` into a folder that is there, by default the current one, and print its table.

    The other arguments are those of `results`.
    """
    content = results(topic, rows, commit=commit, dirty=dirty)
    path = (folder or Path()) / f"{topic}-{slug()}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    for entry in rows:
        share = "" if entry["roofline"] is None else f"  {entry['roofline']:.0%} of the limit"
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


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if not torch.cuda.is_available() or program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603 - no input
