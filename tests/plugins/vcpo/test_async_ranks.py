"""Two processes, of which the first has the worker, learn what one learns; and end together when it fails."""

import os
import time

import pytest
import torch
from tests.faults.fail_at_call import FailAtCall
from tests.plugins.vcpo.addition import llama
from tests.plugins.vcpo.test_async_trainer import in_process, large_digits, logged, trained, weights
from tests.ranks import leave_together, on_two_ranks

from pronghorn.trl.group_stream import RolloutError
from pronghorn.vcpo.records import read_run
from pronghorn.vcpo.trl.async_trainer import AsyncVCPOTrainer

pytestmark = pytest.mark.xdist_group("async_ranks")  # its processes run once

HALF = {"per_device_train_batch_size": 4, "ddp_backend": "gloo", "max_staleness": 0}
CUTS = ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "opob": "minibatch"})


def _late(owner, method, seconds=1.0):
    punctual = getattr(owner, method)

    def late(*args):
        time.sleep(seconds)
        return punctual(*args)

    setattr(owner, method, late)


def _rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    for number, cut in enumerate(CUTS):
        trainer = trained(f"{folder}/{number}", f"{folder}/start", steps=2, **{**HALF, **cut})
        torch.save((weights(trainer), logged(trainer, "grad_norm")), f"{folder}/{number}-{rank}.pt")
        assert (trainer.rollout_worker is None) == (rank == 1)
    if rank == 1:  # it hears of the end when the other writes already
        _late(AsyncVCPOTrainer, "_save_last_update")
    reward = FailAtCall(large_digits, 4, ZeroDivisionError("the judge has died"))
    with pytest.raises(RolloutError) as caught:
        trained(f"{folder}/dead", f"{folder}/start", worker=in_process(f"{folder}/start", reward), **HALF,
                save_strategy="steps", save_steps=100)  # fmt: skip
    torch.save(str(caught.value), f"{folder}/dead-{rank}.pt")
    leave_together()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    llama().save_pretrained(folder / "start")
    on_two_ranks(_rank, str(folder))
    return folder


@pytest.mark.parametrize("number", range(len(CUTS)))
def test_two_processes_equal_one(number, two, tmp_path):
    settings = {name: CUTS[number][name] for name in CUTS[number] if name == "opob"}
    alone = trained(tmp_path, str(two / "start"), steps=2, max_staleness=0, **settings)
    for rank in range(2):
        found, norms = torch.load(two / f"{number}-{rank}.pt")
        torch.testing.assert_close(found, weights(alone), rtol=1e-4, atol=1e-5)
        if rank == 0:  # which logs
            assert norms == pytest.approx(logged(alone, "grad_norm"), rel=1e-4)
    ours, theirs = read_run(two / str(number)).trajectories, read_run(tmp_path).trajectories
    assert sorted(ours["group"]) == sorted(theirs["group"])
    assert sorted(ours["reward"]) == pytest.approx(sorted(theirs["reward"]))


def test_both_end_with_the_reason(two):
    reason = "the rollout worker failed: ZeroDivisionError: the judge has died"
    assert torch.load(two / "dead-0.pt") == reason
    assert torch.load(two / "dead-1.pt") == f"process 0: RolloutError: {reason}"
    assert (two / "dead" / "checkpoint-1" / "rollout_state.json").exists()
    assert (two / "dead" / "checkpoint-1" / "model.safetensors").exists()
