"""Time of all of a work from that of a part: on a CPU what starts it counts, on a GPU it is taken to be compiling."""

import pytest
import torch

from pronghorn import estimate
from pronghorn.estimate import StepClock, of_pieces

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Clock:
    """Time that goes on only where it is told to."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self, device=None):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(estimate, "now", clock)
    monkeypatch.setattr(estimate.time, "perf_counter", clock)
    monkeypatch.setattr(estimate, "peak_bytes", lambda device: 0)
    return clock


@pytest.mark.parametrize(("device", "seconds"), [(CPU, 7.0 + 9 * 2.0), (GPU, 10 * 2.0)], ids=str)
def test_steps_whose_first_starts_things(clock, device, seconds):
    steps = StepClock(device, started=clock.seconds)
    for took in (7.0, 1.0, 3.0):
        clock.seconds += took
        steps()
    assert steps.scaled(10) == pytest.approx(seconds)


def test_one_step_says_nothing_of_more(clock):
    steps = StepClock(CPU, started=clock.seconds)
    clock.seconds += 4.0
    steps()
    assert steps.over(1) == 4.0
    with pytest.raises(ValueError, match="steps: 1 were timed, wanted at least 2"):
        steps.scaled(2)


@pytest.mark.parametrize(("device", "starting"), [(CPU, 5.0), (GPU, 0.0)], ids=str)
def test_pieces_whose_first_starts_things(clock, device, starting):
    """A piece takes as many seconds as its size; on a GPU every size starts something of its own."""
    started = set()

    def work(index):
        kernel = sizes[index] if device is GPU else None
        clock.seconds += sizes[index] + (0.0 if kernel in started else 5.0)
        started.add(kernel)
        return 10 * sizes[index]

    sizes = [4, 1, 9, 2, 6, 3, 8, 5, 7, 12]
    found = of_pieces(sizes, work, device, "pieces")
    assert found.seconds == pytest.approx(sum(sizes) + starting)
    assert found.disk_bytes == 10 * sum(sizes)
    assert found.basis == "5 of 10 pieces"
    with pytest.raises(ValueError, match="pieces: there are none"):
        of_pieces([], work, device, "pieces")
