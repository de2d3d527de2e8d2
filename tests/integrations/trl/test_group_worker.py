"""TRL's vLLM worker with groups of ours: its loop on scripted generations, and its child at a scripted server."""

import asyncio
import http.server
import json
import multiprocessing
import queue
import threading
import time
from types import SimpleNamespace

import pytest
from accelerate.state import PartialState
from datasets import Dataset
from tests.plugins.vcpo.addition import EOS, sums, tokenizer
from trl.experimental.async_grpo.async_rollout_worker import (
    AsyncRolloutWorker,
    TrainingSequence,
    _AsyncRolloutLoop,
)

from pronghorn.trl.async_rollouts import Position
from pronghorn.trl.group_worker import GroupRolloutLoop, GroupWorker

SIZE = 2


@pytest.fixture(autouse=True)
def _state():
    PartialState(cpu=True)  # TRL's log needs one


class Scripted(_AsyncRolloutLoop):
    """Conversations without a server: the first of a group is cut into two rows, the second has none in group 1."""

    async def _generate_one(self, prompt, tool_dict, tools, group_id=0):
        self.seen = [*getattr(self, "seen", []), group_id]
        first, version = self.seen.count(group_id) == 1, self.model_version
        await asyncio.sleep(0)
        while self.holds(group_id) and self.model_version == version:
            await asyncio.sleep(0.001)
        rows = [TrainingSequence([1, 2, row], [0, 0, 1], [0.0, 0.0, -1.0], f"{group_id}-{first}") for row in (0, 1)]
        rows = rows if first else [] if group_id == 1 else rows[:1]
        return [{"role": "assistant", "content": "12"}], [1, 2], rows, 0, 0, None

    def holds(self, group_id):
        return False


class Loop(GroupRolloutLoop, Scripted):
    """Ours over the scripted one."""


def reward(completions, **kwargs):
    return [1.0] * len(completions)


def loop(kind=Loop, allowed=2, **settings):
    words = tokenizer()
    words.response_template = {}  # TRL looks for one that it knows otherwise
    shared = SimpleNamespace
    return kind(
        groups_allowed=shared(value=allowed), model_name="m", dataset=sums(), reward_funcs=[reward],
        processing_class=words, eos_token_ids=[EOS], rollout_buffer=queue.Queue(),
        model_version_value=shared(value=3), heartbeat_value=shared(value=0.0), failed_event=threading.Event(),
        exception_info_queue=queue.Queue(), metrics_queue=queue.Queue(), num_generations=SIZE, max_inflight_tasks=6,
        **settings,
    )  # fmt: skip


def samples(one, count):
    """So many, and the loop has ended."""
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    found = [one.rollout_buffer.get(timeout=30) for _ in range(count)]
    one._loop.call_soon_threadsafe(one._stop_event.set)
    thread.join(30)
    assert not thread.is_alive()
    assert not one._failed_event.is_set()
    return found


def test_groups_tell_their_rows_and_start_when_they_may():
    one = loop(allowed=2)
    found = samples(one, 6)
    assert sorted(sample.group_id for sample in found) == [0, 0, 0, 1, 1, 1]
    assert {sample.metrics["group_rows"] for sample in found} == {3.0}
    assert set(one.seen) == {0, 1}  # not the third, though six may be generated at once
    assert one.rollout_buffer.empty()
    assert {sample.model_version for sample in found} == {3}
    # A conversation without a token to train has its reward, and no completion.
    (empty,) = [sample for sample in found if sample.completion_mask.tolist() == [0]]
    assert (empty.group_id, empty.metrics["reward"]) == (1, 1.0)


def test_a_rows_versions_are_those_of_its_tokens():
    class Held(Loop):
        def holds(self, group_id):
            return group_id == 0

    one = loop(Held)
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    found = [one.rollout_buffer.get(timeout=30) for _ in range(3)]  # of group 1, which waits for nothing
    assert {(sample.model_version, sample.metrics["model_version_end"]) for sample in found} == {(3, 3.0)}
    one._model_version_value.value = 4
    found = [one.rollout_buffer.get(timeout=30) for _ in range(3)]
    assert {(sample.model_version, sample.metrics["model_version_end"]) for sample in found} == {(3, 4.0)}
    assert one._versions == {}
    one._groups_allowed.value = 3
    assert one.rollout_buffer.get(timeout=30).model_version == 4  # begun when it might, not when it was planned
    one._loop.call_soon_threadsafe(one._stop_event.set)
    thread.join(30)


@pytest.mark.fault(25)
def test_it_goes_on_where_a_run_was():
    one = loop(allowed=104, dataset_start_index=98, first_group=98, done=(99, 101))
    found = samples(one, 7)
    assert {sample.group_id: sample.prompt for sample in found} == {98: "9+8=", 100: "0+0=", 102: "0+2="}


def broken(completions, **kwargs):
    raise ZeroDivisionError("the judge has died")


def worker(port=1, dataset=None, reward=reward):
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    words.response_template = {"content": r"(?P<content>.*)"}
    plain = AsyncRolloutWorker(
        model_name="m", dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": f"{number}+1="}] for number in range(10)]}
        ) if dataset is None else dataset,
        reward_funcs=[reward], processing_class=words, eos_token_ids=[EOS], num_generations=SIZE, max_inflight_tasks=4,
        vllm_server_url=f"http://127.0.0.1:{port}", queue_maxsize=100,
    )  # fmt: skip
    return GroupWorker.like(plain)


def test_where_it_goes_on():
    one = worker()
    one.go_on(Position(12, {14}))
    wanted = {"dataset_start_index": 12, "first_group": 12, "done": (14,)}
    assert wanted.items() <= one._loop_kwargs.items()
    streamed = worker(dataset=sums().to_iterable_dataset())
    streamed.go_on(Position(12, {14}))
    assert {**wanted, "dataset_start_index": 0}.items() <= streamed._loop_kwargs.items()


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM does, always the same."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = {"choices": [{"token_ids": [2, EOS], "logprobs": {"token_logprobs": [-1.0, -0.5]}}]}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Says nothing."""


@pytest.fixture
def port():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.mark.slow
def test_the_child_process(port):
    one = worker(port)
    one.allow(2)
    one.update_model_version(1)
    for first in (0, 3):  # it starts again after a stop
        one.go_on(Position(first))
        one.allow(first + 2)
        one.start()
        found = [one.rollout_buffer.get(timeout=120) for _ in range(4)]
        assert sorted(sample.group_id for sample in found) == [first, first, first + 1, first + 1]
        assert found[0].metrics["group_rows"] == SIZE
        one.check_health(60.0)
        time.sleep(0.5)
        assert one.rollout_buffer.empty()
        if first:
            one._process.kill()
            one._process.join()
            with pytest.raises(RuntimeError, match="the child process has ended with exit code -9"):
                one.check_health(60.0)
        one.stop()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.fault(25)
def test_a_child_that_fails(port):
    """It says why, and stopping what is dead takes no time; TRL's own worker would wait for ever."""
    one = worker(port, reward=broken)
    one.allow(2)
    one.start()
    assert one._failed_event.wait(120)
    with pytest.raises(RuntimeError, match="has failed") as caught:
        one.check_health(60.0)
    assert "ZeroDivisionError: the judge has died" in str(caught.value.__cause__)
    one.stop()
    assert multiprocessing.active_children() == []
