"""`pronghorn verify`: the checks of our tests, on the user's own device."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pronghorn.cli.golden import GOLDEN, golden_files
from pronghorn.estimate import now
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._operation import Operation, operations, relative_error
from pronghorn.methods import entry_points, is_disabled
from pronghorn.verification import Check

REPEATS = 5
KERNELS, REFERENCE = "kernels", "reference"


def verify(names: Sequence[str], as_json: bool = False) -> bool:
    """Check the named operations and methods, or all; whether all checks passed.

    One that fails is reported with its reason, and the others go on. A method whose reference data or libraries are
    not here is skipped, and fails if it was named.

    Args:
        names: of operations and methods; none are all.
        as_json: print `{"device", "implementation", "limits", "operations", "methods", "passed"}` instead of tables.

    Raises:
        ValueError: a name that is neither an operation nor a method that replays reference data.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = {operation.name: operation for operation in operations()}
    replays = {entry.name: entry for entry in entry_points("verify") if not is_disabled(entry.name)}
    unknown = [name for name in names if name not in known and name not in replays]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r}: neither an operation nor a method; there are {', '.join([*known, *replays])}"
        )
    chosen = [operation for name, operation in known.items() if not names or name in names]
    bandwidth, rate = limits(device) if chosen else (math.nan, math.nan)
    bar = functools.partial(tqdm, disable=None, leave=False)
    measured = [_operation(operation, device, bandwidth, rate) for operation in bar(chosen, desc="operations")]
    wanted = [(name, entry) for name, entry in replays.items() if not names or name in names]
    methods = [_method(name, entry, device, asked=name in names) for name, entry in bar(wanted, desc="methods")]
    found = {
        "device": str(device),
        "implementation": KERNELS if use_triton("verify", torch.empty(0, device=device)) else REFERENCE,
        "limits": {"bytes_per_second": bandwidth, "flops_per_second": rate} if chosen else None,
        "operations": measured,
        "methods": methods,
        "passed": all(part["passed"] or part["skipped"] for part in (*measured, *methods)),
    }
    if as_json:
        print(json.dumps(found, indent=2))  # noqa: T201 - plain, for other programs to read
    else:
        _show(found)
    return bool(found["passed"])


def _operation(operation: Operation, device: torch.device, bandwidth: float, rate: float) -> dict[str, Any]:
    knobs = operation.large if device.type == "cuda" else operation.shapes[0]
    found: dict[str, Any] = {
        "name": operation.name,
        "checks": [],
        "reason": "",
        "shape": " ".join(f"{key}={value}" for key, value in knobs.items()),
        "seconds": None,
        "share_of_limit": None,
        "passed": False,
        "skipped": False,
    }
    try:
        for dtype, tolerance in operation.tolerance.items():
            worst = _largest(_error(operation, shape, dtype, device) for shape in operation.shapes)
            found["checks"].append(_check(str(dtype).removeprefix("torch."), worst, tolerance))
        arguments = operation.example(knobs, torch.float16, torch.Generator().manual_seed(0), device)
        found["seconds"] = _seconds(functools.partial(operation.timed, **arguments), device)
        cost = operation.cost(knobs)
        found["share_of_limit"] = max(cost.bytes / bandwidth, cost.flops / rate) / found["seconds"]
    except Exception as error:  # noqa: BLE001 - a broken operation must not take the others along
        return {**found, "reason": failure(error)}
    return {**found, "passed": all(check["passed"] for check in found["checks"])}


def _method(name: str, entry: EntryPoint, device: torch.device, *, asked: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "checks": [], "reason": "", "passed": False, "skipped": False}
    try:
        replay = entry.load()
    except ImportError as error:
        return {**found, **_without(error, asked=asked)}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken method must not take the others along
        return {**found, "reason": f"not available: {type(error).__name__}: {error}"}
    file = getattr(sys.modules.get(entry.module), "__file__", None)
    paths = golden_files(name, Path(file) if file else None)
    if not paths:
        reason = f"no reference data here; they are in the repository, tests/golden/data: set {GOLDEN} to that folder"
        return {**found, "reason": reason if asked else f"skipped: {reason}", "skipped": not asked}
    reasons = []
    for path in paths:
        try:
            checks = replay(path, device)
        except ImportError as error:
            return {**found, **_without(error, asked=asked)}
        except (Exception, SystemExit) as error:  # noqa: BLE001 - nor one file the others
            reasons.append(f"{path.stem}: {failure(error)}")
            continue
        if not checks:
            reasons.append(f"{path.stem}: failed: nothing of it was compared")
        found["checks"] += [{"file": path.stem, **_check(check.name, check.error, check.tolerance)} for check in checks]
    passed = not reasons and all(check["passed"] for check in found["checks"])
    return {**found, "reason": "; ".join(reasons), "passed": passed}


def _without(error: ImportError, *, asked: bool) -> dict[str, Any]:
    """Of a method whose libraries are not here, as of most methods where one extra is installed."""
    reason = f"not available: {type(error).__name__}: {error}"
    skipped = not asked and not (error.name or "").startswith("pronghorn")  # what is broken is our own there
    return {"checks": [], "reason": f"skipped: {reason}" if skipped else reason, "skipped": skipped}


def failure(error: BaseException) -> str:
    """What ended one item of several, in a line."""
    said = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {said}" if said else f"failed: {type(error).__name__}"


def _largest(errors: Iterable[float]) -> float:
    """Python's `max` would lose a NaN that is not the first."""
    return float(torch.tensor([*errors], dtype=torch.float64).max())


def _check(name: str, error: float, tolerance: float) -> dict[str, Any]:
    found = Check(name, error, tolerance)
    return {"check": name, "error": error, "tolerance": tolerance, "passed": found.passed}


def _show(found: dict[str, Any]) -> None:
    console = Console()
    if found["operations"]:
        table = Table(
            "operation", "dtype", "worst error", "tolerance", "time", "of the limit",
            title=f"on {found['device']}, {found['implementation']}",
        )  # fmt: skip
        for operation in found["operations"]:
            for check in operation["checks"]:
                table.add_row(operation["name"], check["check"], _coloured(check), f"{check['tolerance']:.0e}")
            if operation["share_of_limit"] is not None:
                micro, share = operation["seconds"] * 1e6, operation["share_of_limit"]
                table.add_row("", f"float16 {operation['shape']}", "", "", f"{micro:.0f} us", f"{share:.1%}")
        console.print(table)
        copied, multiplied = found["limits"].values()
        console.print(
            f"limits measured here: {copied / 1e9:.0f} GB/s copied, {multiplied / 1e12:.2f} TFLOP/s multiplied"
        )
    if found["implementation"] == REFERENCE:
        console.print("no kernel ran: what was checked is the reference, in PyTorch, that stands in for them here")
    for method in found["methods"]:
        if method["checks"]:
            table = Table("file", "check", "error", "tolerance", title=f"{method['name']}, official results")
            for check in method["checks"]:
                table.add_row(check["file"], check["check"], _coloured(check), f"{check['tolerance']:.0e}")
            console.print(table)
    parts = (*found["operations"], *found["methods"])
    for part in parts:
        if part["reason"]:
            console.print(f"{part['name']}: {part['reason']}", markup=False, soft_wrap=True)
    skipped = sum(part["skipped"] for part in parts)
    failed = [part["name"] for part in parts if not part["passed"] and not part["skipped"]]
    rest = f", {skipped} skipped" if skipped else ""
    console.print(
        f"failed: {', '.join(failed)}" if failed else f"all {len(parts) - skipped} passed{rest}", soft_wrap=True
    )


def _error(operation: Operation, knobs: Any, dtype: torch.dtype, device: torch.device) -> float:
    arguments = operation.example(knobs, dtype, torch.Generator().manual_seed(0), device)
    return relative_error(operation.function(**arguments), operation.oracle(arguments))


def _coloured(check: dict[str, Any]) -> str:
    return f"[{'green' if check['passed'] else 'bold red'}]{check['error']:.1e}[/]"


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        start = now(device)
        run()
        times.append(now(device) - start)
    return sorted(times)[REPEATS // 2]


def limits(device: torch.device) -> tuple[float, float]:
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
