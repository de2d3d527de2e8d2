"""Commands that write checkpoints, where there is no room or no permission: said before the work, or with its bytes."""

import json
import shutil
from itertools import product

import pytest
from tests.faults.fail_at_call import FailAtCall
from tests.faults.limited_disk import limited_disk
from tests.plugins.dcae.test_autoencoder import small
from typer.testing import CliRunner

from pronghorn.awq.search import AwqSearch
from pronghorn.checkpoint.card import write_report
from pronghorn.cli import app
from pronghorn.duoattention import DuoAttentionConfig
from pronghorn.files.sealed import check_seal

PACKING = ["--group-size", "32", "--device", "cpu"]
SEARCHING = [*PACKING, "--samples", "1", "--seq-len", "32", "--no-clip"]
NAMES = ["search", "quantize", "pack", "convert", "apply", "autoencoder"]
# Where each finds what writes its report.
REPORTS = {
    "quantize": "pronghorn.transformers.quality", "pack": "pronghorn.transformers.quality",
    "convert": "pronghorn.awq.report", "apply": "pronghorn.transformers.quality",
    "autoencoder": "pronghorn.dcae.report",
}  # fmt: skip


def call(arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def commands(letters, tmp_path_factory):
    """By name, the arguments that write to a path; each has been seen to work."""
    folder = tmp_path_factory.mktemp("made")
    pattern, data = folder / "pattern", folder / "data.txt"
    DuoAttentionConfig(gates=[[0.9, 0.1], [0.2, 0.7]]).save_pretrained(pattern)
    small().save_pretrained(folder / "vae")
    data.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    made = {
        "search": lambda out: ["awq", "search", letters, out, "--data", data, *SEARCHING],
        "quantize": lambda out: ["awq", "quantize", letters, out, "--data", data, *SEARCHING, "--no-report"],
        "pack": lambda out: ["awq", "pack", letters, folder / "search", out, *PACKING, "--no-report"],
        "convert": lambda out: ["awq", "convert", folder / "quantize", out, "--to", "gemv"],
        "apply": lambda out: ["duoattention", "apply", letters, pattern, out, "--no-report"],
        "autoencoder": lambda out: ["dcae", "convert", folder / "vae", out, "--no-report"],
    }
    for name in NAMES:
        found = call(made[name](folder / name))
        assert found.exit_code == 0, (name, found.output, found.exception)
    return made


@pytest.fixture
def no_search(monkeypatch):
    """A search is too late."""
    monkeypatch.setattr(AwqSearch, "run", lambda *_: pytest.fail("the search began"))


@pytest.mark.fault(10)
@pytest.mark.parametrize(("name", "size"), [("search", 100), *product(NAMES[1:], (100, 5000))])
def test_no_room(commands, name, size, tmp_path):
    """Files of 100 bytes stop at configurations, of 5,000 at weights."""
    with limited_disk(size):
        found = call(commands[name](tmp_path / "out"))
    assert isinstance(found.exception, OSError), found.exception
    assert "bytes are needed" in str(found.exception)
    assert "bytes are free" in str(found.exception)
    assert str(tmp_path / "out") in str(found.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(10)
@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("name", NAMES)
def test_no_permission(commands, name):
    for place in ("/proc/out", "/proc/nope/out"):
        found = call(commands[name](place))
        assert isinstance(found.exception, OSError), found.exception
        assert f"{place!r}" in str(found.exception)
        assert "cannot be made" in str(found.exception)


DRY = ["search", "quantize", "pack", "convert", "apply"]


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_leaves_nothing(commands, name, tmp_path):
    found = call([*commands[name](tmp_path / "out"), "--dry-run"])
    assert found.exit_code == 0, (found.output, found.exception)
    assert "peak memory" in found.output
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(10)
@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_says_so_too(commands, name):
    found = call([*commands[name]("/proc/nope/out"), "--dry-run"])
    assert isinstance(found.exception, OSError), found.output
    assert "cannot be made" in str(found.exception)


@pytest.mark.fault(10)
@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("name", NAMES[1:])
def test_no_room_is_said_before_the_work(commands, name, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    found = call(commands[name](tmp_path / "out"))
    assert isinstance(found.exception, OSError), found.exception
    assert "bytes are needed, 10 bytes are free" in str(found.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(10)
@pytest.mark.usefixtures("no_search")
def test_a_search_is_no_folder(commands, tmp_path):
    found = call(commands["search"](tmp_path))
    assert isinstance(found.exception, IsADirectoryError)


@pytest.mark.fault(10)
@pytest.mark.parametrize("method", ["awq", "dcae", "duoattention", "vlash"])
def test_a_bench_measures_nothing_that_it_cannot_write(method, tmp_path):
    """Said before the model is looked for."""
    for out, reason in ((tmp_path, "is a folder"), (tmp_path / "nodir" / "b.json", "in a folder that is there")):
        found = call([method, "bench", "/nowhere", "--json", out])
        assert isinstance(found.exception, ValueError), found.exception
        assert "json: got" in str(found.exception)
        assert reason in str(found.exception)


@pytest.mark.fault(8)
@pytest.mark.parametrize("name", REPORTS)
def test_a_checkpoint_has_its_report_before_it_has_its_name(commands, name, tmp_path, monkeypatch):
    arguments = [word for word in commands[name](tmp_path / "out") if word != "--no-report"]
    with monkeypatch.context() as patch:
        fails = FailAtCall(write_report, 1, OSError(5, "killed, so to speak"))
        patch.setattr(f"{REPORTS[name]}.write_report", fails)
        assert isinstance(call(arguments).exception, OSError)
        assert fails.fired
    assert not list(tmp_path.iterdir())
    found = call(arguments)
    assert found.exit_code == 0, found.output
    folder = tmp_path / "out"
    assert str(folder) in found.output
    assert ".out." not in found.output + (folder / "README.md").read_text()
    assert "quality.json" in json.loads((folder / "pronghorn.json").read_text())["files"]
    (folder / "README.md").write_text("edited")
    assert check_seal(folder)
