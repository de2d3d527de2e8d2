"""An encoder or decoder as CUDA graphs: small images, whose kernels are shorter than their launches, gain most."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.kernels._recording import nothing_freed

KEPT = 8  # recordings, each of which has memory of its own
WARM_UP = 2


class GraphedForward:
    """Stands for a module's `forward`: a graph for each shape, dtype and layout it meets, without gradients on a GPU.

    Args:
        module: computes the same for the same input, and does not wait for the GPU.
    """

    def __init__(self, module: nn.Module) -> None:
        self._forward = module.forward
        self._recordings: OrderedDict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        """What the module gives for x."""
        if not x.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            result: Tensor = self._forward(x)
            return result
        key = x.shape, x.stride(), x.dtype, x.device
        if key not in self._recordings:
            if len(self._recordings) == KEPT:
                self._recordings.popitem(last=False)
            self._recordings[key] = self._record(x)
        self._recordings.move_to_end(key)
        graph, given, found = self._recordings[key]
        given.copy_(x)
        graph.replay()
        return found.clone()  # the next call writes to the same place

    def _record(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = x.clone()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._forward(given)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        with nothing_freed(), torch.cuda.graph(graph):
            found = self._forward(given)
        return graph, given, found
