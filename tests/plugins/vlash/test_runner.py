"""The runner with a real thread: it never waits, notices what breaks, and keeps episodes apart."""

import logging
import sys
import threading
import time

import pytest
import torch
from tests.plugins.vlash.stubs import CountingPolicy, FakeClock, SlowPolicy

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.control import control_loop
from pronghorn.vlash.runner import AsyncRunner
from pronghorn.vlash.watchdog import (
    InvalidChunkError,
    NeedsResetError,
    PolicyError,
    StaleCommandError,
    VLASHError,
    WorkerDiedError,
)
from pronghorn.vlash.worker import Worker, _Job

SEEN = Observation("image", torch.zeros(1))


def settings_of(steps, overlap, **values):
    values = {"chunk_size": steps} | values
    return VLASHSettings(n_action_steps=steps, inference_overlap_steps=overlap, **values)


def steps_of(runner, count):
    return [runner.step(SEEN).item() for _ in range(count)]


def wait_for(condition):
    """A moment, for another thread to come that far."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def chunk_is_ready(runner):
    wait_for(lambda: runner.manager._asked.pending.done())


@pytest.mark.parametrize("threaded", [True, False])
def test_commands(threaded):
    policy = CountingPolicy(4)
    with AsyncRunner(policy, settings_of(4, 1, action_quant_ratio=2), threaded=threaded) as runner:
        found = steps_of(runner, 2)
        chunk_is_ready(runner)
        found += steps_of(runner, 2)
        assert found == [101, 103, 201, 203]
        statistics = runner.statistics()
    assert (statistics.ticks, statistics.commands, statistics.chunks, statistics.stalls) == (8, 4, 2, 1)
    assert 0 <= statistics.latency_p50 <= statistics.latency_p95 <= statistics.latency_max
    assert (statistics.overlap, statistics.to_dict()["late_ticks"]) == (2, 0)


def test_observations_may_be_read_on_demand():
    reads = []

    def observe():
        reads.append(None)
        return SEEN

    with AsyncRunner(CountingPolicy(4), settings_of(4, 1), threaded=False) as runner:
        for _ in range(8):
            runner.step(observe)
    assert len(reads) == 3


def test_the_policy_runs_in_one_other_thread():
    threads = []

    def policy(request):
        assert not torch.is_grad_enabled()
        threads.append(threading.current_thread())
        return torch.zeros(2, 1)

    with AsyncRunner(policy, settings_of(2, 2)) as runner:
        for _ in range(6):
            steps_of(runner, 1)
            chunk_is_ready(runner)
    assert len(set(threads)) == 1 < len(threads)
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()


@pytest.mark.parametrize(("late_chunk", "stand_ins"), [("hold", [103, 103, 103]), ("continue", [104, 105, 105])])
@pytest.mark.fault(26)
def test_a_slow_policy_never_blocks(late_chunk, stand_ins):
    policy = SlowPolicy(6)
    with AsyncRunner(policy, settings_of(4, 2, late_chunk=late_chunk, chunk_size=6)) as runner:
        assert steps_of(runner, 7) == [100, 101, 102, 103, *stand_ins]
        policy.allowed.set()
        chunk_is_ready(runner)
        assert steps_of(runner, 2) == [200, 201]
        assert runner.statistics().late_ticks == 3


@pytest.mark.fault(26)
def test_reset_while_a_chunk_is_under_way():
    policy = SlowPolicy(4)
    with AsyncRunner(policy, settings_of(4, 2)) as runner:
        assert steps_of(runner, 3) == [100, 101, 102]
        assert policy.begun.wait(10)
        runner.reset()
        policy.allowed.set()
        assert steps_of(runner, 3) == [300, 301, 302]
    assert policy.requests[2].leftover is None
    assert runner.statistics().chunks == 2


@pytest.mark.fault(26)
def test_an_error_of_the_policy_comes_out_where_its_chunk_is_due(caplog):
    calls = []

    def policy(request):
        calls.append(request)
        if len(calls) == 2:
            raise ZeroDivisionError("in the policy")
        return torch.full((3, 1), float(len(calls)))

    with AsyncRunner(policy, settings_of(3, 1)) as runner:
        assert steps_of(runner, 3) == [1, 1, 1]
        chunk_is_ready(runner)
        with pytest.raises(PolicyError, match="in the policy") as raised:
            runner.step(SEEN)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
        with pytest.raises(NeedsResetError):
            runner.step(SEEN)
        runner.reset()
        assert steps_of(runner, 2) == [3, 3]
    assert not caplog.records


@pytest.mark.fault(26)
def test_a_chunk_with_nan():
    def policy(request):
        return torch.full((3, 1), 1.0 if request.leftover is None else torch.nan)

    with AsyncRunner(policy, settings_of(3, 1)) as runner:
        assert steps_of(runner, 3) == [1, 1, 1]
        chunk_is_ready(runner)
        with pytest.raises(InvalidChunkError, match="3 values of 3 that are NaN"):
            runner.step(SEEN)


@pytest.mark.fault(26)
def test_a_policy_that_exits():
    calls = []

    def policy(request):
        calls.append(threading.current_thread())
        if len(calls) == 2:
            raise SystemExit
        return torch.full((3, 1), float(len(calls)))

    with AsyncRunner(policy, settings_of(3, 1)) as runner:
        steps_of(runner, 3)
        chunk_is_ready(runner)
        with pytest.raises(PolicyError, match="SystemExit") as raised:
            runner.step(SEEN)
        assert isinstance(raised.value.__cause__, SystemExit)
        runner.reset()
        assert steps_of(runner, 1) == [3]
        assert calls[2] is calls[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.fault(26)
def test_a_worker_that_dies_is_noticed_and_replaced(monkeypatch):
    threads = []

    def policy(request):
        threads.append(threading.current_thread())
        return torch.full((3, 1), float(len(threads)))

    with AsyncRunner(policy, settings_of(3, 1)) as runner:
        steps_of(runner, 2)
        with monkeypatch.context() as patch:
            patch.setattr(_Job, "run", lambda job, stream: sys.exit())
            steps_of(runner, 1)
            threads[0].join(10)
        with pytest.raises(WorkerDiedError, match="has ended, and gave no chunk"):
            runner.step(SEEN)
        with pytest.raises(NeedsResetError):
            runner.step(SEEN)
        runner.reset()
        assert steps_of(runner, 1) == [2]
    assert threads[0] is not threads[1]


def test_an_error_that_nobody_waits_for_is_told(caplog):
    begun, allowed = threading.Event(), threading.Event()

    def policy(request):
        if request.leftover is not None:
            begun.set()
            assert allowed.wait(10)
            raise KeyError("late trouble")
        return torch.zeros(2, 1)

    with caplog.at_level(logging.WARNING), AsyncRunner(policy, settings_of(2, 1)) as runner:
        steps_of(runner, 2)
        assert begun.wait(10)
        runner.reset()
        allowed.set()
    assert "late trouble" in caplog.text


def test_an_interrupt_while_the_first_chunk_is_waited_for(monkeypatch):
    policy = CountingPolicy(3)

    def interrupt(job):
        raise KeyboardInterrupt

    with AsyncRunner(policy, settings_of(3, 1)) as runner:
        with monkeypatch.context() as patch:
            patch.setattr(_Job, "result", interrupt)
            with pytest.raises(KeyboardInterrupt):
                runner.step(SEEN)
        runner.reset()
        assert steps_of(runner, 1)[0] in (100, 200)


def test_closed():
    runner = AsyncRunner(CountingPolicy(2), settings_of(2, 1))
    runner.close()
    runner.close()
    with pytest.raises(VLASHError, match="closed"):
        runner.step(SEEN)


def test_a_worker_takes_one_request_at_a_time():
    begun, allowed = threading.Event(), threading.Event()

    def compute():
        begun.set()
        assert allowed.wait(10)
        return torch.ones(1)

    with Worker() as worker:
        first = worker.submit(compute)
        assert begun.wait(10)
        assert not first.done()
        with pytest.raises(VLASHError, match="a chunk is under way"):
            worker.submit(compute)
        first.cancel()
        dropped = worker.submit(compute)
        dropped.cancel()
        third = worker.submit(lambda: torch.zeros(1))
        allowed.set()
        assert third.result().item() == 0
        assert first.done()
        assert not dropped.done()


def test_control_loop_in_simulated_time():
    clock, policy, acted = FakeClock(), CountingPolicy(8), []

    def slow(request):
        clock.now += 0.25
        return policy(request)

    runner = AsyncRunner(slow, settings_of(8, 2, async_mode="sync"), threaded=False, clock=clock)
    record = control_loop(runner, lambda: SEEN, acted.append, fps=16, steps=20, clock=clock)
    assert [action.item() for action in acted] == [100.0 * (n // 8 + 1) + n % 8 for n in range(20)]
    period, stall = 1 / 16, 0.25
    assert record.times == pytest.approx([n * period + stall * (n // 8 + 1) for n in range(20)])
    assert (record.boundaries, record.overruns, record.stalls) == ([8, 16], 3, 3)
    assert record.stall_seconds == pytest.approx(0.75)
    chunk = 8 * period + stall
    assert record.metrics(events=[0.01]).reaction_mean == pytest.approx(chunk + stall - 0.01)
    metrics = record.metrics()
    assert (metrics.steps, metrics.boundary_jump, metrics.typical_step) == (20, 93.0, 1.0)
    assert metrics.to_dict()["late_ticks"] == 0


def test_reactions_when_nothing_is_waited_for():
    clock = FakeClock()
    runner = AsyncRunner(CountingPolicy(8), settings_of(8, 2), threaded=False, clock=clock)
    record = control_loop(runner, lambda: SEEN, lambda action: None, fps=16, steps=40, clock=clock)
    assert record.observed == pytest.approx([0.0] * 8 + [6 / 16] * 8 + [14 / 16] * 8 + [22 / 16] * 8 + [30 / 16] * 8)
    assert record.metrics(events=[6 / 16]).reaction_mean == pytest.approx(2 / 16)
    assert record.metrics(events=[6.25 / 16]).reaction_mean == pytest.approx(9.75 / 16)


def test_control_loop_refuses():
    runner = AsyncRunner(CountingPolicy(2), settings_of(2, 1), threaded=False)
    with pytest.raises(ValueError, match="fps: got 0"):
        control_loop(runner, lambda: SEEN, print, fps=0, steps=1)
    with pytest.raises(ValueError, match="steps: got 0"):
        control_loop(runner, lambda: SEEN, print, fps=30, steps=0)


@pytest.mark.fault(26)
def test_small_delays_do_not_add_up():
    clock = FakeClock()

    def observe():
        clock.now += 0.01
        return SEEN

    runner = AsyncRunner(CountingPolicy(1), settings_of(1, 1), threaded=False, clock=clock)
    record = control_loop(runner, observe, lambda action: None, fps=10, steps=20, clock=clock)
    assert record.times == pytest.approx([n / 10 + 0.01 for n in range(20)])
    assert record.overruns == 0


def test_a_loop_of_another_rate_than_the_overlap_is_chosen_by():
    runner = AsyncRunner(CountingPolicy(4), settings_of(4, "auto", fps=30), threaded=False)
    with pytest.raises(ValueError, match=r"fps: got 60, but the runner's settings have fps=30"):
        control_loop(runner, lambda: SEEN, print, fps=60, steps=2, clock=FakeClock())
    assert control_loop(runner, lambda: SEEN, lambda action: None, 30, 2, clock=FakeClock()).times


def test_what_a_runner_takes():
    with pytest.raises(TypeError, match="settings: got dict, wanted VLASHSettings"):
        AsyncRunner(CountingPolicy(4), {"n_action_steps": 4})
    runner = AsyncRunner(CountingPolicy(4), settings_of(4, 1), threaded=False)
    with pytest.raises(TypeError, match="observation: got dict, wanted an Observation, or a function"):
        runner.step({"state": 1})
    with pytest.raises(ValueError, match="wait_s: got 0, wanted a positive"):
        AsyncRunner(CountingPolicy(4), settings_of(4, 1), wait_s=0)


@pytest.mark.fault(26)
@pytest.mark.parametrize("mode", ["vlash", "sync"])
def test_a_policy_that_hangs_is_not_waited_for_without_end(mode):
    release, policy = threading.Event(), CountingPolicy(2)
    hanging = [1 if mode == "sync" else 0]  # the number of the chunk

    def compute(request):
        if len(policy.requests) == hanging[0]:
            release.wait(30)
        return policy(request)

    with AsyncRunner(compute, settings_of(2, 0, async_mode=mode), wait_s=0.1) as runner:
        steps_of(runner, 2 * hanging[0])
        start = time.monotonic()
        with pytest.raises(StaleCommandError, match=r"within wait_s, 0\.1 s"):
            runner.step(SEEN)
        runner.reset()
        with pytest.raises(StaleCommandError):  # its thread still hangs
            runner.step(SEEN)
        assert time.monotonic() - start < 5
        release.set()
        hanging[0] = -1
        runner.reset()
        runner.worker.wait_s = 30
        assert runner.step(SEEN).item() % 100 == 0


def test_waiting_ends_with_the_program():
    stop, release = threading.Event(), threading.Event()
    with AsyncRunner(lambda request: release.wait(30), settings_of(2, 1), stop=stop) as runner:
        threading.Timer(0.1, stop.set).start()
        with pytest.raises(VLASHError, match="the program is to end"):
            runner.step(SEEN)
        release.set()


def test_a_loop_may_go_on_where_another_ended():
    runner = AsyncRunner(CountingPolicy(4), settings_of(4, 1), threaded=False)
    clock = FakeClock()
    control_loop(runner, lambda: SEEN, print, fps=10, steps=2, clock=clock)
    record = control_loop(runner, lambda: SEEN, print, fps=10, steps=4, clock=clock)
    assert record.observed == [-float("inf")] * 2 + [pytest.approx(0.1)] * 2
    assert (record.stalls, record.boundaries) == (0, [2])


@pytest.mark.fault(26)
def test_thirty_hertz_with_a_policy_of_a_tenth_of_a_second():
    """30 commands a second; every chunk but the first is computed while the one before runs."""
    policy = CountingPolicy(12)

    def slow(request):
        time.sleep(0.1)
        return policy(request)

    with AsyncRunner(slow, settings_of(10, 9, chunk_size=12)) as runner:
        record = control_loop(runner, lambda: SEEN, lambda action: None, fps=30, steps=35)
        statistics = runner.statistics()
    assert (record.stalls, record.late_ticks) == (1, 0)
    assert [action.item() for action in record.actions] == [100.0 * (n // 10 + 1) + n % 10 for n in range(35)]
    assert statistics.latency_p50 >= 0.1
    assert all(later > earlier for earlier, later in zip(record.times, record.times[1:], strict=False))
    assert record.times[-1] >= 34 / 30
