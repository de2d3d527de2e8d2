"""Calibration of 7 billion random weights on a GPU: killed in the middle, and with a quarter of the memory.

Without a GPU they are skipped, and this file as a program (`calibrate STATE NOTES KILL_AFTER`) takes tiny sizes.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.faults.child import finished_program, run_as_program
from tests.models import SEVEN_BILLION, seven_billion, tiny_model, token_ids

from pronghorn.transformers.calibration import BlockResult, CalibrationRunner

KILLED, GIB = signal.SIGKILL, 2**30
SHARE = 0.25  # of the GPU's memory, of which the weights take two thirds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def model():
    """The same weights each time."""
    return seven_billion(torch.bfloat16) if torch.cuda.is_available() else tiny_model("llama", num_hidden_layers=4)


def calibrate(state, notes, kill_after):
    """One run that is killed when it has searched so many blocks; what it searched and when, since its start."""
    started = time.monotonic()
    made, searched = model(), []

    def search(block, inputs):
        searched.append(round(time.monotonic() - started, 1))
        notes.write_text(json.dumps(searched))
        if len(searched) > kill_after:
            os.kill(os.getpid(), KILLED)
        found = [block.module(hidden, **kwargs) for hidden, kwargs in inputs]
        found = [output if isinstance(output, torch.Tensor) else output[0] for output in found]
        return BlockResult({"mean": torch.stack([output.float().mean(dim=(0, 1)) for output in found])})

    runner = CalibrationRunner(made, [token_ids(2, 64), token_ids(1, 32, seed=1)], state_dir=state, progress=False)
    runner.run(search)


@pytest.mark.fault(8)
def test_killed_in_the_middle_it_goes_on_within_a_minute(tmp_path, figure):
    blocks = SEVEN_BILLION["num_hidden_layers"]

    def run(name, notes, kill_after=blocks):
        """Its exit status; a process of its own, for a GPU cannot be used in a fork."""
        done = finished_program(__file__, "calibrate", tmp_path / name, tmp_path / notes, kill_after)
        assert done.returncode in (0, -KILLED), done.stderr
        return done.returncode

    assert run("state", "killed.json", blocks // 2) == -KILLED
    assert len(list((tmp_path / "state").glob("block-*.safetensors"))) == blocks // 2
    assert (run("state", "again.json"), run("whole", "whole.json")) == (0, 0)
    searched = json.loads((tmp_path / "again.json").read_text())
    assert len(searched) == blocks - blocks // 2
    assert searched[0] <= 60
    resumed, unbroken = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
                         for name in ("state", "whole"))  # fmt: skip
    assert resumed == unbroken
    figure("seconds until it searched again", searched[0])


def starved(sequences, tokens):
    """Calibration with so much at a time that a quarter of the memory is too little; what was tried and is left."""
    made, tried = model(), []
    torch.cuda.set_per_process_memory_fraction(SHARE)

    def search(block, inputs):
        tried.append(max(len(hidden) for hidden, _ in inputs))
        for hidden, kwargs in inputs:
            block.module(hidden, **kwargs)
        return BlockResult({"tokens": torch.tensor([sum(hidden.shape[1] for hidden, _ in inputs)])})

    torch.cuda.synchronize()
    start, error = torch.cuda.memory_allocated(), ""
    try:
        CalibrationRunner(made, [token_ids(sequences, tokens)], progress=False).run(search)
    except torch.OutOfMemoryError as raised:
        error = str(raised)
    return {"tried": tried, "error": error, "start": start, "end": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated()}  # fmt: skip


@pytest.mark.fault(11)
def test_a_quarter_of_the_memory(tmp_path, figure):
    enough, little = (run_as_program(__file__, "starved", *sizes) for sizes in ((32, 4096), (1, 8192 * 32)))
    assert enough["error"] == ""
    assert enough["tried"][0] == 32
    assert set(enough["tried"][1:]) != {32}, "all fitted at once"
    assert "does not fit on cuda" in little["error"]
    assert "give shorter or fewer calibration samples (seq_len, n_samples)" in little["error"]
    for found in (enough, little):
        assert found["end"] == pytest.approx(found["start"], rel=0.01)
    figure("sequences at a time", ", ".join(map(str, sorted(set(enough["tried"]), reverse=True))))
    figure("GiB at most", round(enough["peak"] / GIB, 1))


if __name__ == "__main__":
    work, *arguments = sys.argv[1:]
    if work == "calibrate":
        state, notes, kill_after = arguments
        calibrate(Path(state), Path(notes), int(kill_after))
    else:
        sys.stdout.write(json.dumps(starved(*map(int, arguments))) + "\n")
