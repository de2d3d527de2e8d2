"""What docs/reliability.md says of each fault: from the rows of tests/faults/table.py and from what tests recorded."""

from __future__ import annotations

import ast
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
    passed = {test.name for test in tests if test.outcome == "passed"}
    tests = [test for test in tests if test.outcome != "skipped" or test.name not in passed]  # it ran elsewhere
    recorded = {test.function for test in tests}
    waiting = {function: rows for function, rows in marked().items() if function not in recorded}
    rows = []
    for row in ROWS:
        not_run = [function for function, numbers in waiting.items() if row.number in numbers]
        rows.append((row, [test for test in tests if row.number in test.rows], not_run))
    overview = ["| row | fault | state | tests |", "| --- | --- | --- | --- |"]
    overview += [f"| {row[0].number} | {row[0].title} | {_state(*row)} | {_count(row[1])} |" for row in rows]
    parts = ["\n".join(overview), *(_section(*row) for row in rows), _exceptions(), _provenance(contents)]
    return "\n\n".join(parts) + "\n"


def marked() -> dict[str, set[int | str]]:
    """The rows that each test says it proves, by `file::function`."""
    found: dict[str, set[int | str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        of_file = _rows_in(
            node for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)
        )
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                rows = of_file | _rows_in(node.decorator_list)
                if rows:
                    found[f"{path.relative_to(ROOT)}::{node.name}"] = rows
    return found


def _rows_in(nodes: Iterable[ast.AST]) -> set[int | str]:
    return {
        ast.literal_eval(argument)
        for node in nodes
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.fault"
        for argument in call.args
    }


class _Test:
    """A recorded case of a test."""

    def __init__(self, name: str, entry: dict[str, Any]) -> None:
        self.name, self.function = name, name.split("[")[0]
        self.rows: list[int | str] = entry["rows"]
        self.outcome: str = entry["outcome"]
        self.reason: str = entry.get("reason", "")
        self.figures: dict[str, Any] = entry["figures"]
        self.device: str = entry["device"]


def _state(row: Any, tests: list[_Test], waiting: list[str]) -> str:
    outcomes = {test.outcome for test in tests}
    if "failed" in outcomes:
        return "**fails**"
    if "passed" not in outcomes:
        return "not run" if waiting else "not covered"
    return "partly" if row.missing or waiting or "skipped" in outcomes else "proved"


def _count(tests: list[_Test]) -> str:
    return f"{sum(test.outcome == 'passed' for test in tests)} of {len(tests)} passed" if tests else ""


def _section(row: Any, tests: list[_Test], waiting: list[str]) -> str:
    lines = [f"## {row.number}. {row.title}", "", f"{row.fault}.", "", f"To reach: {row.figure}.", ""]
    lines += [f"State: {_state(row, tests, waiting)}." + (f" Not shown here: {row.missing}." if row.missing else "")]
    functions: dict[str, list[_Test]] = {}
    for test in tests:
        functions.setdefault(test.function, []).append(test)
    told = [*(_line(function, cases) for function, cases in functions.items()),
            *(f"- `{function}`: not run" for function in waiting)]  # fmt: skip
    lines += ["", *told] if told else []
    return "\n".join(lines)


def _line(function: str, cases: list[_Test]) -> str:
    devices = dict.fromkeys(case.device for case in cases)
    said = [_said([case for case in cases if case.device == device]) for device in devices]
    if len(said) > 1:
        said = [f"{device}: {text}" for device, text in zip(devices, said, strict=True)]
    return f"- `{function}`: {'. '.join(said)}"


def _said(cases: list[_Test]) -> str:
    """Outcomes and figures of a test on one device."""
    outcomes = [case.outcome for case in cases]
    told = [
        f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped") if outcome in outcomes
    ]
    reasons = sorted({case.reason for case in cases if case.reason})
    figures = [f"{name}: {_figure([case.figures[name] for case in cases if name in case.figures])}"
               for name in dict.fromkeys(name for case in cases for name in case.figures)]  # fmt: skip
    return "; ".join([", ".join(told) + (f" ({'; '.join(reasons)})" if reasons else ""), *figures])


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
