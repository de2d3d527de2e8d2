"""`pronghorn verify`: the checks of our tests, on the user's own device."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pronghorn.kernels._operation import Operation, operations, relative_error
from pronghorn.methods import entry_points, is_disabled

GOLDEN = "PRONGHORN_GOLDEN"
REPEATS = 5


def verify(names: Sequence[str]) -> bool:
    """Check the named operations and methods, or all; whether all checks passed.

    Raises:
        ValueError: a name that is neither an operation nor a method with reference data.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = {operation.name: operation for operation in operations()}
    replays = {entry.name: entry for entry in entry_points("verify") if not is_disabled(entry.name)}
    unknown = [name for name in names if name not in known and name not in replays]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r}: neither an operation nor a method; there are {', '.join([*known, *replays])}"
        )
    console = Console()
    passed = True
    chosen = [operation for name, operation in known.items() if not names or name in names]
    if chosen:
        passed &= _verify_operations(console, chosen, device)
    for name, entry in replays.items():
        if not names or name in names:
            try:
                replay = entry.load()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken method must not take the others along
                console.print(f"{name}: not available: {type(error).__name__}: {error}", markup=False, soft_wrap=True)
                passed = False
                continue
            passed &= _verify_method(console, name, replay, device)
    return passed


def _verify_operations(console: Console, chosen: Sequence[Operation], device: torch.device) -> bool:
    bandwidth, rate = _limits(device)
    table = Table("operation", "dtype", "worst error", "tolerance", "time", "of the limit", title=f"on {device}")
    passed = True
    for operation in chosen:
        for dtype, tolerance in operation.tolerance.items():
            error = max(_error(operation, knobs, dtype, device) for knobs in operation.shapes)
            passed &= error <= tolerance
            table.add_row(
                operation.name, str(dtype).removeprefix("torch."), _colour(error, tolerance), f"{tolerance:.0e}"
            )
        knobs = operation.large if device.type == "cuda" else operation.shapes[0]
        arguments = operation.example(knobs, torch.float16, torch.Generator().manual_seed(0), device)
        seconds = _seconds(functools.partial(operation.timed, **arguments), device)
        cost = operation.cost(knobs)
        floor = max(cost.bytes / bandwidth, cost.flops / rate)
        shape = " ".join(f"{key}={value}" for key, value in knobs.items())
        table.add_row("", f"float16 {shape}", "", "", f"{seconds * 1e6:.0f} us", f"{floor / seconds:.1%}")
    console.print(table)
    console.print(f"limits measured here: {bandwidth / 1e9:.0f} GB/s copied, {rate / 1e12:.2f} TFLOP/s multiplied")
    return passed


def _verify_method(console: Console, name: str, replay: Callable[..., Any], device: torch.device) -> bool:
    root = Path(os.environ.get(GOLDEN) or "tests/golden/data")
    folder = root / name if (root / name).is_dir() else root
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        console.print(
            f"{name}: no reference data in {folder.resolve()}; they are in the repository, tests/golden/data: "
            f"set {GOLDEN} to that folder",
            soft_wrap=True,
        )
        return False
    table = Table("file", "check", "error", "tolerance", title=f"{name}, official results")
    passed = True
    for path in files:
        for check in replay(path, device):
            passed &= check.passed
            table.add_row(path.stem, check.name, _colour(check.error, check.tolerance), f"{check.tolerance:.0e}")
    console.print(table)
    return passed


def _error(operation: Operation, knobs: Any, dtype: torch.dtype, device: torch.device) -> float:
    arguments = operation.example(knobs, dtype, torch.Generator().manual_seed(0), device)
    return relative_error(operation.function(**arguments), operation.oracle(arguments))


def _colour(error: float, tolerance: float) -> str:
    return f"[{'green' if error <= tolerance else 'bold red'}]{error:.1e}[/]"


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _limits(device: torch.device) -> tuple[float, float]:
    """Bytes per second of a copy, counting both ways, and multiplications and additions per second of a matmul."""
    big = device.type == "cuda"
    buffer = torch.empty((1 << 30) if big else (1 << 26), dtype=torch.uint8, device=device)
    copied = torch.empty_like(buffer)
    size = 8192 if big else 768
    matrix = torch.randn(size, size, device=device, dtype=torch.float16 if big else torch.float32)
    return (
        2 * buffer.numel() / _seconds(lambda: copied.copy_(buffer), device),
        2 * size**3 / _seconds(lambda: matrix @ matrix, device),
    )
