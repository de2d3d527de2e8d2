"""A scaling factor that is written into a checkpoint, where there is no room, or the command is killed."""

import errno
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests.faults.child import in_a_fork, run_as_program
from tests.faults.fail_at_call import FailAtCall
from tests.faults.limited_disk import limited_disk
from tests.faults.watch_files import WatchFiles, contents
from tests.plugins.dcae.test_autoencoder import small
from tests.plugins.dcae.test_crops import picture
from typer.testing import CliRunner

from pronghorn.dcae import AutoencoderDC
from pronghorn.dcae.cli import app
from pronghorn.dcae.diffusers import scaling
from pronghorn.files.sealed import check_seal


@pytest.fixture
def folder(tmp_path):
    small().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.fault(10)
@pytest.mark.parametrize("sealed", [True, False])
def test_no_room_leaves_the_folder_as_it_was(folder, sealed):
    if not sealed:
        (folder / "pronghorn.json").unlink()
    before = contents(folder)
    with limited_disk(10), pytest.raises(OSError, match=r"config\.json") as found:
        scaling.write_scaling_factor(folder, 0.5)
    assert "bytes are needed" in str(found.value)
    assert contents(folder) == before
    scaling.write_scaling_factor(folder, 0.5)
    assert AutoencoderDC.from_pretrained(folder).config.scaling_factor == 0.5
    assert check_seal(folder) == sealed


@pytest.mark.fault(10)
def test_no_room_for_the_seal_leaves_the_folder_as_it_was(folder, monkeypatch):
    before = contents(folder)
    fails = FailAtCall(scaling.seal, 1, OSError(errno.ENOSPC, "full"))
    monkeypatch.setattr(scaling, "seal", fails)
    with pytest.raises(OSError, match="full"):
        scaling.write_scaling_factor(folder, 0.5)
    assert fails.fired
    assert contents(folder) == before


@pytest.mark.fault(8)
def test_what_is_changed_besides_is_still_refused(folder, monkeypatch):
    """The folder is made whole by what was kept of it, and not by sealing what lies there."""
    before = (folder / "config.json").read_bytes()
    monkeypatch.setattr(scaling, "seal", FailAtCall(scaling.seal, 1, KeyboardInterrupt()))
    monkeypatch.setattr(scaling, "_recover", lambda folder: None)
    with pytest.raises(KeyboardInterrupt):
        scaling.write_scaling_factor(folder, 0.5)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"config\.json: damaged or changed"):
        AutoencoderDC.from_pretrained(folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"safetensors: damaged or changed"):
        scaling.write_scaling_factor(folder, 0.5)
    assert (folder / "config.json").read_bytes() == before


def scaled(place, images):
    words = ["stats", place / "vae", images, "--size", 16, "--device", "cpu", "--write"]
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output


def watched(place, images, kill_at, notes):
    watch = WatchFiles(place, kill_at)
    scaled(place, images)
    notes.write_text(json.dumps(watch.seen))


def killed(folder):
    """Commands killed before each change to the disk, and then given again; what became of the folder."""
    torch.set_num_threads(1)
    small().save_pretrained(folder / "vae")
    images, place, notes = folder / "images", folder / "place", folder / "notes"
    images.mkdir()
    picture(16, 16).save(images / "one.png")
    shutil.copytree(folder / "vae", folder / "first" / "vae")
    scaled(folder / "first", images)  # imports once what each fork would
    shutil.copytree(folder / "vae", place / "vae")
    assert in_a_fork(watched, place, images, 0, notes) == 0
    old, new, changes = contents(folder / "vae"), contents(place / "vae"), json.loads(notes.read_text())
    seen = []
    for point in range(1, len(changes) + 1):
        shutil.rmtree(place)
        shutil.copytree(folder / "vae", place / "vae")
        status = in_a_fork(watched, place, images, point, notes)
        try:
            whole = check_seal(place / "vae")
        except ValueError:
            whole = False
        again = in_a_fork(scaled, place, images)
        seen.append({"signal": status, "whole": whole, "again": again, "alike": contents(place / "vae") == new})
    return {"seen": seen, "changed": old != new}


@pytest.mark.fault(8)
@pytest.mark.slow
def test_the_same_command_mends_what_it_was_killed_in(tmp_path, figure):
    found = run_as_program(__file__, tmp_path)
    seen = found["seen"]
    figure("killed with SIGKILL", len(seen))
    assert found["changed"]
    assert len(seen) >= 4
    assert {entry["signal"] for entry in seen} == {9}
    assert not all(entry["whole"] for entry in seen), "no kill was between the configuration and the seal"
    assert all(entry["again"] == 0 and entry["alike"] for entry in seen), seen


if __name__ == "__main__":
    sys.stdout.write(json.dumps(killed(Path(sys.argv[1]))) + "\n")
