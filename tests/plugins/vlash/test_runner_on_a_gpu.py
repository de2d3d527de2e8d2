"""The runner with a policy on a GPU: it works beside the control thread, and beside other work."""

import threading
import time

import pytest
import torch
from tests.plugins.vlash.test_runner import SEEN, chunk_is_ready, settings_of

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.control import control_loop
from pronghorn.vlash.runner import AsyncRunner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="the policy is on a GPU")]


def test_a_gpu_policy_works_beside_the_control_thread():
    def policy(request):
        torch.cuda._sleep(400_000_000)
        return request.state.expand(4, 1) + torch.arange(4.0, device="cuda")[:, None]

    seen = Observation(None, torch.full((1,), 5.0, device="cuda"))
    with AsyncRunner(policy, settings_of(4, 2)) as runner:
        found = [runner.step(seen) for _ in range(3)]
        assert [action.item() for action in found] == [5, 6, 7]
        pending = runner.manager._asked.pending
        assert not pending.done()
        chunk_is_ready(runner)
        assert [runner.step(seen).item() for _ in range(3)] == [8, 8, 9]
        assert pending.seconds > 0.05


@pytest.mark.slow
@pytest.mark.fault(26)
def test_a_gpu_with_other_work_makes_no_stall(figure):
    """Products of another thread, 30 ms at a time, stand before the policy's."""
    weight = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    done, took = threading.Event(), []

    def other_work():
        while not done.is_set():
            for _ in range(20):
                weight @ weight
            torch.cuda.synchronize()
            time.sleep(0.01)

    def policy(request):
        started = time.monotonic()
        chunk = request.state.cuda().expand(25, 1) + torch.arange(25.0, device="cuda")[:, None]
        for _ in range(8):
            weight[:2048] @ weight
        actions = chunk.cpu()
        took.append(time.monotonic() - started)
        return actions

    busy = threading.Thread(target=other_work)
    busy.start()
    try:
        with AsyncRunner(policy, settings_of(25, 6)) as runner:
            runner.step(lambda: SEEN)
            runner.reset()
            record = control_loop(runner, lambda: SEEN, lambda action: None, fps=50, steps=500)
    finally:
        done.set()
        busy.join()
    assert (record.stalls, record.late_ticks) == (1, 0)  # the first chunk is waited for
    gaps = torch.tensor(record.times).diff()
    figure("commands", len(record.times))
    figure("99th percentile of a chunk's milliseconds", round(torch.tensor(took).quantile(0.99).item() * 1e3, 1))
    figure("most milliseconds between commands", round(gaps.max().item() * 1e3, 1))
    assert gaps.max() <= 2 / 50
