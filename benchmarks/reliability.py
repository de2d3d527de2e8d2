"""What docs/reliability.md says of each fault: from the rows of tests/faults/table.py and from what tests recorded."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = runpy.run_path(str(ROOT / "tests" / "faults" / "table.py"))["ROWS"]


def sections() -> str:
    """The generated part of the page: a table of all rows, then each row with its tests and figures."""
    contents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("reliability-*.json"))]
    tests = [_Test(name, {**test, **content["runs"][test["run"]]}) for content in contents
             for name, test in content["tests"].items()]  # fmt: skip
    rows = [(row, [test for test in tests if row.number in test.rows]) for row in ROWS]
    overview = ["| row | fault | state | tests |", "| --- | --- | --- | --- |"]
    overview += [f"| {row.number} | {row.title} | {_state(row, found)} | {_count(found)} |" for row, found in rows]
    parts = ["\n".join(overview), *(_section(row, found) for row, found in rows), _exceptions(), _provenance(contents)]
    return "\n\n".join(parts) + "\n"


class _Test:
    """A recorded case of a test."""

    def __init__(self, name: str, entry: dict[str, Any]) -> None:
        self.function = name.split("[")[0]
        self.rows: list[int] = entry["rows"]
        self.outcome: str = entry["outcome"]
        self.reason: str = entry.get("reason", "")
        self.figures: dict[str, Any] = entry["figures"]
        self.device: str = entry["device"]


def _state(row: Any, tests: list[_Test]) -> str:
    outcomes = {test.outcome for test in tests}
    if "failed" in outcomes:
        return "**fails**"
    if "passed" not in outcomes:
        return "not covered"
    return "partly" if row.missing or "skipped" in outcomes else "proved"


def _count(tests: list[_Test]) -> str:
    return f"{sum(test.outcome == 'passed' for test in tests)} of {len(tests)} passed" if tests else ""


def _section(row: Any, tests: list[_Test]) -> str:
    lines = [f"## {row.number}. {row.title}", "", f"{row.fault}.", "", f"To reach: {row.figure}.", ""]
    lines += [f"State: {_state(row, tests)}." + (f" Not shown here: {row.missing}." if row.missing else "")]
    functions: dict[str, list[_Test]] = {}
    for test in tests:
        functions.setdefault(test.function, []).append(test)
    lines += ["", *(_line(function, cases) for function, cases in functions.items())] if functions else []
    return "\n".join(lines)


def _line(function: str, cases: list[_Test]) -> str:
    outcomes = [case.outcome for case in cases]
    told = [
        f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped") if outcome in outcomes
    ]
    reasons = sorted({case.reason for case in cases if case.reason})
    figures = [f"{name}: {_figure([case.figures[name] for case in cases if name in case.figures])}"
               for name in dict.fromkeys(name for case in cases for name in case.figures)]  # fmt: skip
    said = [", ".join(told) + (f" ({'; '.join(reasons)})" if reasons else ""), *figures]
    return f"- `{function}`: {'; '.join(said)}"


def _figure(values: list[Any]) -> str:
    """One value, or what several cases lie between."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        least, most = min(values), max(values)
        return _number(least) if least == most else f"{_number(least)} to {_number(most)}"
    return ", ".join(dict.fromkeys(map(str, values)))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _exceptions() -> str:
    """What methods leave out of the contract that all of them pass, `tests/plugins/test_contract.py`."""
    lines = ["## What methods leave out of their contract", ""]
    for entry in sorted(entry_points(group="pronghorn.contract"), key=lambda entry: entry.name):
        lines += [f"- {entry.name}, {check}: {reason}" for check, reason in entry.load().exceptions.items()]
    return "\n".join(lines if len(lines) > 2 else [*lines, "Nothing."])


def _provenance(contents: Iterable[dict[str, Any]]) -> str:
    lines = ["## Where this was run", ""]
    for content in contents:
        for run in content["runs"].values():
            versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
            commit = run["commit"][:10] + (" with changes" if run["dirty"] else "")
            lines.append(f"- {run['date'][:10]}, commit {commit}, {run['device']}: {versions}")
    return "\n".join(dict.fromkeys(lines))
