"""The commands, as users type them."""

import importlib.util
import json
import time

import pytest
from tests.plugins.vlash.remote_calls import DESCRIPTION, ramp
from tests.plugins.vlash.test_bench import Chunker
from tests.plugins.vlash.test_sweep import CountdownTask
from typer.testing import CliRunner

from pronghorn.vlash.cli import MODES, app
from pronghorn.vlash.sweep import PICTURES

HERE = "tests.plugins.vlash.test_cli"


def run(*words, fails=False):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert (done.exit_code != 0) == fails, done.output
    return done.output


def network(device):
    import torch

    assert device == "cpu"
    return Chunker(), torch.randn(512, 8)  # enough work that no pause of the machine outweighs it


def slow(device):
    return lambda seconds: time.sleep(seconds), 0.03


def nothing_at_all(device):
    return None


def a_number(device):
    return 3


def the_wrong_way_round(device):
    return 0.03, slow


def served(device):
    return ramp, DESCRIPTION


def no_description(device):
    return ramp, "ramp"


def must_not_run(device):
    raise AssertionError("an option that is wrong is found before the work")


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
    with pytest.raises(ImportError, match=r"needs lerobot .*pip install 'pronghorn\[lerobot\]'"):
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


FUNCTION_MISTAKES = [
    (["bench", f"{HERE}:nothing_at_all"], r"policy: got .*, which gives NoneType; wanted \(callable, what it is"),
    (["profile", f"{HERE}:a_number"], r"policy: got .*, which gives int; wanted \(callable, "),
    (["bench", f"{HERE}:the_wrong_way_round"], r"which gives \(float, function\); wanted \(callable, "),
    (["serve", "--policy", f"{HERE}:nothing_at_all"], r"which gives NoneType; wanted \(policy, Description\)"),
    (["serve", "--policy", f"{HERE}:a_number"], r"which gives int; wanted \(policy, Description\)"),
    (["serve", "--policy", f"{HERE}:no_description"], r"which gives \(function, str\); wanted \(policy, Description\)"),
]


@pytest.mark.parametrize(("words", "said"), FUNCTION_MISTAKES)
def test_a_function_that_gives_something_else(words, said):
    with pytest.raises(ValueError, match=said):
        run(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mode", "bogus"], "mode: got 'bogus', accepted are sync, naive, rtc, rtc_full, vlash"),
        (["--mode", "sync"], "mode: got 'sync' with policy=.*:served', whose Description says it; wanted none"),
        (["--rename-map", "notjson"], "rename_map: got 'notjson', wanted a JSON object of names"),
        (["--rename-map", "[1]"], r"rename_map: got '\[1\]', wanted a JSON object of names"),
        (["--rename-map", '{"a": 1}'], "rename_map: got .* wanted a JSON object of names"),
        (["--rename-map", '{"a": "b"}'], "rename_map: got .* whose Description says it; wanted none"),
    ],
)
def test_options_that_a_served_function_would_not_see(words, said):
    with pytest.raises(ValueError, match=said):
        run("serve", "--policy", f"{HERE}:served", *words)


@pytest.mark.parametrize("command", [["bench"], ["profile"], ["serve", "--policy"]])
@pytest.mark.parametrize("path", ["./nonexist", "/nonexist", "outputs/train/checkpoints/last/pretrained_model"])
def test_a_checkpoint_that_is_not_there(command, path):
    with pytest.raises(ValueError, match=f"policy: got '{path}', wanted a folder .*; there is no such folder"):
        run(*command, path)


@pytest.mark.skipif(importlib.util.find_spec("lerobot") is not None, reason="LeRobot is here")
@pytest.mark.parametrize("command", [["bench"], ["profile"], ["serve", "--policy"]])
def test_a_checkpoint_without_lerobot(command, tmp_path):
    with pytest.raises(ImportError, match=r"pronghorn needs lerobot .*, it is not installed.*pip install"):
        run(*command, tmp_path)


SWEEP, BENCH = ["sweep", "--task", f"{HERE}:must_not_run"], ["bench", f"{HERE}:must_not_run"]


@pytest.mark.parametrize(
    ("words", "path", "said"),
    [
        ([*SWEEP, "--json"], "nodir/x.json", "json: got .*nodir/x.json', wanted a file in a folder that is there"),
        ([*SWEEP, "--json"], "", "json: got .*, which is a folder"),
        ([*SWEEP, "--png"], "nodir/x.png", "png: got .*nodir/x.png', wanted a file in a folder that is there"),
        ([*SWEEP, "--png"], "x.bmpx", "png: got .*x.bmpx', wanted a name that ends with .png, "),
        ([*SWEEP, "--png"], "x", "png: got .*x', wanted a name that ends with .png, "),
        ([*BENCH, "--json"], "nodir/b.json", "json: got .*nodir/b.json', wanted a file in a folder that is there"),
        ([*BENCH, "--json"], "", "json: got .*, which is a folder"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_the_work(words, path, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        run(*words, tmp_path / path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--train-steps", "--environments", "--seeds"])
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_counts_of_nothing(option, dry_run):
    with pytest.raises(ValueError, match=f"{option[2:].replace('-', '_')}: got 0, wanted at least 1"):
        run("sweep", option, 0, *dry_run)


def test_results_are_whole_or_not_there(tmp_path, monkeypatch):
    """A write that fails leaves what was there."""
    from pronghorn.files import atomic

    out, picture = tmp_path / "b.json", tmp_path / "p.png"
    words = ("sweep", "--task", "tests.plugins.vlash.test_sweep:CountdownTask", "--modes", "sync", "--seeds", 1)
    for path, command in (
        (out, ("bench", f"{HERE}:slow", "--samples", 1, "--json", out)),
        (picture, (*words, "--png", picture)),
    ):
        path.write_text("earlier")
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, "fsync", no_room)
            with pytest.raises(OSError, match="bytes are needed"):
                run(*command)
        assert path.read_text() == "earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"b.json", "p.png"}


def no_room(descriptor):
    raise OSError(28, "no room")


def test_help_names_the_modes():
    from pronghorn.vlash.tracking import TrackingTask

    assert f"Methods, with commas; of tracking: {', '.join(TrackingTask.modes)}." == MODES


def test_pictures_can_be_drawn():
    from matplotlib.figure import Figure

    assert {suffix[1:] for suffix in PICTURES} <= set(Figure().canvas.get_supported_filetypes())
