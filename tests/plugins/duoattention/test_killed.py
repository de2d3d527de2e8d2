"""`duoattention apply`, killed before any change that it makes to the disk: its folder is whole, or not there.

Whole is with its report, which says when it was made, and with the digest of that.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests.faults.child import in_a_fork, run_as_program
from tests.faults.watch_files import WatchFiles, contents
from tests.models import tiny_model
from tests.plugins.conftest import letters_tokenizer
from typer.testing import CliRunner

from pronghorn.duoattention import DuoAttentionConfig
from pronghorn.duoattention.cli import app
from pronghorn.files.sealed import check_seal

TIMED = {"quality.json", "README.md", "pronghorn.json"}


def applied(folder, place, kill_at, notes):
    watch = WatchFiles(place, kill_at)
    arguments = ["apply", folder / "model", folder / "pattern", place / "duo"]
    found = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    notes.write_text(json.dumps(watch.seen))


def is_whole(folder, wanted):
    found = contents(folder)
    if found.keys() != wanted.keys():
        return False
    return all(found[name] == wanted[name] for name in wanted.keys() - TIMED) and check_seal(folder)


def killed(folder):
    """Runs killed before each change; what became of the folder."""
    torch.set_num_threads(1)
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder / "model")
    letters_tokenizer().save_pretrained(folder / "model")
    DuoAttentionConfig(gates=[[0.1, 0.9]]).save_pretrained(folder / "pattern")
    place, notes = folder / "place", folder / "notes"
    place.mkdir()
    assert in_a_fork(applied, folder, place, 0, notes) == 0
    wanted, changes = contents(place / "duo"), len(json.loads(notes.read_text()))
    seen = []
    for point in range(1, changes + 1):
        shutil.rmtree(place)
        place.mkdir()
        status = in_a_fork(applied, folder, place, point, notes)
        found = contents(place / "duo")
        state = "none" if found is None else "new" if is_whole(place / "duo", wanted) else "half"
        seen.append({"signal": status, "state": state})
        if state == "none":
            seen[-1]["again"] = in_a_fork(applied, folder, place, 0, notes) == 0 and is_whole(place / "duo", wanted)
    return seen


@pytest.mark.fault(8)
@pytest.mark.slow
def test_no_half_written_model_is_ever_there(tmp_path, figure):
    seen = run_as_program(__file__, tmp_path)
    states = [entry["state"] for entry in seen]
    figure("killed with SIGKILL", len(seen))
    figure("half-written folders", states.count("half"))
    assert len(seen) >= 8
    assert {entry["signal"] for entry in seen} == {9}
    assert "half" not in states
    assert all(entry.get("again", True) for entry in seen)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(killed(Path(sys.argv[1]))) + "\n")
