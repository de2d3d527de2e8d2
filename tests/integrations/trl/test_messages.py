"""What ranks tell each other arrives to the bit, and nothing of it is unpickled."""

import math

import pytest
import torch
from tests.integrations.trl.test_async_rollouts import Foreign, rollout, sample, source
from tests.ranks import leave_together, meet, on_two_ranks

from pronghorn.trl.group_stream import StepLoader, StepTotals, _packed, _unpacked
from pronghorn.trl.messages import scatter_tensors

SHARES = (
    {"ids": torch.arange(5), "none": torch.zeros(0, 3), "one": torch.tensor(0.1, dtype=torch.float64)},
    {"numbers": torch.tensor([math.nan, -math.inf, -0.0, 1e-45]), "said": torch.tensor([True, False])},
)


def _bits(rollouts):
    return [
        [
            value.view(torch.uint8).tolist() if isinstance(value, torch.Tensor) else repr(value)
            for value in vars(one).values()
        ]
        for one in rollouts
    ]


def _rank(rank, port, folder):
    meet(rank, port)
    torch.save(scatter_tensors(None if rank else SHARES, "cpu"), f"{folder}/{rank}.pt")
    stream = None
    if rank == 0:
        samples = [sample(group, 1, reward=math.nan, advantage=0.1 * group) for group in (0, 0, 1, 1, 2, 2)]
        stream = source(Foreign(samples), groups_per_step=3)
        stream.published(1, 0)
    steps = iter(StepLoader(stream, lambda: 0, micro_batches=1, ranks=2))
    step = next(steps)
    torch.save((_bits(step["rollouts"]), vars(step["totals"])), f"{folder}/step-{rank}.pt")
    with pytest.raises(RuntimeError) as caught:  # the worker is dead
        next(steps)
    torch.save(str(caught.value), f"{folder}/dead-{rank}.pt")
    leave_together()


@pytest.mark.fault("gates")
def test_two_processes(tmp_path):
    on_two_ranks(_rank, str(tmp_path))
    for rank, share in enumerate(SHARES):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, share, rtol=0, atol=0, equal_nan=True)
    steps = [torch.load(tmp_path / f"step-{rank}.pt") for rank in range(2)]
    wanted = [rollout(group, 0, reward=math.nan, advantage=0.1 * group) for group in (0, 0, 1, 1, 2, 2)]
    assert sorted(steps[0][0] + steps[1][0], key=str) == sorted(_bits(wanted), key=str)
    assert min(len(rows) for rows, _ in steps) == 2
    assert steps[0][1] == steps[1][1] == {"groups": [0, 1, 2], "rows": 6, "tokens": 24, "sampled_tokens": 12}
    reason = "RolloutError: the rollout worker failed: RuntimeError: nothing comes any more"
    assert torch.load(tmp_path / "dead-0.pt") in reason
    assert torch.load(tmp_path / "dead-1.pt") == f"process 0: {reason}"


def test_a_damaged_share_is_refused():
    group = [rollout(3), rollout(3)]
    packed = _packed(group, StepTotals.of([group]))
    assert _bits(_unpacked(dict(packed))[0]) == _bits(group)
    with pytest.raises(ValueError, match="process 0: prompt_ids cannot be right"):
        _unpacked({**packed, "prompt_ids": packed["prompt_ids"][:-1]})
