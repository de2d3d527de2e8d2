"""The optimization of gates, killed before any change that it makes to the disk: resumed, its files are the same."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests.faults.child import in_a_fork, run_as_program
from tests.faults.watch_files import WatchFiles, contents
from tests.plugins.duoattention.conftest import small
from tests.plugins.duoattention.test_gates import MASK, samples

from pronghorn.duoattention.find import find_heads
from pronghorn.duoattention.pattern import load_pattern, save_pattern

STEPS = 16


def found(place, kill_at, notes):
    watch, steps = WatchFiles(place, kill_at), []
    state = {"state_dir": place / "state", "save_steps": 1}
    pattern = find_heads(
        small(), samples(), num_steps=STEPS, lr=0.1, block_size=None, **state, **MASK,
        on_step=lambda step, _: steps.append(step.step),
    )  # fmt: skip
    save_pattern(pattern, place / "pattern")
    notes.write_text(json.dumps({"changes": watch.seen, "steps": steps}))


def readable(folder):
    """Whether a pattern is there that may be used."""
    try:
        load_pattern(folder)
    except (FileNotFoundError, ValueError):
        return False
    return True


def killed(folder):
    """Runs killed before each change; what became of them."""
    torch.set_num_threads(1)
    place, notes = folder / "place", folder / "notes"
    place.mkdir()
    assert in_a_fork(found, place, 0, notes) == 0
    wanted, changes, seen = contents(place / "pattern"), json.loads(notes.read_text())["changes"], []
    for point in range(1, len(changes) + 1):
        shutil.rmtree(place)
        place.mkdir()
        status = in_a_fork(found, place, point, notes)
        whole = not readable(place / "pattern") or contents(place / "pattern") == wanted
        again = in_a_fork(found, place, 0, notes)
        alike = contents(place / "pattern") == wanted
        done = json.loads(notes.read_text())["steps"]
        seen.append({
            "signal": status, "change": changes[point - 1], "whole": whole, "again": again, "alike": alike, "done": done
        })  # fmt: skip
    return seen


@pytest.mark.fault(8)
@pytest.mark.slow
def test_killed_anywhere_gates_are_found_to_the_same_bits(tmp_path, figure):
    seen = run_as_program(__file__, tmp_path)
    figure("killed with SIGKILL", len(seen))
    figure("resumed to equal files", sum(entry["alike"] for entry in seen))
    assert len(seen) >= 20
    assert {entry["signal"] for entry in seen} == {9}
    assert all(entry["whole"] and entry["alike"] and entry["again"] == 0 for entry in seen), seen
    assert [entry["done"] for entry in seen] == sorted((entry["done"] for entry in seen), key=len, reverse=True)
    assert seen[-1]["done"] == [], "what was kept is not done again"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(killed(Path(sys.argv[1]))) + "\n")
