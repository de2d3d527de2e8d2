"""Functions that are recorded and replayed; and while a graph is recorded, nothing is collected."""

import copy
import gc
import threading

import pytest
import torch

from pronghorn.kernels import _recording
from pronghorn.kernels._recording import KEPT, Recorded, nothing_freed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are of a GPU")


@pytest.mark.parametrize("collects", [True, False])
def test_collecting_pauses(collects, monkeypatch):
    monkeypatch.setattr(gc, "isenabled", lambda: collects)
    called = []
    monkeypatch.setattr(gc, "disable", lambda: called.append("disable"))
    monkeypatch.setattr(gc, "enable", lambda: called.append("enable"))
    with nothing_freed():
        assert called == ["disable"]
    assert called == ["disable", *(["enable"] if collects else [])]


def added(x, y):
    return x + (0 if y is None else y)


class OnGPU(torch.Tensor):
    """Says that it is there."""

    is_cuda = True


@pytest.fixture
def recorded(monkeypatch):
    """The function, what was recorded of it, and which recordings are over, without a GPU."""
    made, over = [], []

    class Recording:
        def __init__(self, function, given, device):
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            made.append(tuple(given[0].shape))
            self.call, self.shape = lambda given: function(*given), given[0].shape

        def finish(self):
            over.append(tuple(self.shape))

        def __call__(self, given):
            return self.call(given)

    monkeypatch.setattr(_recording, "_Recording", Recording)
    return Recorded(added), made, over


def test_there_is_a_recording_for_what_a_function_meets(recorded, monkeypatch):
    function, made, _ = recorded
    tensors = [torch.ones(2).as_subclass(OnGPU), torch.ones(3).as_subclass(OnGPU), torch.ones(2).as_subclass(OnGPU)]
    with torch.inference_mode():
        for tensor in tensors:
            assert torch.equal(function(tensor, tensor), 2 * tensor)
    assert made == [(2,), (3,)]
    function(tensors[0], None)
    function(tensors[0], tensors[0], state="moved")
    function(tensors[0].double(), tensors[0])
    function(tensors[0], tensors[2])
    assert made == [(2,), (3,), (2,), (2,), (2,)]
    monkeypatch.setattr(_recording, "_autocast", lambda: torch.bfloat16)
    function(tensors[0], tensors[0])
    assert len(made) == 6


def test_the_oldest_recording_makes_room(recorded):
    function, made, over = recorded
    for size in [*range(1, KEPT + 1), 1, KEPT + 1]:
        function(torch.ones(size).as_subclass(OnGPU), None)
    assert over == [(2,)]
    function(torch.ones(1).as_subclass(OnGPU), None)
    assert len(made) == KEPT + 1


def test_a_copy_has_none(recorded):
    function, made, _ = recorded
    function(torch.ones(2).as_subclass(OnGPU), None)
    copy.deepcopy(function)(torch.ones(2).as_subclass(OnGPU), None)
    assert made == [(2,), (2,)]


def test_without_a_gpu_the_function_is_called():
    given = torch.ones(2, requires_grad=True)
    assert Recorded(added)(given, None).requires_grad


@needs_gpu
def test_threads_replay_the_same_graph_on_streams_of_their_own():
    function = Recorded(lambda x, y: (x @ y).relu() @ y)
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(512, 512, device="cuda", generator=generator) / 16
    inputs = [torch.randn(512, 512, device="cuda", generator=generator) for _ in range(32)]
    wanted = [(x @ weight).relu() @ weight for x in inputs]
    torch.cuda.synchronize()
    found = [None] * len(inputs)

    def run(first):
        with torch.cuda.stream(torch.cuda.Stream()):
            for index in range(first, len(inputs), 2):
                found[index] = function(inputs[index], weight)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(function._recordings) == 1
