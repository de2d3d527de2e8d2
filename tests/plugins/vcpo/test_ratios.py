"""Ratios against sums and exponentials in NumPy, token by token."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.kernels.seq_is_stats import seq_is_stats
from pronghorn.vcpo import VCPOSettings, ratios


def drawn(seed, rows=5, tokens=7):
    generator = torch.Generator().manual_seed(seed)
    learner, sampler = (-torch.rand(rows, tokens, generator=generator).double() * 3 for _ in range(2))
    return learner, sampler, torch.rand(rows, tokens, generator=generator) > 0.3


@given(seed=st.integers(0, 2**16))
def test_definitions(seed):
    learner, sampler, mask = drawn(seed)
    tokens, found = ratios.token_log_ratios(learner, sampler, mask), seq_is_stats(learner, sampler, mask)
    for row in range(len(mask)):
        pairs = [(float(learner[row, t]), float(sampler[row, t])) for t in range(7) if mask[row, t]]
        differences = np.array([a - b for a, b in pairs])
        length = max(len(pairs), 1)
        ratio = math.prod(math.exp(a) / math.exp(b) for a, b in pairs)
        k3 = (np.exp(differences) - differences - 1).sum() / length
        for logs in (ratios.sequence_log_ratios(tokens), found.log_ratios):
            assert float(logs[row].exp()) == pytest.approx(ratio, rel=1e-10)
        assert float(found.geometric_mean[row]) == pytest.approx(ratio ** (1 / length), rel=1e-10)
        assert float(found.k3[row]) == pytest.approx(k3, rel=1e-10, abs=1e-15)


def test_truncation_and_clamp():
    logs = torch.tensor([-50.0, -1.0, 1.0, 3.0, 900.0])
    loss = ratios.truncated_log_ratios(logs, VCPOSettings()).exp()
    assert loss.tolist() == pytest.approx([math.exp(-20), math.exp(-1), math.e, 8, 8])
    assert ratios.clipped_log_ratios(logs, VCPOSettings())[0] == -50
    free = VCPOSettings(is_truncation=None, log_ratio_clamp=2.0)
    assert ratios.truncated_log_ratios(logs, free).tolist() == [-2, -1, 1, 2, 2]


def test_what_is_masked_is_never_looked_at():
    learner, sampler, mask = drawn(1)
    wanted = ratios.token_log_ratios(learner, sampler, mask)
    for value in (math.nan, -math.inf, math.inf):
        found = ratios.token_log_ratios(learner.masked_fill(~mask, value), sampler.masked_fill(~mask, value), mask)
        assert torch.equal(found, wanted)


@pytest.mark.fault(25)
def test_an_empty_completion_has_ratio_one():
    learner, sampler, mask = drawn(2)
    mask[3] = False
    tokens = ratios.token_log_ratios(learner, sampler, mask)
    assert ratios.sequence_log_ratios(tokens)[3] == 0
    found = seq_is_stats(learner, sampler, mask)
    assert (found.log_ratios[3], found.geometric_mean[3], found.k3[3]) == (0, 1, 0)


@pytest.mark.fault(25)
def test_a_sampler_without_a_number_counts_as_one_and_is_said_once(caplog):
    learner, sampler, mask = drawn(3)
    mask[:] = True
    sampler[1, 2] = math.nan
    ratios._warn_of_missing.cache_clear()
    with caplog.at_level(logging.WARNING):
        tokens = ratios.token_log_ratios(learner, sampler, mask)
        ratios.token_log_ratios(learner, sampler, mask)
    assert tokens[1, 2] == 0
    assert torch.equal(tokens[0], learner[0] - sampler[0])
    assert len([record for record in caplog.records if "sampler_log_probs" in record.message]) == 1


@pytest.mark.parametrize(
    ("which", "value"), [(0, math.nan), (0, -math.inf), (0, math.inf), (1, -math.inf), (1, math.inf)]
)
@pytest.mark.fault(25)
def test_what_is_no_probability_is_named(which, value):
    *pair, mask = drawn(4)
    mask[2, 5] = True
    pair[which][2, 5] = value
    name = ("log_probs", "sampler_log_probs")[which]
    with pytest.raises(ValueError, match=rf"^{name}: got {value} at \[2, 5\], wanted a finite number"):
        ratios.token_log_ratios(*pair, mask)


def test_shapes_and_dtypes():
    learner, sampler, mask = drawn(5)
    with pytest.raises(TypeError, match=r"^mask: got torch\.int64"):
        ratios.token_log_ratios(learner, sampler, mask.long())
    with pytest.raises(ValueError, match=r"^sampler_log_probs: got \[5, 6\], wanted mask's \[5, 7\]"):
        ratios.token_log_ratios(learner, sampler[:, 1:], mask)


def test_no_gradient_goes_through():
    learner, sampler, mask = drawn(6)
    assert not ratios.token_log_ratios(learner.requires_grad_(), sampler, mask).requires_grad
