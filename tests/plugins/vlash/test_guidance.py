"""Guidance of a chunk by the one that runs: against numbers by hand, LeRobot's, and a Jacobian written out."""

import math

import pytest
import torch
from torch import nn

from pronghorn.vlash.guidance import SCHEDULES, guidance_gain, guided_velocity, prefix_weights

E = math.e


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [
        ("linear", [0.75, 0.5, 0.25]),
        ("exp", [w * (E**w - 1) / (E - 1) for w in (0.75, 0.5, 0.25)]),
        ("ones", [1, 1, 1]),
        ("zeros", [0, 0, 0]),
    ],
)
def test_weights(schedule, middle):
    torch.testing.assert_close(prefix_weights(2, 5, 7, schedule), torch.tensor([1.0, 1.0, *middle, 0.0, 0.0]))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("delay", "end", "total", "wanted"),
    [
        (6, 3, 5, [1, 1, 1, 0, 0]),  # what is executed is longer than what is there
        (0, 0, 3, [0, 0, 0]),
        (9, 9, 3, [1, 1, 1]),
        (3, 3, 3, [1, 1, 1]),
    ],
)
def test_weights_at_the_edges(schedule, delay, end, total, wanted):
    assert prefix_weights(delay, end, total, schedule).tolist() == wanted


def test_weights_that_end_beyond_the_chunk():
    """The fall is spread over what the chunk has."""
    torch.testing.assert_close(prefix_weights(1, 9, 3, "linear"), torch.tensor([1.0, 2 / 3, 1 / 3]))


@pytest.mark.parametrize(
    ("values", "name"),
    [((-1, 2, 3), "delay"), ((0, -2, 3), "end"), ((0, 2, -3), "total"), ((0, 2, 3, "soft"), "schedule: got 'soft'")],
)
def test_bad_weights(values, name):
    with pytest.raises(ValueError, match=name):
        prefix_weights(*values)


def test_gain():
    """By hand: tau = 1 - t, (1 - tau) / tau * ((1 - tau)^2 + tau^2) / (1 - tau)^2."""
    assert guidance_gain(0.5, 100).item() == pytest.approx(1 * 0.5 / 0.25)
    assert guidance_gain(0.2, 100).item() == pytest.approx(0.25 * 0.68 / 0.04)
    assert guidance_gain(0.9, 100).item() == pytest.approx(9 * 0.82 / 0.81)
    assert guidance_gain(0.9, 5).item() == 5
    assert guidance_gain(1, 7).item() == 7
    assert guidance_gain(0, 7).item() == 0
    assert guidance_gain(torch.tensor([1.0, 0.5]), 4).tolist() == [4, 2]


def test_identity_by_hand():
    """A field of 2x: at t = 0.5, x - t v = 0, so the correction is the wanted actions times the weights."""
    x = torch.tensor([[1.0], [2.0], [3.0]])
    leftover = torch.tensor([[10.0], [20.0]])
    # Weights 1 (executed), 1/2 (fading over one step), 0; the gain at 0.5 is 2.
    found = guided_velocity(lambda at: 2 * at, x, 0.5, leftover, 1, schedule="linear")
    torch.testing.assert_close(found, torch.tensor([[2 - 2 * 10.0], [4 - 2 * 0.5 * 20], [6.0]]))


def test_full_by_hand():
    """The same field: the Jacobian of x - t v is 1 - 0.5 * 2 = 0, so nothing is corrected."""
    x = torch.tensor([[1.0], [2.0], [3.0]])
    found = guided_velocity(lambda at: 2 * at, x, 0.5, torch.tensor([[10.0], [20.0]]), 1, full_jacobian=True)
    torch.testing.assert_close(found, 2 * x)


def network(size):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(-2), nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, size), nn.Unflatten(-1, (-1, 2))
    ).double()


@pytest.mark.parametrize("t", [1.0, 0.7, 0.2])
def test_full_against_the_whole_jacobian(t):
    field, gain = network(10), guidance_gain(t, 5.0).double()
    x, leftover = torch.randn(5, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)

    def actions(at):
        return at - t * field(at)

    jacobian = torch.autograd.functional.jacobian(actions, x).view(10, 10)
    wanted = torch.cat([leftover, torch.zeros(1, 2)])
    weights = prefix_weights(2, 3, 5).double()[:, None]
    error = (weights * (wanted - actions(x))).flatten()
    expected = field(x) - gain * (jacobian.T @ error).view(5, 2)
    found = guided_velocity(field, x, t, leftover, 2, execution_end=3, cap=5.0, full_jacobian=True)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)
    identity = guided_velocity(field, x, t, leftover, 2, execution_end=3, cap=5.0)
    torch.testing.assert_close(identity, (field(x) - gain * error.view(5, 2)).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("full", [False, True])
def test_a_batch_is_each_alone(full):
    field = network(10)
    x, leftover = torch.randn(3, 5, 2, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    together = guided_velocity(field, x, 0.6, leftover, 2, full_jacobian=full)
    alone = [guided_velocity(field, x[row], 0.6, leftover[row], 2, full_jacobian=full) for row in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))
    assert not together.requires_grad
    assert not x.requires_grad


def test_guidance_leads_to_what_runs():
    """Integrated, the executed actions come out as they are running, the free ones do not."""
    leftover = torch.full((4, 1), 3.0)
    plain = x = torch.randn(6, 1)
    for t in (1.0, 0.8, 0.6, 0.4, 0.2):
        x = x - 0.2 * guided_velocity(lambda at: at, x, t, leftover, 2, execution_end=2, cap=5.0)
        plain = plain - 0.2 * plain
    torch.testing.assert_close(x[:2], leftover[:2], atol=0.15, rtol=0)
    torch.testing.assert_close(x[2:], plain[2:])


def test_nothing_runs():
    x = torch.randn(4, 2)
    assert torch.equal(guided_velocity(torch.tanh, x, 0.5, None, 0, full_jacobian=True), x.tanh())


def test_what_the_leftover_lacks_is_zero():
    x = torch.randn(4, 3)
    narrow = torch.randn(2, 2)
    wide = torch.zeros(2, 3)
    wide[:, :2] = narrow
    assert torch.equal(guided_velocity(torch.tanh, x, 0.5, narrow, 1), guided_velocity(torch.tanh, x, 0.5, wide, 1))


@pytest.mark.parametrize("shape", [(5, 2), (4, 3)])
def test_a_leftover_beyond_the_chunk(shape):
    with pytest.raises(ValueError, match=r"leftover: got \d steps of \d, wanted at most 4 of 2"):
        guided_velocity(torch.tanh, torch.randn(4, 2), 0.5, torch.randn(shape), 1)


def test_inference_mode():
    x, leftover = torch.randn(4, 2), torch.randn(4, 2)
    with torch.inference_mode():
        guided_velocity(torch.tanh, x, 0.5, leftover, 1)
        with pytest.raises(ValueError, match="full_jacobian"):
            guided_velocity(torch.tanh, x, 0.5, leftover, 1, full_jacobian=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("delay", "end", "steps"), [(0, 3, 6), (2, 5, 4), (3, 20, 6), (7, 4, 6)])
def test_the_same_as_lerobot(schedule, delay, end, steps):
    pytest.importorskip("lerobot")
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.policies.rtc.modeling_rtc import RTCProcessor

    theirs = RTCProcessor(RTCConfig(prefix_attention_schedule=RTCAttentionSchedule[schedule.upper()]))
    field = network(12).float()
    x, leftover = torch.randn(3, 6, 2), torch.randn(3, steps, 2)
    for t in (1.0, 0.7, 0.1):
        wanted = theirs.denoise_step(x, leftover, delay, t, field, end)
        found = guided_velocity(field, x, t, leftover, delay, execution_end=end, schedule=schedule)
        torch.testing.assert_close(found, wanted.detach())
