"""Two processes, each with groups of its own, learn what one learns from all."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from tests.plugins.vcpo.test_trainer import SeededRollouts, logged, trained, weights
from tests.ranks import leave_together, on_two_ranks

from pronghorn.vcpo.records import read_run

pytestmark = pytest.mark.xdist_group("trainer_ranks")  # its processes run once

RUNS = [
    {"opob": "group"}, {"opob": "minibatch", "opob_weight": "exact"}, {"opob": "group", "opob_grad_norm": "ghost"},
    {"opob": "off", "estimator": "trl", "loss_type": "grpo"},
    {"opob": "group", "opob_grad_norm": "ghost", "fsdp": True,
     "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
]  # fmt: skip


def _shard_on_cpus():
    """accelerate shards on any device but a CPU, where PyTorch can; it is told that these are others."""
    begin = PartialState.__init__

    def named_otherwise(self, *arguments, **options):
        begin(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_HPU

    PartialState.__init__ = named_otherwise


def _rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    for number, settings in enumerate(RUNS):
        if "fsdp" in settings:  # the last
            AcceleratorState._reset_state(reset_partial_state=True)
            _shard_on_cpus()
        trainer = trained(f"{folder}/{number}", steps=2, rollout_func=SeededRollouts(), ddp_backend="gloo",
                          per_device_train_batch_size=4, **settings)  # fmt: skip
        whole = {name: getattr(w, "full_tensor", lambda w=w: w)() for name, w in weights(trainer).items()}
        kind = str(trainer.accelerator.distributed_type)
        found = whole, kind, logged(trainer, "vcpo/ess_ratio"), logged(trainer, "grad_norm")
        torch.save(found, f"{folder}/{number}-{rank}.pt")
    leave_together()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(_rank, str(folder))
    return folder


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_two_processes_equal_one(number, two, tmp_path):
    settings = {name: value for name, value in RUNS[number].items() if not name.startswith("fsdp")}
    alone = trained(tmp_path, steps=2, rollout_func=SeededRollouts(), **settings)
    for rank in range(2):
        found, kind, ratios, norms = torch.load(two / f"{number}-{rank}.pt", weights_only=True)
        assert kind == f"DistributedType.{'FSDP' if 'fsdp' in RUNS[number] else 'MULTI_CPU'}"
        torch.testing.assert_close(found, weights(alone), rtol=1e-4, atol=1e-5)
        if rank == 0:  # which logs
            assert ratios == pytest.approx(logged(alone, "vcpo/ess_ratio"), rel=1e-5)
            assert norms == pytest.approx(logged(alone, "grad_norm"), rel=1e-4)
    if RUNS[number].get("estimator") != "trl":
        ours, theirs = read_run(two / str(number)), read_run(tmp_path)
        assert sorted(ours.trajectories["log_ratio"]) == pytest.approx(
            sorted(theirs.trajectories["log_ratio"]), 1e-4, 1e-5
        )
