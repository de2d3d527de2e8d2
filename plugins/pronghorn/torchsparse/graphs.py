"""Whole models as CUDA graphs: rows are filled up to fixed numbers, and one launch runs all layers, maps and all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

from pronghorn.kernels._recording import autocast_without_cache, nothing_freed
from pronghorn.torchsparse.samples import check_sparse
from pronghorn.torchsparse.tensor import Range, Room, SparseTensor, Stride, TensorCache

STEP = 128  # rows: numbers are rounded up to multiples of it
AFTERWARDS = (
    "layers that wait for the GPU, as bird's-eye views, crops, generative convolutions and dataflows other than "
    "implicit_gemm do, come after a graph"
)
Sizes = dict[Any, int]  # of sites, by the key of the kernel map that makes them; None for the input


class CudaGraph:
    """A model that is recorded at its first call, and replayed from then on; see `cuda_graph`."""

    def __init__(self, model: nn.Module, slack: float) -> None:
        if not slack >= 0:
            raise ValueError(f"slack: got {slack!r}, wanted a number of at least 0")
        self.model, self.slack = model, slack
        self._modules, self._parameters = list(model.modules()), list(model.parameters())
        self._recordings: dict[Any, _Recording] = {}

    def __call__(self, input: SparseTensor) -> Any:
        """What the model gives for a tensor. Sparse tensors in it have a cache of their own.

        Raises:
            TypeError, ValueError: no sparse tensor, or one without a spatial range. RuntimeError: the model does what a
                graph cannot record.
        """
        check_sparse(input)
        if input.spatial_range is None:
            raise ValueError("input: has no spatial_range, wanted one: a graph holds the sizes of its grids")
        state = self._state(input)
        recording = self._recordings.get(state)
        sites = len(input.feats)
        if recording is None:
            short = _count(self.model, input)
        else:
            short = {None: sites} if sites > recording.rows[None] else {}
        while True:
            if short:
                rows = {**(recording.rows if recording else {}), **self._roomy(short)}
                recording = self._recordings[state] = None  # type: ignore[assignment]  # frees its memory
                recording = self._recordings[state] = _Recording(self.model, input, rows)
            assert recording is not None  # noqa: S101 - short without one
            result, short = recording(input)
            if not short:
                return result

    def _roomy(self, sizes: Sizes) -> Sizes:
        return {key: max(1, -int(-size * (1 + self.slack) // STEP)) * STEP for key, size in sizes.items()}

    def _state(self, input: SparseTensor) -> Any:
        """All that a recording depends on, besides how many sites there are."""
        feats, kind = input.feats, input.feats.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        gradients = torch.is_grad_enabled(), feats.requires_grad
        return (
            input.stride, input.spatial_range, feats.device, feats.dtype, feats.shape[1], gradients, autocast,
            tuple([module.training for module in self._modules]),
            tuple([parameter.data_ptr() for parameter in self._parameters]),
        )  # fmt: skip


def cuda_graph(model: nn.Module, *, slack: float = 0.25) -> CudaGraph:
    """Record a model as a CUDA graph, kernel maps and all, for inference and for training.

    The first call counts the sites of every layer, and records the model for a quarter more, say; later calls copy
    their input to where it was, and replay. Where a scan has more sites than there is room for, the model is recorded
    anew. So it is for another range, dtype, mode, autocast, or other places of the parameters, and each of these
    recordings keeps its memory: let all scans have one range.

    In training, backward is a graph of its own: that of a result must run before the next call. Gradients flow to
    parameters and features; batch norms take the statistics of the sites there are.

    Args:
        model: takes a SparseTensor with a spatial range, whose features and coordinates alone vary from call to call.
            What it gives for sites must be in sparse tensors. It computes by "implicit_gemm", and nothing in it waits
            for the GPU: bird's-eye views, crops, and generative convolutions come after it. It may be fused, before
            this.
        slack: how many more sites than those of the first scan there is room for, as a share.

    Returns:
        What is called as the model. Without a GPU it runs the same layers on as many rows, which is slower.

    Raises:
        ValueError: the slack is negative.

    Examples:
        >>> fast = ts.cuda_graph(model)
        >>> with torch.no_grad():
        ...     y = fast(x)
    """
    return CudaGraph(model, slack)


@dataclass(frozen=True)
class _Sites:
    """A sparse tensor in a result: places of its features and coordinates among the outputs, and what else it is."""

    feats: int
    coords: int
    key: Any
    stride: Stride
    spatial_range: Range | None


class _FilledUp(nn.Module):
    """The model from tensors to tensors, all of fixed sizes; how they make up its result is kept."""

    def __init__(self, model: nn.Module, rows: Sizes, input: SparseTensor) -> None:
        super().__init__()
        self.model, self.rows = model, rows
        self.stride, self.spatial_range = input.stride, input.spatial_range
        learns = any(module.training for module in model.modules())
        self.statistics = list(model.buffers()) if learns else []
        self.statistics_before = [torch.empty_like(buffer) for buffer in self.statistics]

    def forward(self, feats: Tensor, coords: Tensor) -> tuple[Tensor, ...]:
        """Outputs, their coordinates, and at last how many sites there are by `keys`, int32 [keys]."""
        _copy(self.statistics, self.statistics_before)
        x = SparseTensor(feats, coords, self.stride, self.spatial_range)
        room = Room(self.rows, {None: (coords, (coords[:, 0] >= 0).sum(dtype=torch.int32)[None])})
        x._caches = TensorCache({x.stride: (coords, x.spatial_range)}, room=room)
        leaves, self.tree = tree_flatten(self.model(x), is_leaf=_is_sparse)
        self.keys = list(room.counts)
        keys = {id(sites): key for key, (sites, _) in room.counts.items()}
        outputs: list[Tensor] = []
        self.leaves: list[Any] = []
        for leaf in leaves:
            if _is_sparse(leaf):
                if id(leaf.coords) not in keys:
                    raise ValueError(f"model: gives sites that no convolution in it made; {AFTERWARDS}")
                place = len(outputs)
                self.leaves.append(_Sites(place, place + 1, keys[id(leaf.coords)], leaf.stride, leaf.spatial_range))
                outputs += [leaf.feats, leaf.coords]
            elif isinstance(leaf, Tensor):
                if leaf.dim() and leaf.shape[0] in self.rows.values():
                    raise ValueError(
                        f"model: gives a tensor {tuple(leaf.shape)} with a row for every site that there is room for; "
                        "wanted a SparseTensor of it, as by x.replace(feats), which is cut to the sites there are"
                    )
                self.leaves.append(len(outputs))
                outputs.append(leaf)
            else:
                raise TypeError(f"model: gives a {type(leaf).__name__}, wanted tensors")
        return *outputs, torch.cat([count for _, count in room.counts.values()])


class _Recording:
    """A model for fixed numbers of rows."""

    def __init__(self, model: nn.Module, input: SparseTensor, rows: Sizes) -> None:
        self.rows = rows
        self._filled_up = _FilledUp(model, rows, input)
        self._run: Any = self._filled_up
        if input.feats.is_cuda:
            feats, coords = self._filled(input)
            given = feats.detach().requires_grad_(feats.requires_grad), coords
            try:
                with _buffers_kept(model), autocast_without_cache(input.feats.device.type), nothing_freed():
                    self._run = torch.cuda.make_graphed_callables(self._filled_up, given, allow_unused_input=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                generator = torch.cuda.default_generators[input.feats.device.index]
                # A recording that breaks off leaves the generator believing that it is still recorded.
                generator.graphsafe_set_state(generator.clone_state())
                raise RuntimeError(f"model: cannot be recorded as a CUDA graph; {AFTERWARDS}") from error

    def __call__(self, input: SparseTensor) -> tuple[Any, Sizes]:
        """The model's result, or how many sites there are where there was too little room."""
        if torch.is_grad_enabled():
            for parameter in self._filled_up.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()  # it may lie where the next backward writes
        *tensors, counts = self._run(*self._filled(input))
        found = dict(zip(self._filled_up.keys, counts.tolist(), strict=True))
        short = {key: count for key, count in found.items() if count > self.rows[key]}
        if short:
            _copy(self._filled_up.statistics_before, self._filled_up.statistics)
            return None, short
        return self._result(tensors, found), {}

    def _filled(self, input: SparseTensor) -> tuple[Tensor, Tensor]:
        more = (0, 0, 0, self.rows[None] - len(input.feats))
        return functional.pad(input.feats, more), functional.pad(input.coords, more, value=-1)

    def _result(self, tensors: list[Tensor], counts: Sizes) -> Any:
        """Copies of what is there: the next call writes to the same places."""
        cache = TensorCache()
        coords: dict[Any, Tensor] = {}

        def made(leaf: _Sites | int) -> Any:
            if isinstance(leaf, int):
                return tensors[leaf].clone()
            count = counts[leaf.key]
            if leaf.key not in coords:
                coords[leaf.key] = tensors[leaf.coords][:count].clone()
            tensor = SparseTensor(
                tensors[leaf.feats][:count].clone(), coords[leaf.key], leaf.stride, leaf.spatial_range
            )
            tensor._caches = cache
            cache.cmaps.setdefault(tensor.stride, (tensor.coords, tensor.spatial_range))
            return tensor

        return tree_unflatten([made(leaf) for leaf in self._filled_up.leaves], self._filled_up.tree)


def _is_sparse(value: Any) -> bool:
    return isinstance(value, SparseTensor)


def _count(model: nn.Module, input: SparseTensor) -> Sizes:
    """Sites of the input and of every strided convolution."""
    seen = input.replace(input.feats.detach())
    seen._caches = TensorCache({seen.stride: (seen.coords, seen.spatial_range)})
    with torch.no_grad(), _buffers_kept(model):
        model(seen)
    strided = {key: found for key, found in seen._caches.kmaps.items() if found.coords[0] is not found.coords[1]}
    return {None: len(input.feats), **{key: len(found.coords[1]) for key, found in strided.items()}}


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Running statistics stay as they were."""
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        _copy(before, buffers)


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
