"""One pass with two buffers against the definition in two passes, its invariances, and what it refuses."""

import dataclasses
import math

import pytest
import torch
from tests.plugins.vcpo.policy import Policy, log_probs, one_by_one, rollouts
from tests.ranks import leave_together, meet, on_two_ranks

from pronghorn.vcpo import Minibatch, VCPOSettings, accumulate
from pronghorn.vcpo.baseline import baseline, baseline_weights
from pronghorn.vcpo.ranks import ProcessGroup

CONFIGS = [
    VCPOSettings(opob=opob, opob_weight=weight, opob_aggregation=aggregation, loss_aggregation=loss)
    for opob, weight, aggregation, loss in [
        ("group", "paper", "mean", "seq-mean-token-mean"), ("group", "exact", "median", "seq-mean-token-mean"),
        ("group", "reference", "winsorized_mean", "seq-mean-token-sum"),
        ("minibatch", "paper", "mean", "seq-mean-token-sum"), ("minibatch", "exact", "mean", "seq-mean-token-mean"),
        ("off", "paper", "mean", "seq-mean-token-mean"),
    ]
]  # fmt: skip


def two_passes(policy, ids, minibatch, config):
    """Norms first; then one loss over the whole minibatch whose coefficients hold the baselines."""
    learner, parameters = log_probs(policy, ids), list(policy.parameters())
    logs = ((learner - minibatch.sampler_log_probs) * minibatch.mask).sum(1).detach()
    sums = (learner * minibatch.mask).sum(1)
    gradients = [torch.autograd.grad(row, parameters, retain_graph=True) for row in sums]
    norms = torch.stack([torch.cat([part.flatten() for part in row]).norm() for row in gradients])
    coefficients, baselines = minibatch.advantages.clone(), []
    scopes = {"group": minibatch.group_rows(), "minibatch": [range(len(ids))], "off": []}[config.opob]
    for rows in map(list, scopes):
        values = (minibatch.rewards if config.opob == "group" else minibatch.advantages)[rows]
        weights = baseline_weights(norms[rows], logs[rows], minibatch.lengths[rows], config)
        baselines.append(baseline(values, weights, config))
        spread = values.std(correction=0) if config.opob == "group" else 1
        coefficients[rows] = (values - baselines[-1]) / spread
    ratios = logs.exp().clamp(max=config.is_truncation)
    lengths = minibatch.lengths if config.loss_aggregation == "seq-mean-token-mean" else 1
    return torch.autograd.grad(-(coefficients * ratios / lengths * sums).mean(), parameters), norms, baselines


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.opob}-{config.opob_weight}")
def test_one_pass_equals_two(config):
    policy = Policy()
    ids, minibatch = rollouts(policy, groups=(4, 3))
    found = accumulate(one_by_one(policy, ids), list(policy.parameters()), minibatch, config)
    gradients, norms, baselines = two_passes(policy, ids, minibatch, config)
    for ours, wanted in zip(found.gradients, gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.score_norms, norms, rtol=1e-9, atol=0)
    assert found.baselines == pytest.approx(baselines, rel=1e-9)


def test_a_tied_parameter_counts_once():
    policy = Policy()
    ids, minibatch = rollouts(policy)
    twice = [policy.embedding.weight, policy.layer.weight, policy.head.weight]
    found = accumulate(one_by_one(policy, ids), twice, minibatch, VCPOSettings())
    once = accumulate(one_by_one(policy, ids), twice[:2], minibatch, VCPOSettings())
    assert torch.equal(found.score_norms, once.score_norms)
    assert len(found.gradients) == 2
    with pytest.raises(ValueError, match="parameters: got none"):
        accumulate(one_by_one(policy, ids), [], minibatch, VCPOSettings())


def test_on_policy_the_baseline_weighs_by_norms():
    policy = Policy()
    ids, minibatch = rollouts(policy, groups=(5,), lag=0.0)
    for weight in ("paper", "reference"):
        found = accumulate(
            one_by_one(policy, ids), list(policy.parameters()), minibatch, VCPOSettings(opob_weight=weight)
        )
        squares = found.score_norms.square()
        assert found.baselines[0] == pytest.approx(float((squares * minibatch.rewards).sum() / squares.sum()), rel=1e-8)


def test_equal_norms_on_policy_are_grpo():
    """A policy without a layer before its logits, where the same tokens give the same norm."""
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    _, minibatch = rollouts(Policy(), groups=(4,))
    mask = torch.zeros_like(minibatch.mask)
    mask[:, 0] = True
    minibatch = dataclasses.replace(
        minibatch, mask=mask, sampler_log_probs=torch.full_like(minibatch.sampler_log_probs, -math.log(4))
    )

    def log_probs_of(row):
        return bias.log_softmax(0)[row].expand(mask.shape[1])

    found = accumulate(log_probs_of, [bias], minibatch, VCPOSettings())
    rewards = minibatch.rewards
    assert found.baselines[0] == pytest.approx(float(rewards.mean()))
    advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
    (wanted,) = torch.autograd.grad(-(advantages * bias.log_softmax(0)).mean(), bias)
    torch.testing.assert_close(found.gradients[0], wanted)


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda config: config.opob_weight)
@pytest.mark.fault(25)
def test_a_group_of_equal_rewards_teaches_nothing(config):
    policy = Policy()
    ids, minibatch = rollouts(policy)
    minibatch = dataclasses.replace(minibatch, rewards=torch.full((8,), 0.7).double())
    found = accumulate(one_by_one(policy, ids), list(policy.parameters()), minibatch, config)
    assert found.baselines == pytest.approx([0.7, 0.7], rel=1e-7)
    assert max(float(part.abs().max()) for part in found.gradients) < 1e-7


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda config: f"{config.opob}-{config.opob_weight}")
def test_a_baseline_lies_among_its_values(config):
    policy = Policy()
    for seed in range(5):
        ids, minibatch = rollouts(policy, lag=1.0, seed=seed)
        found = accumulate(one_by_one(policy, ids), list(policy.parameters()), minibatch, config)
        values = minibatch.rewards if config.opob == "group" else minibatch.advantages
        for value, rows in zip(found.baselines, minibatch.group_rows() if len(found.baselines) > 1 else [range(8)],
                               strict=True):  # fmt: skip
            scope = values[rows.start : rows.stop]
            assert float(scope.min()) - 1e-9 <= value <= float(scope.max()) + 1e-9


@pytest.mark.fault(25)
def test_an_empty_completion_has_no_gradient_and_is_not_asked_for():
    policy = Policy()
    ids, minibatch = rollouts(policy)
    mask = minibatch.mask.clone()
    mask[2] = False
    asked = []

    def log_probs_of(row):
        asked.append(row)
        return one_by_one(policy, ids)(row)

    found = accumulate(
        log_probs_of, list(policy.parameters()), dataclasses.replace(minibatch, mask=mask), VCPOSettings()
    )
    assert asked == [0, 1, 3, 4, 5, 6, 7]
    assert found.score_norms[2] == 0
    assert found.statistics.log_ratios[2] == 0
    assert found.weights[2] == 1
    kept = [0, 1, 3]
    weights = baseline_weights(
        found.score_norms[kept], found.statistics.log_ratios[kept], mask.sum(1)[kept], VCPOSettings()
    )
    assert found.baselines[0] == pytest.approx(baseline(minibatch.rewards[kept], weights, VCPOSettings()))


def test_a_group_of_one_is_its_own_baseline():
    policy = Policy()
    ids, minibatch = rollouts(policy, groups=(1, 1))
    found = accumulate(one_by_one(policy, ids), list(policy.parameters()), minibatch, VCPOSettings())
    assert found.baselines == pytest.approx(minibatch.rewards.tolist())
    assert max(float(part.abs().max()) for part in found.gradients) < 1e-12


def test_bfloat16_parameters_are_summed_in_float32():
    policy = Policy().bfloat16()
    ids, minibatch = rollouts(policy)
    found = accumulate(one_by_one(policy, ids), list(policy.parameters()), minibatch, VCPOSettings())
    assert {part.dtype for part in found.gradients} == {torch.float32}


def test_what_the_learner_must_not_give():
    policy = Policy()
    ids, minibatch = rollouts(policy)
    parameters = list(policy.parameters())
    right = one_by_one(policy, ids)
    with pytest.raises(ValueError, match=r"^log_probs_of: gave \[1, 5\] for trajectory 0, wanted \[1, 6\]"):
        accumulate(lambda row: right(row)[1:], parameters, minibatch, VCPOSettings())
    for value in (math.nan, -math.inf):
        added = torch.zeros(8).index_fill(0, torch.tensor(3), value)
        with pytest.raises(ValueError, match=rf"^trajectory 3: log_probs: got {value} at \[0\]"):
            accumulate(lambda row, added=added: right(row) + added[row], parameters, minibatch, VCPOSettings())
    explodes = [torch.tensor(0.0, dtype=torch.float64, requires_grad=True)]
    with pytest.raises(FloatingPointError, match="trajectory 0: the norm of its gradient is inf"):
        accumulate(lambda row: right(row).detach() - explodes[0].sqrt(), explodes, minibatch, VCPOSettings())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampler_log_probs": None}, "sampler_log_probs: got NoneType, wanted a tensor; record"),
        ({"sampler_log_probs": torch.zeros(8, 3)}, r"sampler_log_probs: got \[8, 3\], wanted mask's \[8, 6\]"),
        ({"mask": torch.ones(8, 6)}, r"mask: got torch\.float32, wanted torch\.bool"),
        ({"mask": torch.ones(0, 6, dtype=torch.bool)}, r"mask: got \[0, 6\], wanted \[trajectories, tokens\]"),
        ({"rewards": torch.zeros(7)}, r"rewards: got \[7\], wanted \[8\]"),
        ({"rewards": torch.full((8,), math.nan)}, "rewards: got NaN or infinity"),
        ({"advantages": torch.full((8,), math.inf)}, "advantages: got NaN or infinity"),
        ({"groups": torch.zeros(8)}, r"groups: got torch\.float32, wanted integers"),
        ({"groups": torch.tensor([0, 1] * 4)}, "groups: 0 is scattered"),
    ],
)
def test_a_bad_minibatch(changed, message):
    _, minibatch = rollouts(Policy())
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        dataclasses.replace(minibatch, **changed)


def loss_of(policy, ids, minibatch, config):
    """The loss with its weights as constants, from their definitions."""
    learner = log_probs(policy, ids)
    ratios = (learner.detach() - minibatch.sampler_log_probs).masked_fill(~minibatch.mask, 0)
    of_sequence = ratios.sum(-1, keepdim=True)
    logs = (ratios if "token" in config.is_mode else of_sequence).clamp(-20, 20)
    weights = logs.exp()
    if "truncate" in config.is_mode:
        weights = weights.clamp(max=config.is_truncation)
    else:
        weights = weights * (weights <= config.is_truncation)
    if config.is_whitening:
        weights = weights / (weights[minibatch.mask] if "token" in config.is_mode else weights).mean()
    means = (weights * learner * minibatch.mask).sum(-1) / minibatch.mask.sum(-1)
    return -(minibatch.advantages * means).mean()


@pytest.mark.parametrize("whitening", [False, True])
@pytest.mark.parametrize("mode", ["sequence_truncate", "sequence_mask", "token_truncate", "token_mask"])
def test_every_way_to_weigh(mode, whitening):
    policy = Policy()
    ids, minibatch = rollouts(policy, lag=0.6)
    config = VCPOSettings(is_mode=mode, is_whitening=whitening, is_truncation=1.2, opob="off")
    parameters = list(policy.parameters())
    wanted = torch.autograd.grad(loss_of(policy, ids, minibatch, config), parameters)
    found = accumulate(one_by_one(policy, ids), parameters, minibatch, config)
    torch.testing.assert_close(found.gradients, list(wanted), rtol=1e-9, atol=1e-12)


def _rank(rank, port, folder, config, groups):
    meet(rank, port)
    found = accumulate_part(config, groups, rank, ProcessGroup(torch.device("cpu")))
    torch.save([found.gradients, found.score_norms, found.baselines], f"{folder}/{rank}.pt")
    leave_together()


def accumulate_part(config, groups, rank, ranks):
    """What one rank sees of a minibatch: its own groups."""
    policy = Policy()
    ids, minibatch = rollouts(policy, groups=groups)
    mine = minibatch.groups % 2 == rank
    part = Minibatch(*(getattr(minibatch, field.name)[mine] for field in dataclasses.fields(minibatch)))
    return accumulate(one_by_one(policy, ids[mine]), list(policy.parameters()), part, config, ranks)


@pytest.mark.parametrize(
    "config",
    [VCPOSettings(), VCPOSettings(opob="minibatch"), VCPOSettings(opob="off", is_whitening=True)],
    ids=["group", "minibatch", "off"],
)
def test_two_ranks_equal_one(config, tmp_path):
    """Of groups of different sizes; a rank's own groups make the order of trajectories another."""
    groups = (4, 3, 2)
    on_two_ranks(_rank, str(tmp_path), config, groups)
    policy = Policy()
    ids, minibatch = rollouts(policy, groups=groups)
    alone = accumulate(one_by_one(policy, ids), list(policy.parameters()), minibatch, config)
    for rank in range(2):
        gradients, norms, baselines = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(gradients, alone.gradients, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(norms, alone.score_norms[minibatch.groups % 2 == rank])
        wanted = alone.baselines[rank::2] if config.opob == "group" else alone.baselines
        assert baselines == pytest.approx(wanted)
