"""`pronghorn check`: whether a checkpoint loads and answers where it is to be shipped to."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pronghorn.checkpoint import Checkpoint, Finding, failed, ok, skipped
from pronghorn.checkpoint.source import AS_SOURCE, SourceError
from pronghorn.methods import entry_points, is_disabled
from pronghorn.out_of_memory import REMEDY, is_out_of_memory
from pronghorn.versions import installed, obstacle, remedy

ECOSYSTEMS = ("transformers", "vllm", "diffusers", "lerobot")
PASSED, FAILED = "can be shipped", "must not be shipped as it is"
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
        SourceError: the source cannot be had, loaded or asked; the findings until then come before.
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
    # vLLM's models lie in its own processes: methods say how they are served, and cannot look at them.
    added = partial(_vllm_options, methods) if ecosystem == "vllm" else partial(_after_loading, methods, checkpoint)
    stages: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("files", partial(check_files, checkpoint)),
        ("weights", partial(check_weights, checkpoint)),
        *((name, partial(room.check_files, checkpoint)) for name, room in methods.items()),
        (ecosystem, partial(_available, ecosystem)),
        (ecosystem, lambda: _room(ecosystem).check(checkpoint, source, min_agreement, added)),
    ]
    compared = source is None
    try:
        for finding in _in_order(stages):
            compared |= finding.name == AS_SOURCE
            yield finding
    except SourceError as error:  # says nothing about the folder
        yield skipped(AS_SOURCE, str(error), "give a source that loads and answers here", needed=True)
        raise
    if not compared:
        yield skipped(AS_SOURCE, f"there are no answers to compare with those of {source}", needed=True)


def verdict(findings: Iterable[Finding]) -> str:
    """`PASSED`, `FAILED`, or that it is not proved here, and why not."""
    findings = list(findings)
    if any(one.state == "failed" for one in findings):
        return FAILED
    unproved = [
        f"{one.name} ({textwrap.shorten(one.detail, 120, placeholder=' ...')})" for one in findings if one.needed
    ]
    return f"not proved here: {', '.join(unproved)}" if unproved else PASSED


def print_check(
    folder: Path, ecosystem: str, source: str | None, min_agreement: float, as_json: bool
) -> bool:  # fmt: skip
    """Print a table, or JSON; whether it can be shipped.

    Raises:
        SourceError: the source cannot be had, loaded or asked; what was found of the folder is printed before.
    """
    start = time.perf_counter()
    findings, failure = [], None
    with _stdout_for_the_report_alone():
        try:
            for finding in check(folder, ecosystem, source, min_agreement):
                findings.append(finding)
        except SourceError as error:
            failure = error
    _print_findings(findings, folder, ecosystem, time.perf_counter() - start, as_json)
    if failure is not None:
        raise failure
    return verdict(findings) == PASSED


def _print_findings(findings: list[Finding], folder: Path, ecosystem: str, seconds: float, as_json: bool) -> None:
    found = verdict(findings)
    if as_json:
        report = {
            "folder": str(folder), "for": ecosystem, "version": installed(ecosystem), "passed": found == PASSED,
            "verdict": found, "seconds": round(seconds, 3), "checks": [dataclasses.asdict(one) for one in findings],
        }  # fmt: skip
        print(json.dumps(report, indent=2))  # noqa: T201 - plain, for other programs to read
        return
    table = Table("check", "result", "found", "what to do", title=f"{folder} for {ecosystem}")
    for one in findings:
        table.add_row(one.name, f"[{COLOURS[one.state]}]{one.state}[/]", _plain(one.detail), _plain(one.remedy))
    console = Console()
    console.print(table)
    console.print(f"{folder}: {found} ({seconds:.1f} s)", markup=False, soft_wrap=True)


def _in_order(stages: list[tuple[str, Callable[[], Iterable[Finding]]]]) -> Iterator[Finding]:
    """The findings of each; the last one, which loads, is not run after one that failed or that could not be made."""
    *before, (ecosystem, load) = stages
    for name, run in before:
        proceed = True
        for finding in _guarded(name, run):
            proceed &= finding.state != "failed" and not finding.needed
            yield finding
        if not proceed:
            yield skipped(f"loading in {ecosystem}", "not tried with what was refused or not proved above")
            return
    yield from _guarded(ecosystem, load)


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


def _after_loading(methods: dict[str, Any], checkpoint: Checkpoint, model: Any) -> Iterator[Finding]:
    for name, room in methods.items():
        if hasattr(room, "check_loaded"):
            yield from _guarded(name, partial(room.check_loaded, checkpoint, model))


def _vllm_options(methods: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """What methods give `LLM(...)` for a checkpoint; of several mappings for one argument all entries."""
    merged: dict[str, Any] = {}
    for room in methods.values():
        for name, value in room.vllm_options(checkpoint).items() if hasattr(room, "vllm_options") else ():
            merged[name] = {**merged[name], **value} if isinstance(merged.get(name), dict) else value
    return merged


def _guarded(name: str, run: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings; an error on the way is the last of them."""
    try:
        yield from run()
    except SourceError:  # says nothing about the folder
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a library raises is what was to be found
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
        if isinstance(error, ImportError):
            yield skipped(name, detail, "install what the message names, and check again", needed=True)
        elif is_out_of_memory(error):
            yield skipped(name, detail, f"{REMEDY}; or check on a larger machine", needed=True)
        else:
            yield failed(name, detail, "mend what the message names; it is what users would see")


def _available(ecosystem: str) -> Iterator[Finding]:
    reason = obstacle(ecosystem)
    if reason:
        yield skipped(ecosystem, reason, remedy(ecosystem), needed=True)
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
