"""The commands, as users type them."""

import json
import time

import pytest
from tests.plugins.vlash.test_bench import Chunker
from tests.plugins.vlash.test_sweep import CountdownTask
from typer.testing import CliRunner

from pronghorn.vlash.cli import app

HERE = "tests.plugins.vlash.test_cli"


def run(*words, fails=False):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert (done.exit_code != 0) == fails, done.output
    return done.output


def network(device):
    import torch

    assert device == "cpu"
    return Chunker(), torch.randn(16, 8)


def slow(device):
    return lambda seconds: time.sleep(seconds), 0.03


def test_sweep(tmp_path):
    rows, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    words = ("sweep", "--task", "tests.plugins.vlash.test_sweep:CountdownTask", "--modes", "sync,vlash")
    said = run(*words, "--delays", "0:2", "--seeds", 2, "--json", rows, "--png", picture)
    assert [line.split()[1] for line in said.splitlines() if "0.500 ±0.000" in line] == ["sync", "vlash"]
    assert {str(rows), str(picture)} <= set(said.splitlines())
    assert picture.stat().st_size > 10_000
    content = json.loads(rows.read_text())
    assert content["task"] == CountdownTask.name
    assert len(content["rows"]) == 2 * 3 * 2
    # Another delay later: what was there stays.
    run(*words, "--delays", "3", "--seeds", 1, "--json", rows)
    assert len(json.loads(rows.read_text())["rows"]) == 2 * 3 * 2 + 2


def test_sweep_of_the_toy(tmp_path):
    words = ("--train-steps", 2, "--environments", 8, "--policies", tmp_path / "policies", "--seeds", 1)
    said = run("sweep", "--modes", "naive,vlash,vlash+delay", "--delays", "0,3", *words)
    assert "vlash+delay" in said
    assert "±" not in said
    assert len(list((tmp_path / "policies").iterdir())) == 3


def test_sweep_in_an_environment_without_lerobot(monkeypatch):
    monkeypatch.setattr("pronghorn.versions.installed", lambda library: None)
    with pytest.raises(ImportError, match=r"needs lerobot .*: pip install 'pronghorn\[lerobot\]'"):
        run("sweep", "--env", "pusht", "--policy", "anything")


def test_bench(tmp_path):
    out = tmp_path / "bench.json"
    said = run("bench", f"{HERE}:slow", "--samples", 3, "--warm-up", 1, "--fps", 50, "--json", out)
    figures = json.loads(out.read_text())
    assert len(figures["seconds"]) == 3
    assert figures["mean"] >= 0.03
    assert figures["inference_overlap_steps"] >= 2
    assert f"inference_overlap_steps {figures['inference_overlap_steps']}" in said
    said = run("bench", f"{HERE}:slow", "--samples", 2, "--warm-up", 0, "--fps", 100, "--n-action-steps", 2)
    assert "2 at 100 fps, 20 ms: too short, the robot would wait" in said


def test_profile():
    said = run("profile", f"{HERE}:network", "--device", "cpu")
    assert said.index("heavy.large") < said.index("light")
    assert "aten::addmm" in said


def test_help():
    said = run("--help")
    for name in ("sweep", "bench", "profile"):
        assert name in said
        assert "VLASH" in said


@pytest.mark.parametrize("delays", ["", "a", "3:1", "-1", "0:1:2", "1,,2"])
def test_bad_delays(delays):
    assert "wanted 0:4 or numbers with commas" in run("sweep", "--delays", delays, fails=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep", "--task", "nothing"], "task: got 'nothing', accepted are tracking and"),
        (["sweep", "--task", "no.such:thing"], "task: got 'no.such:thing', wanted package.module:function"),
        (["sweep", "--modes", "bid"], "modes: got bid, accepted for tracking are sync, .*vlash"),
        (["sweep", "--seeds", 0], "seeds: got 0"),
        (["sweep", "--env", "pusht"], "policy: got none with env='pusht', wanted a LeRobot checkpoint"),
        (["sweep", "--policy", "here"], "policy: got 'here' without env"),
        (["sweep", "--env", "pusht", "--task", "a:b"], "env: got 'pusht' beside task"),
        (["bench", f"{HERE}:nothing"], "policy: got .*:nothing.*no attribute"),
        (["bench", f"{HERE}:HERE"], "wanted a function, not str"),
        (["bench", f"{HERE}:slow", "--fps", 0], "fps, n_action_steps: got 0"),
        (["profile", f"{HERE}:network", "--device", "cpu", "--depth", 0], "depth, samples: got 0"),
    ],
)
def test_mistakes(words, said):
    with pytest.raises(ValueError, match=said):
        run(*words)
