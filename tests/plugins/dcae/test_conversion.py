"""`dcae convert` into a folder: there whole or not at all, and what is there is replaced or stays."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.faults.child import in_a_fork, run_as_program
from tests.faults.fail_at_call import FailAtCall
from tests.faults.limited_disk import limited_disk
from tests.faults.watch_files import WatchFiles, contents
from tests.plugins.dcae.test_autoencoder import small
from typer.testing import CliRunner

from pronghorn.checkpoint.card import write_report
from pronghorn.dcae.cli import app
from pronghorn.dcae.diffusers.loading import load_dcae
from pronghorn.files.sealed import check_seal

WEIGHTS = "diffusion_pytorch_model.safetensors"
OFFICIAL = ["--to", "efficientvit", "--name", "mine"]


def run(*words):
    done = CliRunner().invoke(app, ["convert", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def sources(tmp_path):
    """Two autoencoders of different weights, in a folder of their own."""
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        small(scaling_factor=0.5).save_pretrained(tmp_path / "sources" / name)
    return tmp_path / "sources"


@pytest.fixture
def out(sources, tmp_path):
    """What was converted of the first."""
    place = tmp_path / "place"
    place.mkdir()
    run(sources / "one", place / "out", "--no-report")
    return place / "out"


def test_a_checkpoint_that_is_there_is_replaced_by_all_of_the_new_one(sources, out):
    (out / "README.md").write_text("of the first")
    said = run(sources / "two", out)
    assert said.count(str(out)) == 2
    theirs, ours = (load_file(folder / WEIGHTS) for folder in (sources / "two", out))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "quality.json" in json.loads((out / "pronghorn.json").read_text())["files"]
    assert 'from_pretrained("out")' in (out / "README.md").read_text()
    run(sources / "two", out, *OFFICIAL, "--no-report")  # another layout leaves nothing of the first
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "pronghorn.json"}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.fault(1)
def test_the_official_layout_is_sealed_too(sources, out):
    run(sources / "one", out, *OFFICIAL)
    assert check_seal(out)
    load_dcae(out)
    path = out / "config.json"
    path.write_text(path.read_text().replace("0.5", "0.25"))  # another scaling factor, which nothing else could tell
    with pytest.raises(ValueError, match=r"config\.json: damaged or changed"):
        load_dcae(out)


def test_into_a_link_to_a_folder(sources, out):
    link = out.with_name("link")
    link.symlink_to(out)
    run(sources / "two", link)
    assert link.is_symlink()
    assert (out / "quality.json").is_file()
    assert {path.name for path in out.parent.iterdir()} == {"out", "link"}


def test_what_no_conversion_wrote_is_never_lost(sources, out, monkeypatch):
    def refused(error, match, source, output):
        before = contents(out.parent)
        with pytest.raises(error, match=match):
            run(source, output)
        assert contents(out.parent) == before

    refused(ValueError, "is or holds the source", out, out)
    refused(ValueError, "is or holds the source", out, out.parent)
    monkeypatch.chdir(out)
    refused(ValueError, "is or holds the working folder", sources / "one", ".")
    monkeypatch.undo()
    refused(FileExistsError, "is no folder", sources / "one", out / WEIGHTS)
    (out / "samples").mkdir()
    refused(FileExistsError, "has samples, which no conversion wrote", sources / "one", out)
    (out / "samples").rmdir()
    (out / "notes.txt").write_text("mine")
    refused(FileExistsError, r"has notes\.txt, which no conversion wrote", sources / "one", out)


@pytest.mark.fault(8)
@pytest.mark.parametrize("place", ["weights", "report"])
def test_a_conversion_that_fails_midway_leaves_what_was_there(sources, out, place, monkeypatch):
    before = contents(out)
    error = OSError(5, "no more")
    if place == "weights":
        fails = FailAtCall(None, 1, error)
        monkeypatch.setattr("diffusers.models.modeling_utils.safetensors.torch.save_file", fails)
    else:
        fails = FailAtCall(write_report, 1, error)
        monkeypatch.setattr("pronghorn.dcae.report.write_report", fails)
    for target in (out, out.with_name("new")):
        fails.count = 0
        with pytest.raises(OSError, match="no more"):
            run(sources / "two", target)
        assert fails.fired
    assert contents(out) == before
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.fault(10)
@pytest.mark.parametrize("layout", [[], OFFICIAL])
@pytest.mark.parametrize("size", [10, 5000])
def test_no_room_leaves_what_was_there(sources, out, layout, size):
    """Files of 10 bytes stop at configurations, of 5,000 at weights."""
    before = contents(out)
    for target in (out, out.with_name("new")):
        with limited_disk(size), pytest.raises(OSError, match=rf"bytes are needed, \d+ bytes are free: '{target}"):
            run(sources / "two", target, *layout)
    assert contents(out) == before
    assert list(out.parent.iterdir()) == [out]


def converted(source, folder, kill_at, notes):
    watch = WatchFiles(folder, kill_at)
    run(source, folder / "out")
    notes.write_text(json.dumps(watch.seen))


def is_whole(folder):
    names = {"config.json", WEIGHTS, "pronghorn.json", "quality.json", "README.md"}
    return {path.name for path in folder.iterdir()} == names and check_seal(folder)


def killed(folder):
    """Conversions into a folder that is there, killed before each change to the disk; what became of it."""
    torch.set_num_threads(1)
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        small().save_pretrained(folder / name)
    new = (folder / "new" / WEIGHTS).read_bytes()
    place, notes, seen = folder / "place", folder / "notes", []
    for point in range(1, 1000):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / "old", place / "out")
        status = in_a_fork(converted, folder / "new", place, point, notes)
        if status == 0:
            break
        found, aside = contents(place / "out"), contents(place / ".out.replaced")
        old = contents(folder / "old")
        state = "old" if found == old else "aside" if found is None and aside == old else "half"
        if state == "half" and is_whole(place / "out") and (place / "out" / WEIGHTS).read_bytes() == new:
            state = "new"
        again = in_a_fork(converted, folder / "new", place, 0, notes) == 0 and is_whole(place / "out")
        seen.append({"signal": status, "state": state, "again": again})
    return seen


@pytest.mark.fault(8)
@pytest.mark.slow
def test_killed_anywhere_it_has_its_report_or_is_the_old_one(tmp_path, figure):
    seen = run_as_program(__file__, tmp_path)
    states = [entry["state"] for entry in seen]
    figure("killed with SIGKILL", len(seen))
    figure("half-written folders", states.count("half"))
    assert len(seen) >= 10
    assert {entry["signal"] for entry in seen} == {9}
    assert "half" not in states
    assert {"old", "new"} <= set(states)
    assert all(entry["again"] for entry in seen)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(killed(Path(sys.argv[1]))) + "\n")
