"""A conversion that is killed before any change that it makes to the disk: its target is whole, or not there."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests.faults.child import in_a_fork, run_as_program
from tests.faults.watch_files import WatchFiles, contents
from tests.models import tiny_model
from transformers import AutoModelForCausalLM

import pronghorn.transformers  # noqa: F401 - registers
from pronghorn.awq import AwqConfig, convert_checkpoint


def converted(source, folder, overwrite, kill_at, notes):
    watch = WatchFiles(folder, kill_at)
    convert_checkpoint(source, folder / "target", "gemv", overwrite=overwrite, progress=False)
    notes.write_text(json.dumps(watch.seen))


def killed_conversions(folder, overwrite):
    """Conversions killed before each change; what became of the target."""
    torch.set_num_threads(1)
    tiny_model("llama", hidden_size=64, num_hidden_layers=1).save_pretrained(folder / "fp")
    config = AwqConfig(group_size=32, method="rtn")
    model = AutoModelForCausalLM.from_pretrained(folder / "fp", dtype=torch.float16, quantization_config=config)
    source, whole, notes = folder / "source", folder / "whole", folder / "notes"
    model.save_pretrained(source, max_shard_size="60KB")
    whole.mkdir()
    assert in_a_fork(converted, source, whole, False, 0, notes) == 0
    wanted, seen = contents(whole / "target"), []
    old = contents(source) if overwrite else None
    for point in range(1, 1000):
        place = folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if overwrite:
            shutil.copytree(source, place / "target")
        status = in_a_fork(converted, source, place, overwrite, point, notes)
        if status == 0:
            break
        found = contents(place / "target")
        kept = contents(place / ".target.replaced")
        state = "new" if found == wanted else "old" if found == old else "aside" if found is None else "half"
        seen.append({"signal": status, "state": state, "aside": state != "aside" or kept == old})
        again = in_a_fork(converted, source, place, True, 0, notes)
        seen[-1]["again"] = again == 0 and contents(place / "target") == wanted
    return seen


@pytest.mark.fault(8)
@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_half_written_folder_is_ever_there(overwrite, tmp_path, figure):
    seen = run_as_program(__file__, tmp_path, int(overwrite))
    assert len(seen) >= 7
    assert {entry["signal"] for entry in seen} == {9}
    assert all(entry["again"] for entry in seen)
    assert all(entry["aside"] for entry in seen)  # where neither is in its place, the old one is beside it
    states = [entry["state"] for entry in seen]
    assert "half" not in states
    assert states[0] == "old"
    assert ("new" in states) == overwrite  # what follows the last renaming is the removal of the old one
    figure("killed with SIGKILL", len(seen))
    figure("half-written folders", states.count("half"))


@pytest.mark.fault(8)
def test_everything_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    """Loss of power: each file, then the folder, then its new name, then the folder of that."""
    from pronghorn.files.whole_folders import made_whole

    order, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: (order.append(str(Path(f"/proc/self/fd/{descriptor}").readlink())), fsync(descriptor)),
    )
    monkeypatch.setattr(Path, "rename", lambda path, to: (order.append("rename"), rename(path, to))[1])
    with made_whole(tmp_path / "target", needed=2) as folder:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
    place = order.index("rename")
    assert {Path(path).name for path in order[: place - 1]} == {"a", "b"}
    assert Path(order[place - 1]).name.startswith(".target.")
    assert order[place + 1 :] == [str(tmp_path)]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(killed_conversions(Path(sys.argv[1]), bool(int(sys.argv[2])))) + "\n")
