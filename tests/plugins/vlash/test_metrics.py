"""Latencies, reactions, jumps and jerk, held against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.latency import LatencyTracker, overlap_for, percentile
from pronghorn.vlash.metrics import boundary_jump, jerk, paper_reaction_latency, reaction_latencies, typical_step


def test_boundary_jump():
    actions = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 5.0], [3.0, 6.0], [3.0, 6.0]])
    assert boundary_jump(actions, [0, 2]) == 5.0
    assert typical_step(actions, [0, 2]) == pytest.approx(2 / 3)
    assert boundary_jump(actions, [2, 4]) == 2.5
    assert boundary_jump(actions, [0]) is None
    assert typical_step(actions, range(5)) is None
    batched = torch.stack([actions, actions * 3], 1)
    assert boundary_jump(batched, [2]) == 10.0
    assert typical_step(batched, [2]) == pytest.approx(4 / 3)
    with pytest.raises(ValueError, match=r"boundaries: got \[5\], wanted steps from 0 to 4"):
        boundary_jump(actions, [5])


def test_jerk():
    time = torch.arange(20, dtype=torch.float64) / 30
    cubic = torch.stack([time**3, 2 * time**3], -1)
    assert jerk(cubic, 30) == pytest.approx(math.hypot(6, 12))
    assert jerk(torch.stack([cubic, -cubic], 1), 30) == pytest.approx(math.hypot(6, 12))
    assert jerk(time[:, None] ** 2, 30) == pytest.approx(0, abs=1e-6)
    assert jerk(cubic[:3], 30) is None


def test_reaction_latencies():
    commands, observed = [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.5, 1.5]
    assert reaction_latencies([0.0, 0.5, 1.5, 1.6], commands, observed) == [0.0, 2.5, 1.5]
    assert reaction_latencies([0.5], [1.0, 2.0], [-math.inf, 0.75]) == [1.5]
    with pytest.raises(ValueError, match="observed: got 1 times, wanted one a command, 2"):
        reaction_latencies([], [0.0, 1.0], [0.0])


def test_the_papers_figures():
    """Chunks of 25 at 50 Hz on an RTX 5090: 30.4 ms for 530.4."""
    kwargs = {"n_action_steps": 25, "fps": 50, "inference_overlap_steps": 2}
    assert paper_reaction_latency(VLASHSettings(async_mode="sync", **kwargs), 0.0304) == pytest.approx(0.5304)
    assert paper_reaction_latency(VLASHSettings(**kwargs), 0.0304) == 0.0304


@given(st.lists(st.floats(0, 9), min_size=1, max_size=30), st.floats(0.1, 100))
def test_percentile(values, percent):
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - 1e-9
    assert sum(value < found for value in values) < len(values) * percent / 100


def test_latency_tracker():
    tracker = LatencyTracker(window=20)
    assert (tracker.p50, tracker.p95, tracker.max, len(tracker)) == (None, None, None, 0)
    tracker.add(99.0)
    assert (tracker.p95, len(tracker)) == (99.0, 1)
    tracker.add(98.0)
    assert (tracker.max, len(tracker)) == (98.0, 1), "the first one counts only until there is a second"
    tracker.add(1.0)
    assert (tracker.max, len(tracker)) == (98.0, 2)
    for value in range(1, 21):
        tracker.add(value / 10)
    assert (tracker.p50, tracker.p95, tracker.max, len(tracker)) == (1.0, 1.9, 2.0, 20)
    for seconds in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="seconds: got"):
            tracker.add(seconds)
    with pytest.raises(ValueError, match="window: got 0"):
        LatencyTracker(0)
    with pytest.raises(ValueError, match="percent: got 0"):
        percentile([1.0], 0)


def test_overlap():
    assert [overlap_for(latency, 30, 8) for latency in (0.0, 0.01, 0.1, 0.101, 9.0)] == [1, 1, 3, 4, 8]
