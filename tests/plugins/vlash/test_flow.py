"""Flow matching: times, interpolation, what is averaged, and integration."""

import pytest
import torch

from pronghorn.vlash.flow import euler_times, integrate, interpolate, reduce_loss, sample_times, target


def test_times_follow_the_distribution():
    times = (sample_times((400, 100), generator=torch.Generator().manual_seed(0)) - 0.001) / 0.999
    assert times.shape == (400, 100)
    assert 0 <= times.min() <= times.max() <= 1
    exact = torch.distributions.Beta(1.5, 1.0)
    assert times.mean() == pytest.approx(float(exact.mean), abs=3e-3)
    assert times.var() == pytest.approx(float(exact.variance), abs=1e-3)
    for part in (0.1, 0.5, 0.9):
        assert torch.quantile(times.flatten()[:16000], part) == pytest.approx(part ** (2 / 3), abs=1e-2)


def test_the_path_goes_from_actions_to_noise_at_the_target_velocity():
    actions, noise = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    ends = [interpolate(actions, noise, torch.full((2, 3), time).double()) for time in (0.0, 1.0)]
    assert torch.equal(ends[0], actions)
    assert torch.equal(ends[1], noise)
    time = torch.rand(2, 3).double()
    change = interpolate(actions, noise, time + 0.01) - interpolate(actions, noise, time)
    torch.testing.assert_close(change, 0.01 * target(actions, noise))
    with pytest.raises(ValueError, match="time: got"):
        interpolate(actions, noise, torch.rand(2))
    with pytest.raises(ValueError, match="noise: got"):
        interpolate(actions, noise[:, :1], time)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_straight_field_is_integrated_exactly(steps):
    actions, noise = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 3).double()
    seen = []

    def velocity(x, time):
        seen.append(time)
        torch.testing.assert_close(x, time * noise + (1 - time) * actions)
        return noise - actions

    torch.testing.assert_close(integrate(velocity, noise, steps), actions)
    assert seen == euler_times(steps) == pytest.approx([1 - step / steps for step in range(steps)])


def test_a_guide_has_the_field_the_place_and_the_time():
    noise = torch.ones(2, 2)
    seen = []

    def guide(velocity, x, time):
        seen.append((float(velocity(x)[0, 0]), float(x[0, 0]), time))
        return torch.full_like(x, 2.0)

    found = integrate(lambda x, time: 10 * x + time, noise, 2, guide)
    assert found.tolist() == [[-1.0, -1.0]] * 2
    assert seen == [(11.0, 1.0, 1.0), (0.5, 0.0, 0.5)]


def test_no_step_is_refused():
    with pytest.raises(ValueError, match="steps: got 0"):
        integrate(lambda x, time: x, torch.ones(1), 0)


def test_padding_counts_as_no_error_or_not_at_all():
    elements = torch.rand(2, 3, 4)
    is_pad = torch.tensor([[False, False, True], [False, True, True]])
    real = elements * ~is_pad[..., None]
    assert reduce_loss(elements) == pytest.approx(float(elements.mean()))
    assert reduce_loss(elements, is_pad) == pytest.approx(float(real.sum() / 24))
    assert reduce_loss(elements, is_pad, exclude_padding=True) == pytest.approx(float(real.sum() / 12))
    assert reduce_loss(elements, is_pad, action_dim=2) == pytest.approx(float(real[..., :2].sum() / 12))
    each = reduce_loss(elements, is_pad, reduction="none")
    torch.testing.assert_close(each, real.sum((1, 2)) / 12)
    each = reduce_loss(elements, is_pad, exclude_padding=True, reduction="none")
    torch.testing.assert_close(each, real.sum((1, 2)) / torch.tensor([8.0, 4.0]))


def test_branches_that_are_padding_do_not_count():
    elements, mask = torch.rand(2, 3, 4, 5), torch.tensor([[True, False, False], [True, True, False]])
    is_pad = torch.zeros(2, 3, 4, dtype=torch.bool)
    is_pad[0, 0, 2:] = True
    poisoned = torch.where(mask[..., None, None] & ~is_pad[..., None], elements, torch.nan)
    found = reduce_loss(poisoned, is_pad, mask)
    valid = elements * mask[..., None, None] * ~is_pad[..., None]
    assert found == pytest.approx(float(valid.sum() / (3 * 4 * 5)))
    assert reduce_loss(poisoned, is_pad, mask, exclude_padding=True) == pytest.approx(float(valid.sum() / 50))
    nothing = reduce_loss(elements, is_pad, torch.zeros_like(mask), reduction="none")
    assert nothing.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_pad": torch.zeros(2, 4, dtype=torch.bool)}, "is_pad: got"),
        ({"offset_mask": torch.zeros(2, 2, dtype=torch.bool)}, "offset_mask: got"),
        ({"reduction": "sum"}, "reduction: got 'sum'"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        reduce_loss(torch.zeros(2, 3, 4, 5), **arguments)
