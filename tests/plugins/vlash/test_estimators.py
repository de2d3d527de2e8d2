"""Where the robot will be: perfect robots must be predicted exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.estimators import state_estimator
from pronghorn.vlash.quantization import merge_chunk

STATE, PENDING = torch.tensor([1.0, 2.0]), torch.tensor([[0.5, -4.0], [0.25, 3.0]])


def test_last_action():
    assert state_estimator(VLASHSettings())(STATE, PENDING).tolist() == [0.25, 3.0]
    limited = VLASHSettings(action_low=[0.3, -1.0], action_high=[1.0, 2.5])
    assert state_estimator(limited)(STATE, PENDING).tolist() == pytest.approx([0.3, 2.5])
    changes = VLASHSettings(delta_dims=[0])
    assert state_estimator(changes)(STATE, PENDING).tolist() == [0.25, 3.0]


def test_sum_delta():
    settings = VLASHSettings(state_estimator="sum_delta")
    assert state_estimator(settings)(STATE, PENDING).tolist() == [1.75, 1.0]
    settings = VLASHSettings(state_estimator="sum_delta", action_low=[-1.0, -1.0], action_high=[0.4, 0.4])
    assert state_estimator(settings)(STATE, PENDING).tolist() == pytest.approx([1.65, 1.4])
    settings = VLASHSettings(state_estimator="sum_delta", delta_dims=[0])
    assert state_estimator(settings)(STATE, PENDING).tolist() == [1.75, 3.0]


def test_measured():
    assert state_estimator(VLASHSettings(state_estimator="measured"))(torch.ones(5), PENDING).tolist() == [1.0] * 5


def test_delta_masked():
    settings = VLASHSettings(state_estimator="delta_masked", state_from_action=[1, None, 0, 1, None], delta_dims=[0])
    state = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    assert state_estimator(settings)(state, PENDING).tolist() == [3.0, 20.0, 30.75, 3.0, 50.0]
    batched = state_estimator(settings)(state.expand(2, 3, 5), PENDING.expand(2, 3, 2, 2))
    assert torch.equal(batched, torch.tensor([3.0, 20.0, 30.75, 3.0, 50.0]).expand(2, 3, 5))


@pytest.mark.parametrize("name", ["last_action", "sum_delta", "delta_masked", "measured"])
def test_nothing_pending(name):
    settings = VLASHSettings(state_estimator=name, state_from_action=[0, 1])
    assert torch.equal(state_estimator(settings)(STATE, PENDING[:0]), STATE)


@pytest.mark.parametrize("name", ["last_action", "sum_delta"])
def test_sizes_that_differ(name):
    message = f"'{name}' with 3 coordinates of the state and 2 of an action.*'delta_masked' with state_from_action"
    with pytest.raises(ValueError, match=message):
        state_estimator(VLASHSettings(state_estimator=name))(torch.zeros(3), PENDING)


def test_settings_that_do_not_fit():
    for sources in ([0, 1, 1], [0, 2]):
        settings = VLASHSettings(state_estimator="delta_masked", state_from_action=sources)
        with pytest.raises(ValueError, match=r"state_from_action: got .* wanted 2 entries"):
            state_estimator(settings)(STATE, PENDING)
    with pytest.raises(ValueError, match="action_high: got 1 values, wanted action_dim, 2"):
        state_estimator(VLASHSettings(action_high=[1.0]))(STATE, PENDING)
    with pytest.raises(ValueError, match=r"delta_dims: got .*below action_dim, 2"):
        state_estimator(VLASHSettings(state_estimator="sum_delta", delta_dims=[2]))(STATE, PENDING)
    with pytest.raises(ValueError, match=r"pending: got \[2, 2\] with a state of \[1, 2\]"):
        state_estimator(VLASHSettings())(STATE[None], PENDING)


def test_the_state_keeps_its_dtype():
    found = state_estimator(VLASHSettings())(STATE.double(), PENDING)
    assert found.dtype == torch.float64


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_a_perfect_integrator(ratio, groups, seed, limited):
    generator = torch.Generator().manual_seed(seed)
    limits = {"action_low": [-0.5, -0.1, -2.0], "action_high": [0.5, 0.2, 2.0]} if limited else {}
    settings = VLASHSettings(
        n_action_steps=ratio * groups, inference_overlap_steps=0, action_quant_ratio=ratio, delta_dims=[0, 1],
        state_estimator="delta_masked", state_from_action=[1, 0, None, 2], **limits,
    )  # fmt: skip
    start = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    pending = torch.randn(4, ratio * groups, 3, generator=generator, dtype=torch.float64)
    robot = start.clone()
    for command in merge_chunk(pending, settings).unbind(-2):
        if limited:
            command = command.clamp(torch.tensor(limits["action_low"]), torch.tensor(limits["action_high"]))
        robot[:, 0] += command[:, 1]
        robot[:, 1] += command[:, 0]
        robot[:, 3] = command[:, 2]
    assert torch.allclose(state_estimator(settings)(start, pending), robot, atol=1e-6)


@given(st.integers(1, 6), st.integers(0, 99))
def test_sum_delta_on_a_perfect_integrator(delay, seed):
    generator = torch.Generator().manual_seed(seed)
    state, pending = torch.randn(3, 2, generator=generator), torch.randn(3, delay, 2, generator=generator)
    limits = {"action_low": [-0.12, -0.12], "action_high": [0.12, 0.12]}
    settings = VLASHSettings(state_estimator="sum_delta", **limits)
    robot = state.clone()
    for action in pending.unbind(-2):
        robot += action.clamp(-0.12, 0.12)
    assert torch.allclose(state_estimator(settings)(state, pending), robot, atol=1e-6)
