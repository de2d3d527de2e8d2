"""A whole step: the order of clipping and scaling, what it reports, and that a refused one changes nothing."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from tests.plugins.vcpo.policy import Policy, log_probs, one_by_one, rollouts

from pronghorn.vcpo import ReferenceESS, VCPOSettings, accumulate, vcpo_step


def step(policy, config, ids, minibatch, staleness=1, rate=0.1, reference=None):
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    found = accumulate(one_by_one(policy, ids), parameters, minibatch, config)
    metrics = vcpo_step(found, optimizer, minibatch, config, reference or ReferenceESS(config), staleness)
    assert [group["lr"] for group in optimizer.param_groups] == [rate]
    return metrics


@pytest.mark.parametrize("rule", ["sqrt", "linear", "off"])
@pytest.mark.parametrize("limit", [None, 0.01])
def test_the_update_is_the_clipped_gradient_at_the_scaled_rate(rule, limit):
    policy = Policy()
    ids, minibatch = rollouts(policy, lag=1.0)
    config = VCPOSettings(ess_scaling=rule, max_grad_norm=limit)
    gradients = accumulate(one_by_one(policy, ids), list(policy.parameters()), minibatch, config).gradients
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    metrics = step(policy, config, ids, minibatch)

    norm = math.sqrt(sum(float(part.square().sum()) for part in gradients))
    assert metrics.grad_norm == pytest.approx(norm)
    assert norm > 0.01
    scale = {"sqrt": math.sqrt(metrics.ess_ratio), "linear": metrics.ess_ratio, "off": 1.0}[rule]
    assert metrics.learning_rates == pytest.approx([0.1 * scale])
    shortened = 1.0 if limit is None else limit / (norm + 1e-6)
    for old, new, gradient in zip(before, policy.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.detach(), old - 0.1 * scale * shortened * gradient, rtol=1e-9, atol=1e-12)


def test_on_policy_nothing_is_damped():
    policy = Policy()
    ids, minibatch = rollouts(policy, lag=0.0)
    metrics = step(policy, VCPOSettings(), ids, minibatch, staleness=0)
    assert metrics.ess_ratio == pytest.approx(1, rel=1e-8)
    assert metrics.learning_rates == pytest.approx([0.1], rel=1e-8)
    assert [record.ratio for record in metrics.trajectories] == pytest.approx([1.0] * 8)


def test_what_a_step_reports():
    policy = Policy()
    ids, minibatch = rollouts(policy, lag=2.0)
    with torch.no_grad():
        logs = ((log_probs(policy, ids) - minibatch.sampler_log_probs) * minibatch.mask).sum(1)
    norms = accumulate(one_by_one(policy, ids), list(policy.parameters()), minibatch, VCPOSettings()).score_norms
    metrics = step(policy, VCPOSettings(), ids, minibatch)
    ratios = logs.exp()
    clipped = ratios.clamp(max=8)
    assert ratios.max() > 8
    for name, weights in (("ess", ratios), ("ess_clipped", clipped)):
        ess = float(weights.sum() ** 2 / weights.square().sum())
        assert getattr(metrics, name) == pytest.approx(ess)
        assert getattr(metrics, name.replace("ess", "ess_ratio")) == pytest.approx(ess / 8)
    records = metrics.trajectories
    assert [record.ratio for record in records] == pytest.approx(ratios.tolist())
    assert [record.clipped_ratio for record in records] == pytest.approx(clipped.tolist())
    assert [record.grad_norm_unscaled for record in records] == pytest.approx((clipped * norms).tolist())
    scaled = (clipped * norms * minibatch.advantages.abs()).tolist()
    assert [record.grad_norm for record in records] == pytest.approx(scaled)
    assert [record.group for record in records] == [0] * 4 + [1] * 4
    assert [record.response_length for record in records] == minibatch.lengths.tolist()
    line = json.loads(json.dumps(records[0].to_dict()))
    assert line["reward"] == pytest.approx(float(minibatch.rewards[0]))


def test_clipped_ratios_may_scale_the_rate():
    policy = Policy()
    ids, minibatch = rollouts(policy, lag=2.0)
    metrics = step(policy, VCPOSettings(ess_use_clipped=True, ess_scaling="linear"), ids, minibatch)
    assert metrics.learning_rates == pytest.approx([0.1 * metrics.ess_ratio_clipped])
    assert metrics.ess_ratio_clipped != metrics.ess_ratio


def test_the_automatic_reference_learns_after_the_step():
    policy = Policy()
    ids, minibatch = rollouts(policy, lag=1.0)
    config = VCPOSettings(ess_reference="auto", ess_scaling="linear")
    reference = ReferenceESS(config)
    first = step(policy, config, ids, minibatch, staleness=0, rate=1e-12, reference=reference)
    second = step(policy, config, ids, minibatch, staleness=4, rate=1e-12, reference=reference)
    assert first.ess_reference == 1.0
    assert first.learning_rates == pytest.approx([1e-12 * first.ess_ratio])
    assert second.ess_reference == pytest.approx(first.ess_ratio)
    assert second.learning_rates == pytest.approx([1e-12], rel=1e-6)


@pytest.mark.fault(25)
def test_a_refused_step_changes_nothing():
    policy = Policy()
    ids, minibatch = rollouts(policy)
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(ValueError, match="staleness: got -1"):
        step(policy, VCPOSettings(), ids, minibatch, staleness=-1)
    sampler = minibatch.sampler_log_probs
    never = dataclasses.replace(minibatch, sampler_log_probs=sampler.masked_fill(minibatch.mask, -math.inf))
    with pytest.raises(ValueError, match="sampler_log_probs: got -inf"):
        step(policy, VCPOSettings(), ids, never)
    far = dataclasses.replace(minibatch, sampler_log_probs=sampler - 1e3)
    with pytest.raises(ValueError, match="ess_space='log' cannot overflow"):
        step(policy, VCPOSettings(ess_space="reference", opob="off"), ids, far)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_a_frozen_parameter_stays():
    policy = Policy()
    policy.layer.requires_grad_(False)
    ids, minibatch = rollouts(policy)
    before = copy.deepcopy(policy.layer.state_dict())
    step(policy, VCPOSettings(), ids, minibatch)
    assert all(torch.equal(value, before[name]) for name, value in policy.layer.state_dict().items())
    assert policy.layer.weight.grad is None


def test_damping_rises_with_lag():
    """The whole point: the older the rollouts, the shorter the step."""
    policy = Policy()
    rates = [step(policy, VCPOSettings(), *rollouts(policy, lag=lag), rate=1e-9).learning_rates[0]
             for lag in (0.0, 0.3, 1.0, 3.0)]  # fmt: skip
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]
