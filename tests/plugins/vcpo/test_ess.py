"""Effective sample size: its definition, its invariances, extremes, and that rates are scaled inside a step alone."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.vcpo import ReferenceESS, VCPOSettings, effective_sample_size, learning_rate_scale, scaled_learning_rate

LOGS = st.lists(st.floats(-30, 30), min_size=1, max_size=20)


@given(LOGS)
def test_definition(logs):
    weights = [Fraction(math.exp(value)) for value in logs]
    exact = float(sum(weights) ** 2 / sum(weight**2 for weight in weights))
    assert effective_sample_size(torch.tensor(logs, dtype=torch.float64)) == pytest.approx(exact, rel=1e-9)


@given(LOGS, st.floats(-1e4, 1e4))
def test_a_common_factor_changes_nothing_and_it_stays_in_range(logs, shift):
    logs = torch.tensor(logs, dtype=torch.float64)
    found = effective_sample_size(logs + shift)
    assert found == pytest.approx(effective_sample_size(logs), rel=1e-9)
    assert 1 - 1e-9 <= found <= len(logs) + 1e-9


def test_extremes():
    assert effective_sample_size(torch.tensor([1194.0, 0.0])) == pytest.approx(1)
    assert effective_sample_size(torch.full((3,), -40.0)) == pytest.approx(3)
    assert math.isnan(effective_sample_size(torch.tensor([1194.0, 0.0]), "reference"))
    assert effective_sample_size(torch.full((3,), -40.0), "reference") < 1e-20


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_ratios(value):
    with pytest.raises(ValueError, match="log_ratios: got NaN or infinity"):
        effective_sample_size(torch.tensor([0.0, value]))
    with pytest.raises(ValueError, match=r"log_ratios: got \[0\], wanted"):
        effective_sample_size(torch.zeros(0))


def test_scale():
    assert learning_rate_scale(1.0, 1.0, "sqrt") == 1.0
    assert learning_rate_scale(0.25, 1.0, "sqrt") == 0.5
    assert learning_rate_scale(0.25, 0.5, "linear") == 0.5
    assert learning_rate_scale(0.9, 0.5, "linear") == 1.0
    assert learning_rate_scale(0.1, 1.0, "off") == 1.0
    with pytest.raises(ValueError, match="ess_ratio: got nan"):
        learning_rate_scale(math.nan, 1.0, "sqrt")
    with pytest.raises(ValueError, match="reference: got 0"):
        learning_rate_scale(0.5, 0.0, "sqrt")


def test_the_automatic_reference():
    reference = ReferenceESS(VCPOSettings(ess_reference="auto", ess_reference_decay=0.5))
    assert reference.value == 1.0
    reference.update(0.1, staleness=3)
    assert reference.value == 1.0
    reference.update(0.6, staleness=0)
    assert reference.value == 0.6
    reference.update(0.4, staleness=0)
    assert reference.value == pytest.approx(0.5)
    again = ReferenceESS(VCPOSettings(ess_reference="auto"))
    again.load_state_dict(reference.state_dict())
    assert again.value == reference.value
    with pytest.raises(ValueError, match="staleness: got -1"):
        reference.update(0.5, staleness=-1)


def test_a_given_reference_stays():
    reference = ReferenceESS(VCPOSettings(ess_reference=0.55))
    reference.update(0.9, staleness=0)
    assert reference.value == 0.55


def test_rates_are_scaled_inside_alone():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": weights[0], "lr": 0.1}, {"params": weights[1], "lr": 0.3}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with scaled_learning_rate(optimizer, 0.5):
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.15]
        optimizer.step()
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]
    with pytest.raises(RuntimeError, match="lost"), scaled_learning_rate(optimizer, 0.5):
        raise RuntimeError("lost")
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]
