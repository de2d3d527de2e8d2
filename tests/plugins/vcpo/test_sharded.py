"""Parameters that FSDP shards over two processes, each with groups of its own, against one process with all."""

import pytest
import torch
from tests.plugins.vcpo.addition import llama
from tests.ranks import leave_together, meet, on_two_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pronghorn.vcpo import Minibatch, VCPOSettings, accumulate_batched
from pronghorn.vcpo.ranks import ProcessGroup

pytestmark = [pytest.mark.xdist_group("sharded"), pytest.mark.fault(20)]  # its processes run once

GROUPS, SIZE, TOKENS = 4, 3, 5
CASES = {
    "group": VCPOSettings(opob_grad_norm="ghost"), "off": VCPOSettings(opob="off", is_whitening=True),
    "minibatch": VCPOSettings(opob="minibatch"),
}  # fmt: skip


def minibatch():
    """Tokens [trajectories, 1 + tokens], and what a step must know of them."""
    generator = torch.Generator().manual_seed(0)
    count = GROUPS * SIZE
    ids = torch.randint(0, 12, (count, 1 + TOKENS), generator=generator)
    sampler = -2.5 + 0.3 * torch.randn(count, TOKENS, generator=generator)
    mask = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (count, 1), generator=generator)
    rewards, advantages = torch.rand(2, count, generator=generator)
    return ids, Minibatch(sampler, mask, rewards, advantages, torch.arange(count) // SIZE)


def found(model, config, rows, micro_batches, ranks=None):
    ids, whole = minibatch()
    ids = ids[rows]
    part = Minibatch(
        *(getattr(whole, name)[rows] for name in ("sampler_log_probs", "mask", "rewards", "advantages", "groups"))
    )

    def log_probs_of(some):
        tokens = ids[some.start : some.stop]
        logs = model(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
        numbers = torch.arange(len(some))[:, None].expand_as(tokens)
        return logs.gather(-1, tokens[:, 1:, None])[..., 0], numbers

    return accumulate_batched(log_probs_of, model, part, config, micro_batches, ranks)


def _rank(rank, port, folder):
    meet(rank, port)
    mesh, model = init_device_mesh("cpu", (2,)), llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    half = GROUPS // 2 * SIZE
    rows, ranks = slice(rank * half, (rank + 1) * half), ProcessGroup(torch.device("cpu"))
    for name, config in CASES.items():
        micro_batches = [range(half)] if config.opob == "minibatch" else [range(SIZE), range(SIZE, half)]
        step = found(model, config, rows, micro_batches, ranks)
        gradients = [gradient.full_tensor() for gradient in step.gradients]
        torch.save([gradients, step.score_norms, step.baselines], f"{folder}/{name}-{rank}.pt")
    try:
        found(model, CASES["group"], rows, [range(half - 1), range(half - 1, half)], ranks)
    except ValueError as error:
        torch.save(str(error), f"{folder}/refused-{rank}.pt")
    leave_together()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    on_two_ranks(_rank, str(folder))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_sharded_parameters_get_the_whole_minibatchs_gradient(name, sharded):
    config, count = CASES[name], GROUPS * SIZE
    alone = found(llama(), config, slice(0, count), [range(count)])
    norms = []
    for rank in range(2):
        gradients, part, baselines = torch.load(sharded / f"{name}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(gradients, alone.gradients, rtol=1e-4, atol=1e-6)
        norms.append(part)
        wanted = alone.baselines if name == "minibatch" else alone.baselines[2 * rank : 2 * rank + 2]
        assert baselines == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(torch.cat(norms), alone.score_norms, rtol=1e-5, atol=1e-6)


def test_a_group_may_not_go_on_in_another_micro_batch(sharded):
    for rank in range(2):
        assert "with sharded parameters wanted whole ones" in torch.load(
            sharded / f"refused-{rank}.pt", weights_only=True
        )
