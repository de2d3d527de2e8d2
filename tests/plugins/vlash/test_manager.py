"""The tick machine: order, delays, leftovers, late chunks, errors, episodes."""

import json
import logging
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.plugins.vlash.stubs import CountingPolicy, FakeClock, LateExecutor, run, values

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.manager import RollForwardManager
from pronghorn.vlash.traces import replay_traces
from pronghorn.vlash.watchdog import (
    InvalidChunkError,
    InvalidStateError,
    NeedsResetError,
    PolicyError,
    StaleCommandError,
    VLASHError,
)
from pronghorn.vlash.worker import Immediate

TRACES = Path(__file__).parents[2] / "golden/data/vlash/async_manager_traces.json"
SKIPPING = ("naive", "rtc", "rtc_full")


def settings_of(steps, overlap, ratio=1, mode="vlash", extra=0, **values):
    return VLASHSettings(
        chunk_size=steps + extra, n_action_steps=steps, inference_overlap_steps=overlap, action_quant_ratio=ratio,
        async_mode=mode, **values,
    )  # fmt: skip


@st.composite
def schedules(draw, modes=("sync", "naive", "rtc", "rtc_full", "vlash")):
    steps = draw(st.integers(1, 9))
    overlap, ratio = draw(st.integers(0, steps)), draw(st.integers(1, 4))
    return settings_of(steps, overlap, ratio, draw(st.sampled_from(modes)), extra=steps)


def test_official_traces():
    checks = replay_traces(TRACES)
    assert len(checks) == 16
    assert not [check for check in checks if not check.passed]


def test_a_wrong_trace_is_noticed(tmp_path):
    path = tmp_path / "async_manager_traces_wrong.json"
    trace = {
        "n_action_steps": 2, "inference_overlap_steps": 1, "action_quant_ratio": 1, "effective_overlap": 1,
        "events_step_fetched_action_sent": [[0, 1, 100.0, 1], [1, 0, 101.0, 1]], "sent": [100.0, 101.0],
        "policy_calls": [{"step": 0, "camera_tick": 0, "state": [0.0, 0.0]}],
    }  # fmt: skip
    path.write_text(json.dumps([trace]))
    failed = [check.name for check in replay_traces(path) if not check.passed]
    assert [name.split(": ")[1] for name in failed] == ["events_step_fetched_action_sent", "policy_calls"]


@given(schedules(), st.integers(1, 60))
def test_order_without_gap_or_repetition(settings, count):
    policy = CountingPolicy(settings.chunk_size)
    ticks = run(settings, policy, count)
    steps, skipped = settings.n_action_steps, 0
    if settings.async_mode in SKIPPING:
        skipped = min(settings.inference_overlap_steps * settings.action_quant_ratio, steps)
    expected = []
    for number in range(count):
        chunk, index = divmod(number, steps)
        expected.append(100.0 * (chunk + 1) + index + (skipped if chunk else 0))
    assert values(ticks) == expected
    assert [tick.chunk for tick in ticks] == [number // steps for number in range(count)]
    assert [tick.first for tick in ticks] == [number % steps == 0 for number in range(count)]
    assert sum(tick.send for tick in ticks) == count // settings.action_quant_ratio
    assert not any(tick.late for tick in ticks)


@given(schedules(), st.integers(1, 60))
def test_observations_are_read_only_where_needed(settings, count):
    policy = CountingPolicy(settings.chunk_size)
    ticks = run(settings, policy, count)
    seen = [number for number, tick in enumerate(ticks) if tick.fetched]
    assert sorted({request.observation.content for request in policy.requests}) == seen
    overlap = 0 if settings.async_mode == "sync" else settings.inference_overlap_steps * settings.action_quant_ratio
    steps = settings.n_action_steps
    overlap = min(overlap, steps)
    assert seen == sorted({0, *range(steps - overlap if overlap else steps, count, steps)})
    for number, tick in enumerate(ticks):
        of_its_chunk = policy.requests[tick.chunk].observation.content
        assert seen[tick.observation] == of_its_chunk <= number


@given(st.integers(1, 8), st.integers(1, 3), st.sampled_from(["naive", "rtc", "vlash"]))
def test_without_overlap_it_is_sync(steps, ratio, mode):
    ours = run(settings_of(steps, 0, ratio, mode), CountingPolicy(steps), 30)
    sync = run(settings_of(steps, min(steps, 3), ratio, "sync"), CountingPolicy(steps), 30)
    for one, other in zip(ours, sync, strict=True):
        assert torch.equal(one.action, other.action)
        assert (one.send, one.fetched, one.chunk) == (other.send, other.fetched, other.chunk)


def test_requests_of_vlash():
    policy = CountingPolicy(6)
    run(settings_of(5, 2, extra=1), policy, 11)
    states = [request.state.item() for request in policy.requests]
    assert states == [0.0, 104.0, 204.0]
    assert [request.delay for request in policy.requests] == [0, 2, 2]
    assert policy.requests[0].leftover is None
    assert policy.requests[1].leftover[:, 0].tolist() == [103.0, 104.0, 105.0]
    assert policy.requests[1].observation.state.item() == 3.0


@pytest.mark.parametrize("mode", SKIPPING)
def test_requests_of_naive_and_rtc(mode):
    policy = CountingPolicy(9)
    run(settings_of(5, 2, mode=mode, extra=4), policy, 11)
    assert [request.state.item() for request in policy.requests] == [0.0, 3.0, 8.0]
    assert policy.requests[1].leftover[:, 0].tolist() == [103.0, 104.0, 105.0, 106.0, 107.0, 108.0]
    assert policy.requests[2].leftover[:, 0].tolist() == [205.0, 206.0, 207.0, 208.0]


def test_an_overlap_larger_than_the_chunk_is_the_chunk():
    policy = CountingPolicy(4)
    ticks = run(settings_of(4, 3, ratio=2), policy, 9)
    assert [tick.fetched for tick in ticks] == [True, False, False, False, True, False, False, False, True]
    assert [request.delay for request in policy.requests] == [0, 4, 4, 4]


def test_any_estimator():
    policy = CountingPolicy(4)
    run(settings_of(4, 2), policy, 3, estimator=lambda state, pending: state - pending.sum(-2))
    assert policy.requests[1].state.item() == 2.0 - (102 + 103)
    with pytest.raises(ValueError, match=r"estimator: got a state of \[1, 1\] from it, wanted \[1\]"):
        run(settings_of(4, 2), policy, 3, estimator=lambda state, pending: state[None])


@pytest.mark.fault(26)
@pytest.mark.parametrize("mode", ["vlash", "naive", "sync"])
def test_no_chunk_is_asked_for_from_a_state_that_is_not_finite(mode):
    policy = CountingPolicy(6)
    manager = RollForwardManager(settings_of(4, 2, mode=mode, extra=2), policy)
    with pytest.raises(InvalidStateError, match=r"state: got 1 values of 2 .* first at \[1\]"):
        manager.tick(lambda: Observation(None, torch.tensor([0.0, torch.nan])))
    assert not policy.requests
    with pytest.raises(NeedsResetError):
        manager.tick(lambda: Observation(None, torch.zeros(2)))


@pytest.mark.fault(26)
def test_an_estimate_that_is_not_finite():
    with pytest.raises(InvalidStateError, match="estimator: got 1 values"):
        run(settings_of(4, 2), CountingPolicy(4), 3, estimator=lambda state, pending: state * torch.nan)


@pytest.mark.fault(26)
def test_changes_that_add_up_to_infinity_are_not_sent():
    settings = settings_of(4, 1, ratio=2, state_estimator="sum_delta")
    with pytest.raises(InvalidChunkError, match="command: got 1 values"):
        run(settings, lambda request: torch.full((4, 1), 3e38), 2)
    limited = settings_of(4, 1, ratio=2, state_estimator="sum_delta", action_high=[1.0])
    assert values(run(limited, lambda request: torch.full((4, 1), 3e38), 2))[1] == 1


@pytest.mark.parametrize("state", [[0.0], torch.zeros(1, dtype=torch.int64), None])
def test_a_state_is_a_tensor_of_floating_point_numbers(state):
    with pytest.raises(TypeError, match=r"state: got (list|torch.int64|NoneType), wanted a Tensor of floating-point"):
        Observation(None, state)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"action_low": [math.nan]}, "action_low: got"),
        ({"action_low": [math.inf]}, "action_low: got"),
        ({"action_high": [-math.inf]}, "action_high: got"),
        ({"action_low": [1.0, 0.0], "action_high": [0.0, 1.0]}, "action_low, action_high: got"),
    ],
)
def test_limits_that_no_command_keeps_to(limits, message):
    with pytest.raises(ValueError, match=message):
        VLASHSettings(**limits)
    VLASHSettings(action_low=[-math.inf, 0.0], action_high=[0.5, math.inf])


def test_state_and_actions_of_other_sizes():
    with pytest.raises(ValueError, match=r"4 coordinates of the state and 2 of an action.*'delta_masked'"):
        run(settings_of(4, 2), CountingPolicy(4, action_dim=2), 5, state_dim=4)


def test_batched():
    policy = CountingPolicy(5, action_dim=3, batch=(4, 2))
    ticks = run(settings_of(4, 2, extra=1), policy, 9, state_dim=3, batch=(4, 2))
    assert all(tick.action.shape == (4, 2, 3) for tick in ticks)
    assert policy.requests[1].state.shape == (4, 2, 3)
    assert policy.requests[1].leftover.shape == (4, 2, 3, 3)
    assert torch.equal(policy.requests[1].state, torch.full((4, 2, 3), 103.0))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 4), st.integers(0, 9))
def test_deltas_are_preserved(ratio, groups, overlap, seed):
    steps = ratio * groups
    settings = settings_of(steps, min(overlap, groups), ratio, delta_dims=[0], state_estimator="measured")
    generator = torch.Generator().manual_seed(seed)
    chunks = []

    def policy(request):
        chunks.append(torch.randn(steps, 2, generator=generator))
        return chunks[-1]

    sent = [tick.action for tick in run(settings, policy, 3 * steps, state_dim=2) if tick.send]
    sent = torch.stack(sent).unflatten(0, (3, groups))
    for number in range(3):
        assert torch.allclose(sent[number, :, 0].sum(), chunks[number][:, 0].sum(), atol=1e-6)
        assert torch.equal(sent[number, :, 1], chunks[number][ratio - 1 :: ratio, 1])


@pytest.mark.parametrize(("late_chunk", "stand_ins"), [("hold", [103, 103, 103]), ("continue", [104, 105, 105])])
@pytest.mark.fault(26)
def test_a_late_chunk_of_goals(late_chunk, stand_ins, caplog):
    manager = RollForwardManager(
        settings_of(4, 2, extra=2, late_chunk=late_chunk), CountingPolicy(6), executor=LateExecutor(3)
    )
    with caplog.at_level(logging.WARNING):
        ticks = run(None, None, 18, manager=manager)
    assert values(ticks)[:11] == [100, 101, 102, 103, *stand_ins, 200, 201, 202, 203]
    assert [tick.late for tick in ticks] == ([False] * 4 + [True] * 3) * 2 + [False] * 4
    assert (manager.counts.late_chunks, manager.counts.late_ticks) == (2, 6)
    assert len([record for record in caplog.records if "A chunk is late" in record.message]) == 1


@pytest.mark.fault(26)
def test_a_late_chunk_of_changes_is_held_by_no_change():
    settings = settings_of(4, 2, state_estimator="sum_delta")
    assert values(run(settings, CountingPolicy(4), 7, executor=LateExecutor(2)))[3:] == [103, 0, 0, 200]


@pytest.mark.fault(26)
def test_a_late_chunk_begins_with_a_control_period():
    settings = settings_of(4, 1, ratio=2, delta_dims=[0], state_estimator="measured")
    ticks = run(settings, CountingPolicy(4), 10, executor=LateExecutor(1))
    assert [tick.action.item() for tick in ticks if tick.send] == [201, 205, 0, 401, 405]


@pytest.mark.fault(26)
def test_naive_leaves_out_what_the_late_ticks_have_passed():
    settings = settings_of(4, 2, mode="naive", extra=3)
    assert values(run(settings, CountingPolicy(7), 7, executor=LateExecutor(1)))[4:] == [103, 203, 204]
    assert values(run(settings, CountingPolicy(7), 9, executor=LateExecutor(3)))[7:] == [203, 204]


@pytest.mark.fault(26)
def test_a_stale_chunk():
    clock = FakeClock()
    manager = RollForwardManager(
        settings_of(3, 1, stale_after_s=0.5), CountingPolicy(3), executor=LateExecutor(10**6), clock=clock
    )
    run(None, None, 4, manager=manager)
    clock.now = 0.4
    run(None, None, 1, manager=manager)
    clock.now = 0.6
    with pytest.raises(StaleCommandError, match=r"0.600 s late, stale_after_s is 0.5"):
        run(None, None, 1, manager=manager)
    with pytest.raises(NeedsResetError) as refused:
        run(None, None, 1, manager=manager)
    assert isinstance(refused.value.__cause__, StaleCommandError)
    manager.reset()
    assert manager.executor.cancelled == 1
    assert values(run(None, None, 4, manager=manager)) == [300, 301, 302, 302]


@pytest.mark.fault(26)
def test_every_late_chunk_has_its_own_time():
    clock = FakeClock()
    manager = RollForwardManager(
        settings_of(2, 1, stale_after_s=0.5), CountingPolicy(2), executor=LateExecutor(1), clock=clock
    )
    for _ in range(20):
        run(None, None, 1, manager=manager)
        clock.now += 0.3
    assert manager.counts.late_ticks == 6


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (torch.full((4, 1), torch.nan), r"4 values of 4 that are NaN or infinity, the first at \[0, 0\]"),
        (torch.tensor([[0.0], [1.0], [torch.inf], [2.0]]), r"1 values of 4 .* the first at \[2, 0\]"),
        (torch.zeros(3, 1), r"got \[3, 1\], wanted \[at least 4, action_dim\]"),
        (torch.zeros(4), r"got \[4\]"),
        (torch.zeros(4, 0), r"got \[4, 0\]"),
        (torch.zeros(2, 4, 1), r"got \[2, 4, 1\], wanted \[at least 4"),
        ([[0.0]], "got list, wanted a Tensor"),
    ],
)
@pytest.mark.fault(26)
def test_chunks_that_cannot_be_executed(chunk, message):
    with pytest.raises(InvalidChunkError, match=message):
        run(settings_of(4, 1), lambda request: chunk, 1)


def test_modes_that_leave_out_entries_need_longer_chunks():
    settings = settings_of(4, 2, mode="naive", extra=2)
    with pytest.raises(InvalidChunkError, match=r"got \[5, 1\], wanted \[at least 6, action_dim\]"):
        run(settings, CountingPolicy(5), 5)


@pytest.mark.fault(26)
def test_a_policy_that_raises():
    def policy(request):
        raise KeyError("camera")

    manager = RollForwardManager(settings_of(4, 1), policy)
    with pytest.raises(PolicyError, match="camera") as raised:
        run(None, None, 1, manager=manager)
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(NeedsResetError):
        run(None, None, 1, manager=manager)
    assert issubclass(PolicyError, VLASHError)
    assert issubclass(VLASHError, RuntimeError)


@pytest.mark.fault(26)
def test_a_camera_that_fails_costs_nothing():
    manager = RollForwardManager(settings_of(3, 3), CountingPolicy(3))

    def broken():
        raise OSError("unplugged")

    actions = values(run(None, None, 3, manager=manager))
    with pytest.raises(OSError, match="unplugged"):
        manager.tick(broken)
    assert actions + values(run(None, None, 3, manager=manager)) == [100, 101, 102, 200, 201, 202]


def test_reset_in_mid_chunk():
    executor = LateExecutor(0)
    policy = CountingPolicy(6)
    manager = RollForwardManager(settings_of(6, 4, ratio=2, delta_dims=[0]), policy, executor=executor)
    run(None, None, 3, manager=manager)
    manager.reset()
    assert executor.cancelled == 1
    fresh = [tick for tick in run(None, None, 4, manager=manager) if tick.send]
    assert values(fresh) == [300 + 301, 302 + 303]
    assert policy.requests[2].leftover is None
    assert policy.requests[2].state.item() == 0.0


def test_automatic_overlap():
    settings = settings_of(8, "auto", fps=20)
    executor = LateExecutor(0)
    manager = RollForwardManager(settings, CountingPolicy(8), executor=executor)
    assert manager.overlap == 8
    ticks = run(None, None, 8, manager=manager)
    assert manager.overlap == 5  # a chunk takes 0.25 s
    assert [tick.fetched for tick in ticks] == [True, False, False, True, False, False, False, False]
    for _ in range(200):
        manager.latency.add(0.08)
    ticks = run(None, None, 8, manager=manager)
    assert manager.overlap == 2
    assert [tick.fetched for tick in ticks] == [False] * 6 + [True, False]


@pytest.mark.parametrize(("mode", "overlap"), [("vlash", 6), ("naive", 3)])
def test_automatic_overlap_counts_control_periods_and_keeps_to_the_chunk(mode, overlap):
    settings = settings_of(8, "auto", ratio=3, mode=mode, extra=3, fps=8)
    manager = RollForwardManager(settings, CountingPolicy(11), executor=LateExecutor(0))
    run(None, None, 30, manager=manager)
    assert manager.overlap == overlap


def test_the_first_chunk_does_not_decide_the_overlap_for_long():
    clock, policy = FakeClock(), CountingPolicy(8)

    class Executor(Immediate):
        def submit(self, compute):
            pending = super().submit(compute)
            pending.seconds = 5.0 if len(policy.requests) == 1 else 0.1  # the first one is compiled
            return pending

    manager = RollForwardManager(settings_of(8, "auto", fps=20), policy, executor=Executor(), clock=clock)
    run(None, None, 1, manager=manager)
    assert manager.overlap == 8
    run(None, None, 8, manager=manager)
    assert manager.overlap == 2


def test_counts():
    clock = FakeClock()
    policy = CountingPolicy(4)

    def slow(request):
        clock.now += 0.125
        return policy(request)

    manager = RollForwardManager(settings_of(4, 1, ratio=2, mode="sync"), slow, clock=clock)
    run(None, None, 10, manager=manager)
    assert manager.counts.to_dict() == {
        "ticks": 10, "commands": 5, "observations": 3, "chunks": 3, "stalls": 3, "stall_seconds": 0.375,
        "late_chunks": 0, "late_ticks": 0,
    }  # fmt: skip


def test_the_policy_runs_without_gradients():
    def policy(request):
        assert not torch.is_grad_enabled()
        return torch.zeros(2, 1)

    manager = RollForwardManager(settings_of(2, 1), policy)
    manager.tick(partial(Observation, None, torch.zeros(1)))
    assert torch.is_grad_enabled()


def test_modes_that_leave_out_entries_need_room_in_the_chunk():
    with pytest.raises(ValueError, match="which leaves out 4 actions of a chunk; n_action_steps, 4, and they may be"):
        settings_of(4, 2, ratio=2, mode="naive", extra=3)
    with pytest.raises(ValueError, match=r"n_action_steps: got 4 .* wanted less than chunk_size, 4"):
        settings_of(4, "auto", mode="rtc")
