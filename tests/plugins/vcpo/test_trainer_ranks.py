"""Two processes, each with groups of its own, learn what one learns from all."""

import os
import socket

import pytest
import torch
from tests.plugins.vcpo.test_trainer import SeededRollouts, logged, trained, weights

from pronghorn.vcpo.records import read_run

pytestmark = pytest.mark.xdist_group("trainer_ranks")  # its processes run once

RUNS = [
    {"opob": "group"}, {"opob": "minibatch", "opob_weight": "exact"}, {"opob": "group", "opob_grad_norm": "ghost"},
    {"opob": "off", "estimator": "trl", "loss_type": "grpo"},
]  # fmt: skip


def _rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    for number, settings in enumerate(RUNS):
        trainer = trained(f"{folder}/{number}", steps=2, rollout_func=SeededRollouts(), ddp_backend="gloo",
                          per_device_train_batch_size=4, **settings)  # fmt: skip
        found = weights(trainer), logged(trainer, "vcpo/ess_ratio"), logged(trainer, "grad_norm")
        torch.save(found, f"{folder}/{number}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_two_processes_equal_one(number, two, tmp_path):
    alone = trained(tmp_path, steps=2, rollout_func=SeededRollouts(), **RUNS[number])
    for rank in range(2):
        found, ratios, norms = torch.load(two / f"{number}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, weights(alone), rtol=1e-4, atol=1e-5)
        if rank == 0:  # which logs
            assert ratios == pytest.approx(logged(alone, "vcpo/ess_ratio"), rel=1e-5)
            assert norms == pytest.approx(logged(alone, "grad_norm"), rel=1e-4)
    if RUNS[number].get("estimator") != "trl":
        ours, theirs = read_run(two / str(number)), read_run(tmp_path)
        assert sorted(ours.trajectories["log_ratio"]) == pytest.approx(
            sorted(theirs.trajectories["log_ratio"]), 1e-4, 1e-5
        )
