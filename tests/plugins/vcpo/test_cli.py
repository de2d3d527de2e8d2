"""The command, as users type it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.plugins.vcpo.test_report import PICTURES, heavy_run, write_run
from typer.testing import CliRunner

from pronghorn.vcpo.cli import app
from pronghorn.vcpo.records import STEPS_FILE, RunRecords

ROOT = Path(__file__).parents[3]


def run(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def pronghorn(*words):
    command = [sys.executable, "-c", "from pronghorn.cli import main; main()", "vcpo", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)


def test_report(tmp_path):
    heavy_run(tmp_path / "run")
    said = run("report", tmp_path / "run", "--output", tmp_path / "out")
    for name in (*PICTURES, "summary.json"):
        assert (tmp_path / "out" / name).exists()
        assert str(tmp_path / "out" / name) in said.splitlines()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert f"mean {summary['ess_ratio_mean']:.3f}" in said
    assert "60, from 201 to 260" in said
    assert "their variance is infinite" in said
    assert f"{len(summary['warnings'])}, first in step 241" in said
    assert "the run itself truncated" not in said
    assert len([line for line in said.splitlines() if line.startswith("│ ") and line.count("│") == 7]) == 13


def test_report_beside_the_records(tmp_path):
    """Few trajectories, and another truncation than the run had."""
    write_run(tmp_path, [[0.0, 3.0]] * 2)
    said = run("report", tmp_path, "--truncation", 4)
    assert (tmp_path / "summary.json").exists()
    assert "50.0%, at 4" in said
    assert "but the run itself truncated at 8" in said
    assert "too few trajectories" in said


def test_report_without_lag(tmp_path):
    write_run(tmp_path, [[0.0] * 10] * 20)
    said = run("report", tmp_path)
    assert "no tail" in said
    assert "none" in said


def test_a_long_table_is_thinned(tmp_path):
    write_run(tmp_path, [[0.0] * 40], [range(40)])
    said = run("report", tmp_path)
    assert "one row of 3; summary.json has all" in said
    assert "│ 39 " in said
    assert len(json.loads((tmp_path / "summary.json").read_text())["by_staleness"]) == 40


def test_help():
    assert "report" in run("--help")
    said = run("report", "--help")
    assert "--truncation" in said
    assert "RUN" in said


@pytest.mark.parametrize("kind", ["nowhere", "empty folder", "empty run", "torn", "damaged"])
def test_mistakes_are_one_line(tmp_path, kind):
    folder, wanted = tmp_path, "wanted the folder of a run that kept records"
    if kind == "nowhere":
        folder = tmp_path / "nowhere"
    elif kind == "empty run":
        RunRecords(folder)
        wanted = "the records hold no whole step"
    elif kind in ("torn", "damaged"):
        write_run(folder, [[0.0, 1.0]] * (1 if kind == "torn" else 2))
        path = folder / STEPS_FILE
        path.write_text(path.read_text()[:-9] if kind == "torn" else "{\n" + path.read_text())
        wanted = "the records hold no whole step" if kind == "torn" else "vcpo_steps.jsonl, line 1"
    found = pronghorn("report", folder)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    last = found.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert wanted in last
    assert not list(tmp_path.rglob("*.png"))


def test_the_truncation_is_checked(tmp_path):
    write_run(tmp_path, [[0.0, 1.0]])
    found = pronghorn("report", tmp_path, "--truncation", 0)
    assert found.returncode == 1
    assert found.stderr.splitlines() == ["Error: truncation: got 0.0, wanted a positive number"]
