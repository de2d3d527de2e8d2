"""Records of a run: what is written is read, and a crash costs no more than the step that it interrupted."""

import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.faults.limited_disk import limited_disk

from pronghorn.vcpo.records import (
    STEP_KEYS,
    STEPS_FILE,
    TRAJECTORIES_FILE,
    TRAJECTORY_KEYS,
    WHOLE,
    RunRecords,
    read_run,
)

ROOT = Path(__file__).parents[3]


def trajectory_row(step, number=0, lag=0, **values):
    row = {
        "step": step, "uid": f"{step}-{number}", "group": number // 2, "param_version_start": step - lag,
        "param_version_end": step, "trainer_version": step, "prompt_length": 5, "response_length": 7, "reward": 0.5,
        "advantage": -1.0, "grad_norm": 2.0, "grad_norm_unscaled": 2.0, "k3_kl": 0.01, "geometric_mean_ratio": 1.0,
        "ratio": 1.0, "clipped_ratio": 1.0, "log_ratio": 0.0,
    }  # fmt: skip
    return row | values


def step_row(step, trajectories, **values):
    row = {
        "step": step, "ess": 2.0, "ess_ratio": 0.5, "ess_clipped": 2.0, "ess_ratio_clipped": 0.5, "ess_reference": 1.0,
        "learning_rate": 1e-6, "learning_rate_scale": 0.7, "grad_norm": 0.1, "reward": 0.5, "staleness_mean": 1.0,
        "staleness_max": 3, "trajectories": trajectories,
    }  # fmt: skip
    return row | values


def write(folder, steps, size=4):
    records = RunRecords(folder)
    for step in steps:
        records.append(step_row(step, size), [trajectory_row(step, number, min(step, 3)) for number in range(size)])
    return records


def without_checksums(path):
    """Lines of a file as an older Pronghorn wrote them."""
    return re.sub(r', "crc32": \d+', "", path.read_text()).splitlines()


def contents(folder):
    return [(folder / name).read_bytes() for name in (STEPS_FILE, TRAJECTORIES_FILE)]


def test_what_is_written_is_read(tmp_path):
    records = RunRecords(tmp_path / "new" / "run")
    assert records.last_step is None
    first = [trajectory_row(3, 0, 2, uid="a", group="prompt"), trajectory_row(3, 1, 0, uid=7)]
    records.append(step_row(3, 2), first)
    records.append(step_row(5, 0), [])
    records.append(step_row(6, 1, ess=1.25), [trajectory_row(6, reward=-0.125)])
    assert records.last_step == 6
    run = read_run(tmp_path / "new" / "run")
    assert list(run.steps) == list(STEP_KEYS)
    assert list(run.trajectories) == list(TRAJECTORY_KEYS)
    assert run.steps["step"].tolist() == [3, 5, 6]
    assert run.steps["ess"].tolist() == [2.0, 2.0, 1.25]
    assert run.trajectories["uid"].tolist() == ["a", 7, "6-0"]
    assert run.trajectories["group"].tolist() == ["prompt", 0, 0]
    assert run.trajectories["reward"].tolist() == [0.5, 0.5, -0.125]
    assert run.staleness.tolist() == [2, 0, 0]
    for columns, keys in ((run.steps, STEP_KEYS), (run.trajectories, TRAJECTORY_KEYS)):
        for name, kind in keys.items():
            assert columns[name].dtype == {"a name": object, WHOLE: np.int64}.get(kind, np.float64)


@pytest.mark.fault(25)
def test_numbers_that_are_not_finite(tmp_path):
    """The words are JSON for every reader; JSON's own extension and null are read too."""
    values = [math.inf, -math.inf, math.nan, None, np.float32(0.5), 3]
    RunRecords(tmp_path).append(
        step_row(1, len(values), reward=math.nan), [trajectory_row(1, ratio=value) for value in values]
    )
    wanted = [math.inf, -math.inf, math.nan, math.nan, 0.5, 3.0]
    np.testing.assert_array_equal(read_run(tmp_path).trajectories["ratio"], wanted)
    assert math.isnan(read_run(tmp_path).steps["reward"][0])
    path = tmp_path / TRAJECTORIES_FILE

    def refuse(word):
        raise AssertionError(word)

    words = [json.loads(line, parse_constant=refuse)["ratio"] for line in path.read_text().splitlines()]
    assert words == ["Infinity", "-Infinity", "NaN", "NaN", 0.5, 3.0]
    text = "\n".join(without_checksums(path)) + "\n"
    path.write_text(text.replace('"Infinity"', "Infinity").replace('"ratio": "NaN"', '"ratio": null'))
    np.testing.assert_array_equal(read_run(tmp_path).trajectories["ratio"], wanted)


@pytest.mark.parametrize(
    ("step", "rows", "message"),
    [
        (step_row(2, 1, ess="many"), [trajectory_row(2)], "step_row: ess: got 'many', wanted a number"),
        (step_row(2, 1, ess=True), [trajectory_row(2)], "step_row: ess: got True"),
        (step_row(2.5, 1), [trajectory_row(2)], "step_row: step: got 2.5, wanted a whole number"),
        (step_row(2, 1) | {"loss": 1.0}, [trajectory_row(2)], "step_row: got loss, which is none of its keys"),
        (step_row(2, 1), [trajectory_row(2, uid=None)], r"trajectory_rows\[0\]: uid: got None, wanted a name"),
        (step_row(2, 1), [trajectory_row(2, prompt_length=-1)], "prompt_length: got -1, wanted a whole number of"),
        (step_row(2, 1), [{"step": 2}], r"trajectory_rows\[0\]: got no uid; no group"),
        (step_row(2, 1), [trajectory_row(2, lag=-1)], "param_version_start 3, which is after its trainer_version 2"),
        (step_row(2, 1), [trajectory_row(1)], r"trajectory_rows\[0\]: got step 1, wanted step_row's 2"),
        (step_row(2, 2), [trajectory_row(2)], "says 2 trajectories, trajectory_rows has 1"),
        (step_row(1, 1), [trajectory_row(1)], "got step 1, but .*vcpo_steps.jsonl goes to 1; .* truncate first"),
    ],
)
def test_mistakes_of_the_writer_change_nothing(tmp_path, step, rows, message):
    records = write(tmp_path, [1])
    before = contents(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        records.append(step, rows)
    assert contents(tmp_path) == before
    records.append(step_row(2, 0), [])


@pytest.mark.fault(10)
def test_a_full_disk_leaves_whole_steps(tmp_path):
    records = write(tmp_path, [1, 2])
    before = contents(tmp_path)
    for room in (len(before[1]) + 700, len(before[1]) + 2):  # in the middle of a line, and of the first one
        with limited_disk(room), pytest.raises(OSError, match="large"):
            records.append(step_row(3, 4), [trajectory_row(3, number) for number in range(4)])
        assert contents(tmp_path) == before
    records.append(step_row(3, 1), [trajectory_row(3)])
    assert read_run(tmp_path).steps["step"].tolist() == [1, 2, 3]


def test_a_line_of_the_step_that_fails_takes_its_trajectories_along(tmp_path, monkeypatch):
    from pronghorn.vcpo import records as room

    records = write(tmp_path, [1])
    before, append = contents(tmp_path), room._append

    def interrupted(path, rows):
        append(path, rows)
        if path.name == STEPS_FILE:
            raise KeyboardInterrupt

    monkeypatch.setattr(room, "_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.append(step_row(2, 1), [trajectory_row(2)])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [STEPS_FILE, TRAJECTORIES_FILE])
@pytest.mark.parametrize("missing", [1, 30])
@pytest.mark.fault(8)
def test_a_torn_last_line(tmp_path, caplog, name, missing):
    """Its step is left out by the reader, and cut off before a writer goes on."""
    write(tmp_path, [1, 2, 3])
    write(tmp_path / "whole", [1, 2])
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-missing])
    torn = contents(tmp_path)
    with caplog.at_level(logging.WARNING):
        run = read_run(tmp_path)
    assert f"{path}, line {len(path.read_bytes().splitlines())} is torn" in caplog.text
    assert run.steps["step"].tolist() == [1, 2]
    assert run.trajectories["step"].tolist() == [1] * 4 + [2] * 4
    assert contents(tmp_path) == torn
    records = RunRecords(tmp_path)
    assert records.last_step == 2
    assert contents(tmp_path) == contents(tmp_path / "whole")
    records.append(step_row(3, 1), [trajectory_row(3)])
    caplog.clear()
    assert read_run(tmp_path).steps["step"].tolist() == [1, 2, 3]
    assert not caplog.records


@pytest.mark.fault(8)
def test_a_step_without_its_line(tmp_path, caplog):
    """Killed between trajectories and the step's line, or read while a run goes on."""
    write(tmp_path, [1])
    with (tmp_path / TRAJECTORIES_FILE).open("a") as file:
        file.write(json.dumps(trajectory_row(2)) + "\n")
    with caplog.at_level(logging.WARNING):
        assert len(read_run(tmp_path).trajectories["step"]) == 4
    assert "what follows step 1 is not whole, as after a crash: 1 trajectories of it are left out" in caplog.text
    assert RunRecords(tmp_path).last_step == 1
    assert len((tmp_path / TRAJECTORIES_FILE).read_text().splitlines()) == 4


@pytest.mark.fault(8)
def test_killed_at_any_moment(tmp_path):
    """SIGKILL before the n-th flush to disk: whole steps stay, and the run goes on."""
    code = (
        "import os, sys; from tests.faults.kill_at import KillAt; from tests.plugins.vcpo.test_records import write\n"
        "KillAt(int(sys.argv[1]), [(os, 'fsync')]); write(sys.argv[2], [1, 2])"
    )
    for call, last in ((1, None), (2, 1), (3, 1), (4, 2)):
        folder = tmp_path / str(call)
        done = subprocess.run([sys.executable, "-c", code, str(call), str(folder)], cwd=ROOT, timeout=60)
        assert done.returncode == -9
        assert RunRecords(folder).last_step == last
        found = write(folder, [3])
        assert found.last_step == 3
        assert read_run(folder).steps["step"].tolist() == [*range(1, (last or 0) + 1), 3]


@pytest.mark.fault(1)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (STEPS_FILE, lambda lines: [lines[0], "nonsense", lines[2]], "vcpo_steps.jsonl, line 2: got b'nonsense"),
        (STEPS_FILE, lambda lines: [lines[0], "[1]", lines[2]], "line 2: .* wanted an object of JSON"),
        (STEPS_FILE, lambda lines: [lines[0], lines[2], lines[1]], "line 3: got step 2 after step 3"),
        (STEPS_FILE, lambda lines: [lines[0], lines[0], lines[2]], "line 2: got step 1 after step 1"),
        (STEPS_FILE, lambda lines: [lines[0], lines[2]], "vcpo_stats.jsonl: step 2 has no line in vcpo_steps.jsonl"),
        (STEPS_FILE, lambda lines: [*lines[:2], lines[2].replace("ess_ratio", "x")], "line 3: got no ess_ratio"),
        (TRAJECTORIES_FILE, lambda lines: lines[1:], "step 1 has 3 trajectories, .* says 4"),
        (TRAJECTORIES_FILE, lambda lines: [*lines[:5], lines[5].replace("0.5", '"x"'), *lines[6:]],
         "vcpo_stats.jsonl, line 6: reward: got 'x', wanted a number"),
    ],
)  # fmt: skip
def test_damage_elsewhere_names_file_and_line(tmp_path, name, change, message):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / name
    path.write_text("\n".join(change(without_checksums(path))) + "\n")
    for use in (read_run, RunRecords):
        before = contents(tmp_path)
        with pytest.raises((ValueError, TypeError), match=message):
            use(tmp_path)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("after_step", [-1, 0, 2, 3, 4, 9])
def test_truncate(tmp_path, after_step):
    """A run that goes on from a checkpoint has each step once."""
    records = write(tmp_path / "run", [1, 2, 4, 5])
    records.truncate(after_step)
    kept = [step for step in (1, 2, 4, 5) if step <= after_step]
    write(tmp_path / "wanted", kept)
    assert contents(tmp_path / "run") == contents(tmp_path / "wanted")
    assert records.last_step == (kept[-1] if kept else None)
    records.append(step_row(10, 1), [trajectory_row(10)])
    assert read_run(tmp_path / "run").steps["step"].tolist() == [*kept, 10]


def test_truncate_wants_a_step(tmp_path):
    with pytest.raises(ValueError, match=r"after_step: got 1\.5"):
        RunRecords(tmp_path).truncate(1.5)


def test_folders_without_records(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vcpo_steps\.jsonl and no vcpo_stats\.jsonl; wanted the folder"):
        read_run(tmp_path)
    write(tmp_path, [1])
    (tmp_path / STEPS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"no vcpo_steps\.jsonl; wanted"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="is gone"):
        RunRecords(tmp_path)


def test_an_empty_run(tmp_path):
    RunRecords(tmp_path)
    run = read_run(tmp_path)
    assert len(run.steps["step"]) == len(run.trajectories["uid"]) == len(run.staleness) == 0
