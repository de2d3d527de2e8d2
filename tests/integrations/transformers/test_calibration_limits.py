"""Calibration within real limits: an interrupt from the keyboard, a folder that is not ours, memory that ends."""

import gc
import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from tests.faults.child import in_a_fork, run_as_program
from tests.faults.fail_at_call import FailAtCall
from tests.faults.limited_memory import limited_memory
from tests.integrations.transformers.test_calibration_faults import outputs, run, same
from tests.models import tiny_model, token_ids

from pronghorn.transformers.calibration import BlockResult
from pronghorn.transformers.disk import write_atomically

MIB = 1 << 20
NOBODY = 65534


@pytest.mark.fault(8)
@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_interrupt_costs_a_block_at_most_and_leaves_the_model_as_it_was(tmp_path, call):
    model = tiny_model("llama", num_hidden_layers=3).train()
    whole = run(model, state_dir=tmp_path / "whole")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mlp = model.model.layers[1].mlp
    usual, mlp.forward = mlp.forward, FailAtCall(mlp.forward, call, KeyboardInterrupt())
    searched = []

    def search(block, inputs):
        searched.append(block.name)
        return outputs(block, inputs)

    interrupted = 0
    while interrupted < 2:
        try:
            results = run(model, search=search, state_dir=tmp_path / "state")
            break
        except KeyboardInterrupt:
            interrupted += 1
            assert mlp.forward.fired
            assert model.training
            mlp.forward = usual
    assert interrupted == (call < 5)  # a run calls it three times: to record, to search, and for the next block
    mlp.forward = usual
    same(results, whole)
    assert len(searched) <= 3 + interrupted
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    files = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


@contextmanager
def as_nobody():
    """For a superuser no folder is closed."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.fault(10)
def test_a_folder_that_may_not_be_written():
    with tempfile.TemporaryDirectory() as place:  # others may not look into pytest's
        Path(place).chmod(0o755)
        closed = Path(place) / "closed"
        closed.mkdir()
        run(state_dir=closed / "state")
        write_atomically(closed / "file", b"old")
        closed.chmod(0o555)
        with as_nobody():
            with pytest.raises(PermissionError, match="closed/new"):
                run(state_dir=closed / "new")
            with pytest.raises(PermissionError, match="closed"):
                write_atomically(closed / "file", b"new")
        assert (closed / "file").read_bytes() == b"old"
        assert sorted(path.name for path in closed.iterdir()) == ["file", "state"]


def living_bytes():
    gc.collect()
    return sum(value.nbytes for value in gc.get_objects() if type(value) is torch.Tensor)


def starved(folder):
    """Searches that want 32 MiB a sequence, with more and less memory than that."""
    torch.set_num_threads(1)
    model, samples = tiny_model("llama"), [token_ids(16, 16)]
    tried = []

    def search(block, inputs):
        for hidden, arguments in inputs:
            tried.append(len(hidden))
            torch.zeros(len(hidden), 32 * MIB // 4)
            block.module(hidden, **arguments)
        return BlockResult({"out": torch.tensor([float(sum(len(hidden) for hidden, _ in inputs))])})

    def work(more):
        run(model, samples, search)  # warms up
        start = living_bytes()
        tried.clear()
        found = {"error": ""}
        try:
            with limited_memory(more) if more else nullcontext():
                found["sequences"] = [float(result.tensors["out"]) for result in run(model, samples, search).values()]
        except torch.OutOfMemoryError as error:
            found["error"] = str(error)
            del error
        found |= {"tried": tried, "start": start, "end": living_bytes()}
        (folder / "found.json").write_text(json.dumps(found))

    seen = []
    for more in (0, 400 * MIB, 16 * MIB):
        assert in_a_fork(work, more) == 0
        seen.append(json.loads((folder / "found.json").read_text()))
    return seen


@pytest.mark.fault(11)
@pytest.mark.slow
def test_memory_that_really_ends(tmp_path, figure):
    plenty, some, little = run_as_program(__file__, tmp_path)
    assert plenty["tried"] == [16, 16]
    assert (plenty["error"], plenty["sequences"]) == ("", [16.0, 16.0])
    assert some["tried"][0] == 16
    assert set(some["tried"]) == {16, 8}
    assert (some["error"], some["sequences"]) == ("", [16.0, 16.0])
    assert little["tried"] == [16, 8, 4, 2]
    assert re.search(
        r"layers\.0 does not fit on cpu with 2 sequence\(s\) of 16 tokens at a time \(peak [\d.]+ of [\d.]+ GiB\): "
        r"give shorter or fewer calibration samples \(seq_len, n_samples\)", little["error"],
    )  # fmt: skip
    for found in (plenty, some, little):
        assert found["end"] == pytest.approx(found["start"], rel=0.01)
    figure("sequences at a time that were tried", ", ".join(map(str, little["tried"])))
    figure("bytes of tensors more than at the start", max(found["end"] - found["start"] for found in (some, little)))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(starved(Path(sys.argv[1]))) + "\n")
