"""What recording a CUDA graph needs, and functions of tensors that are recorded and replayed."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

KEPT = 8  # recordings, each of which has memory of its own
WARM_UP = 2


class Recorded:
    """Stands for a function: a CUDA graph for each of the last shapes, dtypes and layouts of tensors that it meets.

    Gradients are not taken. Any thread may call it, on any stream; results are copies of what the graph wrote. Without
    a GPU the function is called as it is. A copy of this object has no recordings yet.

    Args:
        function: from tensors on one device, or None in place of some, to a tensor. It computes the same for the same
            tensors, and does not wait for the GPU.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *given: Tensor | None, state: Hashable = None) -> Tensor:
        """What the function gives.

        Args:
            given: its arguments.
            state: where the weights are, and whatever else the function depends on.

        Raises:
            RuntimeError: it does what a graph cannot record.
        """
        tensors = [tensor for tensor in given if tensor is not None]
        if not tensors[0].is_cuda:
            return self._function(*given)
        key = _autocast(), state, tuple([None if tensor is None else _kind(tensor) for tensor in given])
        # What is made in inference mode could not be written to by later calls outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if key not in self._recordings:
                if len(self._recordings) == KEPT:
                    self._recordings.popitem(last=False)[1].finish()
                self._recordings[key] = _Recording(self._function, given, tensors[0].device)
            self._recordings.move_to_end(key)
            return self._recordings[key](given)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorded, (self._function,)


class _Recording:
    """A graph, with the places that it reads from and writes to."""

    def __init__(self, function: Callable[..., Tensor], given: Sequence[Tensor | None], device: torch.device) -> None:
        self._given = [None if tensor is None else tensor.clone() for tensor in given]
        self._graph, self._device = torch.cuda.CUDAGraph(), device
        self._read = torch.cuda.Event()  # the latest result has been copied
        caller, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(caller)
        with autocast_without_cache("cuda"):
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function(*self._given)
            # What other threads do on the GPU meanwhile is none of this recording's business.
            with (
                nothing_freed(),
                torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._found = function(*self._given)
        caller.wait_stream(stream)

    def finish(self) -> None:
        """Wait for the latest call, before the places are given to others."""
        self._read.synchronize()

    def __call__(self, given: Sequence[Tensor | None]) -> Tensor:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._read)  # the last call may have been on another stream
        for place, tensor in zip(self._given, given, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor)
        self._graph.replay()
        result = self._found.clone()
        self._read.record(stream)
        return result


@contextmanager
def nothing_freed() -> Iterator[None]:
    """No cycles are collected: an older graph among them would be freed, which breaks off a recording."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def autocast_without_cache(kind: str) -> torch.autocast:
    """Autocast as it is, save that it keeps no casts: those would not be recorded."""
    on = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=on, cache_enabled=False)


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def _kind(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
