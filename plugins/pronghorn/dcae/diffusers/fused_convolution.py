"""Convolutions that cuDNN's compiler joins with what follows them, so that a bias, activation or sum is no pass."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.dcae.diffusers.convolution import convolved, in_cudnn

DTYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}
TRIED = 4  # of cuDNN's kernels for a graph, in its own order: of twelve on an H100, the fastest was one of these
CALLS = 3  # of each
KEPT = 128  # shapes of which the fastest is known

Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class FusedConvolutions:
    """`convolved`, by PyTorch or by the fastest of cuDNN's first kernels, as the first call with a new shape finds.

    Where it is not for cuDNN it is `convolved`: on another device, in float32, with gradients, in groups, or where a
    pixel's channels do not lie side by side.

    Raises:
        ImportError: nvidia-cudnn-frontend is not installed.
    """

    def __init__(self) -> None:
        try:
            import cudnn
        except ImportError as error:
            raise ImportError(
                "fused_convolutions: nvidia-cudnn-frontend is not installed; pip install 'pronghorn[cudnn]'"
            ) from error
        self._cudnn = cudnn
        self._handles: dict[torch.device, Any] = {}
        self._fastest: OrderedDict[tuple[Any, ...], Run | None] = OrderedDict()  # None: PyTorch's way
        self._lock = threading.Lock()  # a handle has one stream at a time

    def __call__(
        self, conv: nn.Conv2d, x: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None,
        residual: Tensor | None = None, activation: str | None = None,
    ) -> Tensor:  # fmt: skip
        """activation(conv(x) + residual), as `convolved` takes it."""
        if weight is None:
            weight, bias = conv._parameters["weight"], conv._parameters["bias"]
        given: dict[str, Any] = {"weight": weight, "bias": bias, "residual": residual, "activation": activation}
        assert weight is not None  # noqa: S101 - a convolution has one
        if not _for_cudnn(conv, x, weight, residual):
            return convolved(conv, x, **given)
        key = (x.shape, x.dtype, x.device, weight.shape, conv.stride, conv.padding, conv.dilation, activation,
               bias is not None, residual is not None)  # fmt: skip
        with self._lock, torch.cuda.device_of(x):
            if key not in self._fastest:
                if torch.cuda.is_current_stream_capturing():  # nothing can be timed
                    return convolved(conv, x, **given)
                if len(self._fastest) == KEPT:
                    self._fastest.popitem(last=False)
                self._fastest[key] = self._search(conv, x, given)
            run = self._fastest[key]
            return convolved(conv, x, **given) if run is None else run(x, weight, bias, residual)

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedConvolutions, ()  # handles and kernels are this process's

    def _search(self, conv: nn.Conv2d, x: Tensor, given: dict[str, Any]) -> Run | None:
        """The fastest way for tensors as these."""
        tensors = x, given["weight"], given["bias"], given["residual"]
        best, least = None, _seconds(partial(convolved, conv, x, **given))
        for run in self._plans(conv, *tensors, given["activation"]):
            seconds = _seconds(partial(run, *tensors))
            if seconds < least:
                best, least = run, seconds
        return best

    def _plans(
        self, conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
        activation: str | None,
    ) -> list[Run]:  # fmt: skip
        """cuDNN's first kernels for a graph of these operations; none where it has none."""
        cudnn, dtype = self._cudnn, getattr(self._cudnn.data_type, DTYPES[x.dtype])
        if x.device not in self._handles:
            self._handles[x.device] = cudnn.create_handle()
        handle, places = self._handles[x.device], {}
        graph = cudnn.pygraph(
            io_data_type=dtype, intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )  # fmt: skip

        def place(name: str, tensor: Tensor) -> Any:
            places[name] = graph.tensor(
                name=name, dim=list(tensor.shape), stride=list(tensor.stride()), data_type=dtype
            )
            return places[name]

        y = graph.conv_fprop(
            image=place("x", x), weight=place("weight", weight), padding=list(conv.padding), stride=list(conv.stride),
            dilation=list(conv.dilation),
        )  # fmt: skip
        if bias is not None:
            y = graph.bias(name="with_bias", input=y, bias=place("bias", _of_channels(bias)))
        if residual is not None:
            y = graph.add(name="sum", a=y, b=place("residual", residual))
        if activation is not None:
            y = {"silu": graph.swish, "relu": graph.relu}[activation](name="activation", input=y)
        like = _result(conv, x, weight)
        y.set_output(True).set_data_type(dtype).set_dim(list(like.shape)).set_stride(list(like.stride()))
        places["y"] = y
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A])
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError):  # channels that it has no kernel for, among others
            return []
        found = (self._plan(graph, index, places, conv, handle)
                 for index in range(min(TRIED, graph.get_execution_plan_count())))  # fmt: skip
        return [run for run in found if run is not None]

    def _plan(self, graph: Any, index: int, places: dict[str, Any], conv: nn.Conv2d, handle: Any) -> Run | None:
        """One kernel of a graph, unless it does not build here."""
        cudnn = self._cudnn
        try:
            graph.build_plan_at_index(index)
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError):
            return None
        size = graph.get_workspace_size_plan_at_index(index)

        def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
            y = _result(conv, x, weight)
            workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=x.device)
            pack = {places["x"]: x, places["weight"]: weight, places["y"]: y}
            if bias is not None:
                pack[places["bias"]] = _of_channels(bias)
            if residual is not None:
                pack[places["residual"]] = residual
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(x.device).cuda_stream)
            graph.execute_plan_at_index(pack, workspace, index, handle=handle)
            return y

        return run


def _for_cudnn(conv: nn.Conv2d, x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """Whether cuDNN's compiler may have a kernel: half precision, channels side by side, and no product of pixels."""
    plain = conv.groups == 1 and conv.kernel_size != (1, 1) and not isinstance(conv.padding, str)
    if not plain or x.dtype not in DTYPES or weight.dtype != x.dtype or not in_cudnn(x):
        return False
    given = [x, weight] if residual is None else [x, weight, residual]
    return all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in given)


def _of_channels(bias: Tensor) -> Tensor:
    return bias.as_strided((1, len(bias), 1, 1), (len(bias), 1, len(bias), len(bias)))


def _result(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """Room for a convolution's result."""
    padding: Any = conv.padding
    height, width = ((size + 2 * pad - far * (kernel - 1) - 1) // step + 1 for size, pad, far, kernel, step in
                     zip(x.shape[2:], padding, conv.dilation, weight.shape[2:], conv.stride, strict=True))  # fmt: skip
    return torch.empty(
        (len(x), len(weight), height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _seconds(run: Callable[[], Any]) -> float:
    """The least that a call takes, after one that may prepare something."""
    run()
    times = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
