"""`pronghorn check`: whether a checkpoint loads and answers where it is to be shipped to."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pronghorn.checkpoint import Checkpoint, Finding, failed, ok, skipped
from pronghorn.checkpoint.source import SourceError
from pronghorn.methods import entry_points, is_disabled
from pronghorn.versions import installed, obstacle, remedy

ECOSYSTEMS = ("transformers", "vllm", "diffusers", "lerobot")
COLOURS = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


def check(folder: Path, ecosystem: str, source: str | None = None, min_agreement: float = 0.5) -> Iterator[Finding]:
    """All findings, in the order of danger: nothing is loaded from files that were refused.

    Args:
        folder: the checkpoint.
        ecosystem: "transformers", "vllm", "diffusers" or "lerobot".
        source: folder or hub name of what it was made from, to compare its answers with.
        min_agreement: least share of tokens whose likeliest successor is the source's.

    Raises:
        ValueError: the ecosystem is none of these, or the share none. NotADirectoryError: there is no such folder.
    """
    if ecosystem not in ECOSYSTEMS:
        raise ValueError(f"--for: got {ecosystem!r}, accepted are {', '.join(ECOSYSTEMS)}")
    if not 0 <= min_agreement <= 1:
        raise ValueError(f"--min-agreement: got {min_agreement}, wanted a share from 0 to 1")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: wanted the folder of a checkpoint")
    from pronghorn.checkpoint.files import check_files
    from pronghorn.checkpoint.weights import check_weights

    checkpoint = Checkpoint(folder, ecosystem)
    methods, broken = _methods()
    yield from broken

    def after_loading(model: Any) -> Iterator[Finding]:
        for name, room in methods.items():
            if hasattr(room, "check_loaded"):
                yield from _guarded(name, partial(room.check_loaded, checkpoint, model))

    stages: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("files", partial(check_files, checkpoint)),
        ("weights", partial(check_weights, checkpoint)),
        *((name, partial(room.check_files, checkpoint)) for name, room in methods.items()),
        (ecosystem, partial(_available, ecosystem)),
        (ecosystem, lambda: _room(ecosystem).check(checkpoint, source, min_agreement, after_loading)),
    ]
    passed = True
    for place, (name, run) in enumerate(stages):
        for finding in _guarded(name, run):
            passed &= finding.state != "failed"
            yield finding
        if not passed and place + 1 < len(stages):
            yield skipped(f"loading in {ecosystem}", "not tried with what was refused above")
            return


def print_check(
    folder: Path, ecosystem: str, source: str | None, min_agreement: float, as_json: bool
) -> bool:  # fmt: skip
    """Print a table, or JSON; whether nothing failed."""
    start = time.perf_counter()
    with _stdout_for_the_report_alone():
        findings = list(check(folder, ecosystem, source, min_agreement))
    passed = all(finding.state != "failed" for finding in findings)
    if as_json:
        report = {
            "folder": str(folder), "for": ecosystem, "version": installed(ecosystem), "passed": passed,
            "seconds": round(time.perf_counter() - start, 3), "checks": [dataclasses.asdict(one) for one in findings],
        }  # fmt: skip
        print(json.dumps(report, indent=2))  # noqa: T201 - plain, for other programs to read
        return passed
    table = Table("check", "result", "found", "what to do", title=f"{folder} for {ecosystem}")
    for one in findings:
        table.add_row(one.name, f"[{COLOURS[one.state]}]{one.state}[/]", _plain(one.detail), _plain(one.remedy))
    console = Console()
    console.print(table)
    verdict = "can be shipped" if passed else "must not be shipped as it is"
    console.print(f"{folder}: {verdict} ({time.perf_counter() - start:.1f} s)", markup=False, soft_wrap=True)
    return passed


def _methods() -> tuple[dict[str, Any], list[Finding]]:
    """The methods' rooms, and a finding for each that cannot be loaded."""
    rooms, broken = {}, []
    for entry in entry_points("check"):
        if is_disabled(entry.name):
            continue
        try:
            rooms[entry.name] = entry.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken method must not take the others along
            detail = f"its checks are not available: {type(error).__name__}: {error}"
            broken.append(skipped(entry.name, detail, "`pronghorn info` says what mends it"))
    return rooms, broken


def _guarded(name: str, run: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings; an error on the way is the last of them."""
    try:
        yield from run()
    except SourceError:  # says nothing about the folder
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a library raises is what was to be found
        detail = " ".join(f"{type(error).__name__}: {error}".split())
        yield failed(name, detail[:2000], "mend what the message names; it is what users would see")


def _available(ecosystem: str) -> Iterator[Finding]:
    reason = obstacle(ecosystem)
    if reason:
        yield failed(ecosystem, reason, remedy(ecosystem))
    else:
        yield ok(ecosystem, f"version {installed(ecosystem)}")


def _room(ecosystem: str) -> Any:
    return importlib.import_module(f"pronghorn.{ecosystem}.checking")


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


@contextlib.contextmanager
def _stdout_for_the_report_alone() -> Iterator[None]:
    """What libraries and their processes print meanwhile goes to the standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
