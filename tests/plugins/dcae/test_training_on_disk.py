"""Checkpoints of a training, on a disk that is full, torn by a loss of power, or of a process that is killed."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests.faults.child import in_a_fork, run_as_program
from tests.faults.fail_at_call import FailAtCall
from tests.faults.limited_disk import limited_disk
from tests.faults.watch_files import WatchFiles, contents
from tests.plugins.dcae.test_diffusion_training import config, dumped, logged, train, uvit

from pronghorn.dcae.diffusers.training import loop as loop_room
from pronghorn.files.sealed import check_seal


def steps_in(output):
    return sorted(path.name for path in (output / "checkpoints").iterdir())


@pytest.fixture
def latents(tmp_path):
    return dumped(tmp_path / "latents")


@pytest.fixture
def run(tmp_path, latents):
    """A folder with four steps of a training, and checkpoints of two of them."""
    train(uvit(), config(), latents, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.fault(10)
@pytest.mark.parametrize("largest", ["model.safetensors", "optimizer.bin", "mean.safetensors"])
def test_no_room_is_told_with_its_bytes_and_leaves_what_was_there(run, latents, largest):
    """Files are written in this order, each by another library."""
    folder = run / "checkpoints"
    before, sizes = contents(folder), {path.name: path.stat().st_size for path in (folder / "00000004").iterdir()}
    limit = {"model.safetensors": 5000, "optimizer.bin": sizes["model.safetensors"] + 1000}.get(largest)
    full = pytest.raises(OSError, match=r": \d+ bytes are needed, \d+ bytes are free: '.*/checkpoints/00000006'")
    if limit is None:
        with pytest.MonkeyPatch.context() as patch, full:
            patch.setattr(
                loop_room, "save_tensors", fails := FailAtCall(loop_room.save_tensors, 1, OSError(28, "full"))
            )
            train(uvit(), config(steps=6), latents, run)
        assert fails.fired
    else:
        with full, limited_disk(limit):
            train(uvit(), config(steps=6), latents, run)
    assert contents(folder) == before
    assert steps_in(run) == ["00000002", "00000004"]
    train(uvit(), config(steps=6), latents, run)
    assert steps_in(run) == ["00000004", "00000006"]


@pytest.mark.fault(10)
def test_room_is_looked_for_before_a_checkpoint_is_written(latents, tmp_path, monkeypatch):
    """As many bytes as it has, about; all but some are of tensors, in a model that is not as tiny."""
    model, run = uvit(hidden_size=64), tmp_path / "run"
    train(model, config(), latents, run)
    written = sum(path.stat().st_size for path in (run / "checkpoints/00000004").iterdir())
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    monkeypatch.setattr(loop_room.Accelerator, "save_state", lambda *_: pytest.fail("it was written"))
    with pytest.raises(OSError, match="bytes are needed, 10 bytes are free") as found:
        train(uvit(hidden_size=64), config(steps=6), latents, run)
    needed = int(str(found.value).split(" bytes are needed")[0].split()[-1])
    assert needed == pytest.approx(written, rel=0.05)
    assert steps_in(run) == ["00000002", "00000004"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.fault(10)
def test_no_room_for_the_model_leaves_the_one_that_is_there(run, latents):
    before = contents(run / "model")
    full = pytest.raises(OSError, match=r": \d+ bytes are needed, \d+ bytes are free: '.*/model'")
    with full, limited_disk(5000):
        train(uvit(), config(steps=5), latents, run)
    assert contents(run / "model") == before
    assert not list(run.glob(".*"))


@pytest.mark.fault(8)
@pytest.mark.parametrize("tear", [flip, Path.unlink], ids=["torn", "missing"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(run, latents, tear, tmp_path, caplog):
    whole = train(uvit(), config(steps=6), latents, tmp_path / "whole")
    tear(run / "checkpoints/00000004/optimizer.bin")
    with caplog.at_level(logging.WARNING):
        second = train(uvit(), config(steps=6), latents, run)
    told = [record.getMessage() for record in caplog.records if "goes on from" in record.getMessage()]
    assert len(told) == 1
    assert "00000004/optimizer.bin" in told[0]
    assert "00000002" in told[0]
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())
    assert [line["step"] for line in logged(run)] == [1, 2, 3, 4, 5, 6]
    assert steps_in(run) == ["00000004", "00000006"]
    assert check_seal(run / "checkpoints/00000004")


@pytest.mark.fault(8)
def test_where_all_are_torn_it_is_said_of_the_newest(run, latents):
    for name in ("00000002", "00000004"):
        flip(run / "checkpoints" / name / "optimizer.bin")
    with pytest.raises(ValueError, match=r"00000004/optimizer\.bin: damaged"):
        train(uvit(), config(steps=6), latents, run)
    (run / "checkpoints/00000002/pronghorn.json").unlink()  # nothing says that it is whole
    with pytest.raises(ValueError, match=r"00000004/optimizer\.bin: damaged"):
        train(uvit(), config(steps=6), latents, run)


@pytest.mark.fault(8)
def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_a_whole_one(run, latents):
    flip(run / "checkpoints/00000004/optimizer.bin")
    train(uvit(), config(save_every=3), latents, run)
    assert steps_in(run) == ["00000002", "00000003"]


def trained(folder, kill_at, notes):
    watch = WatchFiles(folder, kill_at)
    train(uvit(), config(save_every=1, steps=3), folder.parent / "latents", folder)
    notes.write_text(json.dumps(watch.seen))


def killed(folder):
    """Trainings killed before each change to the disk, and then gone on with; what became of them."""
    torch.set_num_threads(1)
    dumped(folder / "latents")
    place, notes = folder / "place", folder / "notes"
    assert in_a_fork(trained, place, 0, notes) == 0
    wanted, changes, seen = contents(place / "model"), json.loads(notes.read_text()), []
    for point in range(1, len(changes) + 1):
        shutil.rmtree(place)
        status = in_a_fork(trained, place, point, notes)
        found = sorted(path for path in place.glob("checkpoints/*") if path.name.isdigit())
        whole = all(map(check_seal, found[-2:]))  # the one before may be going away
        model = contents(place / "model")
        again = in_a_fork(trained, place, 0, notes)
        seen.append({
            "signal": status, "change": changes[point - 1], "whole": whole and model in (None, wanted), "again": again,
            "alike": contents(place / "model") == wanted, "left": [path.name for path in place.rglob(".*")],
            "kept": steps_in(place)[-2:],
        })  # fmt: skip
    return seen


@pytest.mark.fault(8)
@pytest.mark.slow
def test_killed_anywhere_a_training_goes_on_to_the_same_bits(tmp_path, figure):
    seen = run_as_program(__file__, tmp_path)
    figure("killed with SIGKILL", len(seen))
    figure("trained on to equal files", sum(entry["alike"] for entry in seen))
    assert len(seen) >= 20
    assert {entry["signal"] for entry in seen} == {9}
    assert all(entry["whole"] and entry["alike"] and entry["again"] == 0 for entry in seen), seen
    assert all(entry["kept"] == ["00000002", "00000003"] and not entry["left"] for entry in seen), seen


if __name__ == "__main__":
    sys.stdout.write(json.dumps(killed(Path(sys.argv[1]))) + "\n")
