"""Weights against their formulas, aggregations against repetition of samples, and that the variance is least."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.vcpo import VCPOSettings
from pronghorn.vcpo.baseline import baseline, baseline_weights

NORMS = torch.tensor([3.0, 1.0, 0.5, 2.0]).double()
LOGS = torch.tensor([0.3, -1.0, 2.5, -30.0]).double()
LENGTHS = torch.tensor([4, 1, 7, 2])


def formula(config):
    ratios = LOGS.exp()
    truncated = LOGS.clamp(-20, 20).exp().clamp(max=8)
    factor = ratios.clamp(max=8) if config.use_clipped_is_ratios else ratios
    if config.opob_weight == "exact":
        return (truncated / LENGTHS) ** 2 * NORMS**2
    weights = NORMS**2 if config.opob_weight == "paper" else (truncated * NORMS) ** 2
    weights = weights * factor**2 if config.use_is_weights else weights
    return weights / LENGTHS**2 if config.normalize_by_length else weights


@pytest.mark.parametrize("weight", ["paper", "reference"])
@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("length", [True, False])
def test_weights(weight, use, clipped, length):
    config = VCPOSettings(
        opob_weight=weight, use_is_weights=use, use_clipped_is_ratios=clipped, normalize_by_length=length
    )
    check_weights(config)


def test_exact_weights_are_the_references_with_two_options():
    found = check_weights(VCPOSettings(opob_weight="exact"))
    options = {"use_is_weights": False, "normalize_by_length": True}
    reference = baseline_weights(NORMS, LOGS, LENGTHS, VCPOSettings(opob_weight="reference", **options))
    assert torch.allclose(found, reference / reference.max(), rtol=1e-12)


def check_weights(config):
    found, wanted = baseline_weights(NORMS, LOGS, LENGTHS, config), formula(config)
    if config.opob_weight != "reference":
        wanted = wanted / wanted.max()
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0)
    return found


def test_ratios_that_overflow():
    norms, lengths = torch.ones(2), torch.ones(2)
    logs = torch.tensor([1000.0, 1000.0])
    for weight in ("paper", "exact"):
        assert baseline_weights(norms, logs, lengths, VCPOSettings(opob_weight=weight)).tolist() == [1, 1]
    with pytest.raises(ValueError, match="weights overflow"):
        baseline_weights(norms, logs, lengths, VCPOSettings(opob_weight="reference"))


@pytest.mark.parametrize("weight", ["paper", "exact", "reference"])
def test_nothing_weighs(weight):
    """Only empty completions, or gradients that vanish."""
    config = VCPOSettings(opob_weight=weight)
    weights = baseline_weights(torch.zeros(3), torch.zeros(3), torch.zeros(3), config)
    assert weights.tolist() == [0, 0, 0]
    assert baseline(torch.ones(3), weights, config) == 0
    assert baseline(torch.ones(0), torch.ones(0), config) == 0


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_whole_weights_are_repetitions(pairs):
    repeated = sorted(value for value, weight in pairs for _ in range(weight))
    values, weights = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    found = {mode: baseline(values, weights, VCPOSettings(opob_aggregation=mode)) for mode in MODES}
    if not repeated:
        assert set(found.values()) == {0}
        return
    count = len(repeated)
    # 0.05 and 0.95 as floats decide at exact multiples of a twentieth
    low, high = (repeated[math.ceil(share * count - 1e-9) - 1] for share in (0.05, 0.95))
    assert found["mean"] == pytest.approx(sum(repeated) / count)
    assert found["median"] == repeated[math.ceil(count / 2) - 1]
    if count % 20:
        clipped = [min(max(value, low), high) for value in repeated]
        assert found["winsorized_mean"] == pytest.approx(sum(clipped) / count)
    assert all(repeated[0] - 1e-9 <= value <= repeated[-1] + 1e-9 for value in found.values())


MODES = ("mean", "median", "winsorized_mean")


def test_bad_weights():
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weights: got a negative number, NaN or infinity"):
            baseline(torch.ones(2), torch.tensor([1.0, value]), VCPOSettings())
    with pytest.raises(ValueError, match=r"weights: got \[3\], wanted"):
        baseline(torch.ones(2), torch.ones(3), VCPOSettings())


def bandit(samples=100_000):
    """Two arms with rewards 1 and 0.2, three pulls a trajectory: ratios, scores and rewards."""
    generator = torch.Generator().manual_seed(0)
    learner, sampler = torch.tensor([0.75, 0.25]).double(), torch.tensor([0.4, 0.6]).double()
    lengths = torch.randint(1, 6, (samples,), generator=generator)
    pulls = torch.multinomial(sampler, samples * 5, replacement=True, generator=generator).reshape(samples, 5)
    mask = torch.arange(5) < lengths[:, None]
    logs = ((learner / sampler).log()[pulls] * mask).sum(1)
    # the learner is a softmax of (theta, 0): the score of the first arm is 1 - p, of the second -p
    score = ((pulls == 0).double() - learner[0]).mul(mask).sum(1)
    rewards = (torch.tensor([1.0, 0.2]).double()[pulls] * mask).sum(1) / lengths
    return logs, score, rewards, lengths


def test_the_variance_is_least_at_the_papers_baseline():
    logs, score, rewards, lengths = bandit()
    found = {
        weight: baseline(rewards, baseline_weights(score.abs(), logs, lengths, VCPOSettings(opob_weight=weight)),
                         VCPOSettings(opob_weight=weight))
        for weight in ("paper", "exact", "reference")
    }  # fmt: skip
    grid = torch.linspace(0, 1.2, 1201).double()

    def moments(coefficients):
        gradients = coefficients * (rewards - grid[:, None]) * score
        return gradients.var(1), gradients.square().mean(1)

    variance, _ = moments(logs.exp())
    assert float(grid[variance.argmin()]) == pytest.approx(found["paper"], rel=0.01)
    for other in (float(rewards.mean()), found["reference"]):
        assert variance[int(other * 1000)] > variance.min()
    _, second = moments(logs.exp().clamp(max=8) / lengths)
    assert float(grid[second.argmin()]) == pytest.approx(found["exact"], rel=0.01)
