"""The table of faults, the marks of tests, and the page that is written from both say the same."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
RUN = {"date": "2026-01-01", "commit": "c" * 40, "dirty": False, "device": "CPU", "versions": {"torch": "2.13"}}


def by_path(path, name):
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page():
    return by_path("benchmarks/reliability.py", "reliability")


@pytest.fixture
def record():
    return by_path("tests/faults/record.py", "fault_record_again")


def test_every_row_has_a_test_or_a_reason(page):
    numbers = [row.number for row in page.ROWS]
    assert numbers == [*range(1, 29), "gates", "dry run"]
    proved = {row for rows in page.marked().values() for row in rows}
    assert proved <= set(numbers)
    assert {row.number for row in page.ROWS if not row.missing} <= proved


def test_the_page_claims_no_more_than_was_seen(page, tmp_path, monkeypatch):
    row = page.ROWS[9]
    assert not row.missing
    tests = {
        "t.py::test_a[1]": {"rows": [10, 9], "outcome": "passed", "seconds": 1, "figures": {"n": 1200}, "run": "r"},
        "t.py::test_a[2]": {"rows": [10, 9], "outcome": "passed", "seconds": 1, "figures": {"n": 7}, "run": "r"},
        "t.py::test_b": {"rows": [10], "outcome": "passed", "seconds": 1, "figures": {}, "run": "r"},
    }
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "marked", lambda: {test.split("[")[0]: {10} for test in tests})

    def said():
        content = {"topic": "reliability", "runs": {"r": RUN}, "tests": tests}
        (tmp_path / "reliability-cpu.json").write_text(json.dumps(content))
        return page.sections()

    text = said()
    assert f"| 10 | {row.title} | proved | 3 of 3 passed |" in text
    assert "- `t.py::test_a`: 2 passed; n: 7 to 1,200" in text
    assert f"| 11 | {page.ROWS[10].title} | not covered |  |" in text
    assert "commit cccccccccc, CPU: torch 2.13" in text
    recorded = tests.pop("t.py::test_b")
    monkeypatch.setattr(page, "marked", lambda: {"t.py::test_b": {10}})
    assert f"| {row.title} | partly | 2 of 2 passed |" in said()
    assert "- `t.py::test_b`: not run" in said()
    monkeypatch.setattr(page, "marked", lambda: {"t.py::test_b": {1}})
    assert f"| 1 | {page.ROWS[0].title} | not run |" in said()
    tests["t.py::test_b"] = recorded
    tests["t.py::test_b"] |= {"outcome": "skipped", "reason": "needs a GPU"}
    assert f"| {row.title} | partly | 2 of 3 passed |" in said()
    assert "- `t.py::test_b`: 1 skipped (needs a GPU)" in said()
    tests["t.py::test_b"]["outcome"] = "failed"
    assert f"| {row.title} | **fails** | 2 of 3 passed |" in said()


def test_what_one_machine_skips_another_may_show(page, tmp_path, monkeypatch):
    skipped = {"rows": [9], "outcome": "skipped", "reason": "needs a GPU", "seconds": 0, "figures": {}, "run": "r"}
    passed = {"rows": [9], "outcome": "passed", "seconds": 1, "figures": {"n": 2}, "run": "r"}
    ran = {
        "cpu": ("CPU", {"t.py::test_a[1]": skipped, "t.py::test_a[2]": skipped, "t.py::test_b": passed}),
        "gpu": ("GPU", {"t.py::test_a[1]": passed, "t.py::test_a[2]": skipped, "t.py::test_b": passed}),
    }
    for name, (device, tests) in ran.items():
        content = {"topic": "reliability", "runs": {"r": {**RUN, "device": device}}, "tests": tests}
        (tmp_path / f"reliability-{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "marked", dict)
    text = page.sections()
    assert f"| 9 | {page.ROWS[8].title} | partly | 3 of 5 passed |" in text
    assert "- `t.py::test_a`: CPU: 1 skipped (needs a GPU). GPU: 1 passed, 1 skipped (needs a GPU); n: 2" in text
    assert "- `t.py::test_b`: CPU: 1 passed; n: 2. GPU: 1 passed; n: 2" in text


def test_runs_are_merged_by_tests(record, tmp_path):
    here = f"tests/house/{Path(__file__).name}"
    path, entry = tmp_path / "found.json", {"rows": [9], "outcome": "passed", "seconds": 0.1, "figures": {}}
    gone, kept = f"{here}::test_that_is_gone", f"{here}::test_runs_are_merged_by_tests"
    cases = [f"{here}::test_every_row_has_a_test_or_a_reason[{case}]" for case in range(2)]
    record.merge(path, {**RUN, "date": "1"}, {gone: entry, kept: entry, cases[0]: entry})
    assert sorted(json.loads(path.read_text())["tests"]) == sorted([cases[0], kept, gone])
    record.merge(path, {**RUN, "date": "2"}, {cases[1]: {**entry, "outcome": "failed"}})
    content = json.loads(path.read_text())
    assert list(content["tests"]) == sorted([cases[1], kept])
    assert content["tests"][cases[1]] == {**entry, "outcome": "failed", "run": "2"}
    assert list(content["runs"]) == ["1", "2"]
    record.merge(path, {**RUN, "date": "3"}, {kept: entry})
    assert list(json.loads(path.read_text())["runs"]) == ["2", "3"]


def test_a_run_leaves_the_file_alone_until_its_end(record, tmp_path, monkeypatch):
    """Its own tests hold pages against what they were made from."""
    monkeypatch.setattr(record, "WRITE_SECONDS", 0)
    path, beside = tmp_path / "found.json", tmp_path / "found.unfinished"
    recorder = record.Recorder(path)
    name = "tests/house/test_reliability.py::test_a_run_leaves_the_file_alone_until_its_end"
    recorder.pytest_runtest_logreport(
        SimpleNamespace(
            nodeid=name, user_properties=[("fault rows", [9])], duration=0.5, outcome="passed", when="teardown"
        )
    )
    assert not path.exists()
    written = json.loads(beside.read_text())
    recorder.pytest_sessionfinish()
    assert json.loads(path.read_text()) == written
    assert not beside.exists()


def test_what_a_test_gives_is_recorded(record, tmp_path):
    recorder = record.Recorder(tmp_path / "found.json")

    def report(name, outcome="passed", rows=(9,), when="teardown", **more):
        properties = [("fault rows", list(rows)), ("figure: n", 3)] if rows else []
        return SimpleNamespace(
            nodeid=name, user_properties=properties, duration=0.5, outcome=outcome, when=when, **more
        )

    for when, outcome in (("setup", "passed"), ("call", "failed"), ("teardown", "passed")):
        recorder.pytest_runtest_logreport(report("t.py::test_x[a@b]@group", outcome, when=when))
    for when in ("setup", "call"):
        recorder.pytest_runtest_logreport(report("t.py::test_interrupted", when=when))
    recorder.pytest_runtest_logreport(report("t.py::test_y", "skipped", longrepr=("t.py", 1, "Skipped: no GPU")))
    recorder.pytest_runtest_logreport(report("t.py::test_z", rows=()))
    assert recorder.proved() == {
        "t.py::test_x[a@b]": {"rows": [9], "outcome": "failed", "seconds": 1.5, "figures": {"n": 3}},
        "t.py::test_y": {"rows": [9], "outcome": "skipped", "seconds": 0.5, "figures": {"n": 3}, "reason": "no GPU"},
    }
    assert sys.modules.get("fault_record_again") is None
