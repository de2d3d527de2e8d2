"""Features at the occupied sites of a grid, with the maps that layers build and share."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from pronghorn.kernels.strided_coords import coords_bounds
from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.quantize import make_ntuple

Stride = tuple[int, ...]
Range = tuple[int, ...]


@dataclass
class Room:
    """Where tensors are filled up with rows that are no sites, to numbers that do not depend on the data.

    Coordinates of such rows are -1; their features are finite, and no convolution reads them.

    Attributes:
        rows: how many sites there may be, by the key of the kernel map that makes them.
        counts: these sites, and how many there are on the device, int32 [1], once they are known; None is the input.
    """

    rows: dict[Any, int]
    counts: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def count_of(self, coords: Tensor) -> Tensor | None:
        """How many of these rows are sites, where that is known."""
        return next((count for sites, count in self.counts.values() if sites is coords), None)


@dataclass
class TensorCache:
    """What the layers that a tensor goes through have found out about its coordinates.

    Attributes:
        cmaps: coordinates and spatial range of each stride.
        kmaps: kernel maps, by all that they depend on.
        bounds: coordinates of each stride, and the least and largest of them.
        room: where rows are filled up, for a CUDA graph.
    """

    cmaps: dict[Stride, tuple[Tensor, Range | None]] = field(default_factory=dict)
    kmaps: dict[Any, Any] = field(default_factory=dict)
    bounds: dict[Stride, tuple[Tensor, Tensor]] = field(default_factory=dict)
    room: Room | None = None


_global_cache: TensorCache | None = None


def get_tensor_cache_mode() -> bool:
    """Whether all tensors share one cache."""
    return _global_cache is not None


def set_tensor_cache_mode(one_for_all: bool) -> None:
    """Let all tensors share one cache, which must be cleared after each forward, or each have its own."""
    global _global_cache
    _global_cache = TensorCache() if one_for_all else None


def clear_global_tensor_cache() -> None:
    """Forget what the shared cache holds."""
    if _global_cache is not None:
        set_tensor_cache_mode(True)


@dataclass(init=False, eq=False, repr=False)
class SparseTensor:
    """Features of occupied sites.

    Coordinates are those of the grid at the tensor's stride: 0, 1, 2 … also after a strided layer. Rows are in any
    order. Where two rows have the same coordinates, each keeps its features and looks for its neighbours, but only the
    last one is found as a neighbour; `check` finds such rows, and `sparse_quantize` takes them out.

    Args:
        feats: [N, C], floating point.
        coords: int32 [N, 1 + dimensions], the batch index first; 1 to 4 dimensions.
        stride: of the grid; one number, or one for each dimension.
        spatial_range: (batch size, *sizes) of the grid; what a sample's sites give then depends on nothing else in the
            batch, and nothing is waited for to find the bounds.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Source: Tang et al., TorchSparse++ (MICRO 2023), section 2.
    """

    # FSDP finds tensors with a gradient in dataclasses, and puts others in their places by `dataclasses.replace`.
    feats: Tensor
    coords: Tensor
    stride: Stride
    spatial_range: Range | None
    _caches: TensorCache

    def __init__(
        self,
        feats: Tensor,
        coords: Tensor,
        stride: int | Sequence[int] = 1,
        spatial_range: Sequence[int] | None = None,
        _caches: TensorCache | None = None,
    ) -> None:
        _check(feats, coords)
        dimensions = coords.shape[1] - 1
        self.feats, self.coords = feats, coords
        self.stride = make_ntuple(stride, ndim=dimensions, name="stride")
        self.spatial_range = None if spatial_range is None else tuple(int(size) for size in spatial_range)
        if self.spatial_range is not None and len(self.spatial_range) != dimensions + 1:
            raise ValueError(f"spatial_range: got {spatial_range}, wanted a batch size and {dimensions} sizes")
        if _caches is None:
            _caches = TensorCache() if _global_cache is None else _global_cache
        self._caches = _caches
        self._caches.cmaps.setdefault(self.stride, (coords, self.spatial_range))

    @property
    def F(self) -> Tensor:  # noqa: N802 - the field's name
        """Features."""
        return self.feats

    @F.setter
    def F(self, feats: Tensor) -> None:  # noqa: N802
        self.feats = feats

    @property
    def C(self) -> Tensor:  # noqa: N802
        """Coordinates."""
        return self.coords

    @C.setter
    def C(self, coords: Tensor) -> None:  # noqa: N802
        self.coords = coords

    @property
    def s(self) -> Stride:
        """Stride."""
        return self.stride

    @s.setter
    def s(self, stride: int | Sequence[int]) -> None:
        self.stride = make_ntuple(stride, ndim=self.coords.shape[1] - 1, name="stride")

    def replace(self, feats: Tensor) -> SparseTensor:
        """Other features at the same sites, with the same cache."""
        return self._at(feats, self.coords, self.stride, self.spatial_range)

    def _at(self, feats: Tensor, coords: Tensor, stride: Stride, spatial_range: Range | None) -> SparseTensor:
        """A tensor that shares this one's cache; its parts are known to fit."""
        made = SparseTensor.__new__(SparseTensor)
        made.feats, made.coords, made.stride, made.spatial_range = feats, coords, stride, spatial_range
        made._caches = self._caches
        made._caches.cmaps.setdefault(stride, (coords, spatial_range))
        return made

    @property
    def filled_up(self) -> bool:
        """Whether there are rows that are no sites, with coordinates of -1: within a CUDA graph."""
        return self._caches.room is not None

    def count(self) -> Tensor:
        """How many of the rows are sites, int32 [1] on the device.

        Raises:
            ValueError: rows are filled up, and these were not counted.
        """
        if self._caches.room is None:
            return torch.tensor([self.coords.shape[0]], dtype=torch.int32, device=self.coords.device)
        count = self._caches.room.count_of(self.coords)
        if count is None:
            raise ValueError("sites that no convolution made cannot be counted within a CUDA graph")
        return count

    def bounds(self) -> Tensor:
        """Least and largest coordinates, int64 [2, 1 + dimensions] on the CPU: of the range, or else of the data.

        Raises:
            ValueError: coordinates are negative, and that is not allowed.
        """
        if self.spatial_range is not None:
            return _bounds_of(self.spatial_range)
        coords, known = self._caches.bounds.get(self.stride, (None, None))
        if known is None or coords is not self.coords:
            known = coords_bounds(self.coords)
            _refuse_negative(known)
            self._caches.bounds[self.stride] = self.coords, known
        return known

    def check(self) -> SparseTensor:
        """Itself, once it has been seen that all is as it should be; waits for the GPU.

        Raises:
            ValueError: coordinates are out of range, negative where that is not allowed, or there more than once.
        """
        found = coords_bounds(self.coords)
        _refuse_negative(found)
        if self.spatial_range is not None and len(self.coords):
            sizes = torch.tensor(self.spatial_range)
            if (found[0] < 0).any() or (found[1] >= sizes).any():
                raise ValueError(
                    f"coords: {found[0].tolist()} to {found[1].tolist()} are not within spatial_range "
                    f"{self.spatial_range}; the first column is the batch index"
                )
        distinct = len(self.coords.unique(dim=0))
        if distinct < len(self.coords):
            raise ValueError(f"coords: {len(self.coords) - distinct} of {len(self.coords)} rows are there already")
        return self

    def dense(self) -> Tensor:
        """[batch, *sizes, C]; zeros where there is no site. Waits for the GPU.

        Raises:
            ValueError: there is no spatial range, or a site is out of it.
        """
        if self.spatial_range is None:
            raise ValueError("spatial_range: dense() needs one")
        found, sizes = coords_bounds(self.coords), torch.tensor(self.spatial_range)
        if len(self.coords) and ((found[0] < 0).any() or (found[1] >= sizes).any()):
            raise ValueError(
                f"coords: {found[0].tolist()} to {found[1].tolist()} are not within spatial_range {self.spatial_range}"
            )
        return self.feats.new_zeros(*self.spatial_range, self.feats.shape[1]).index_put(
            tuple(self.coords.long().T), self.feats
        )

    def cpu(self) -> SparseTensor:
        """Move it, and return it."""
        return self._apply(lambda tensor: tensor.cpu())

    def cuda(self) -> SparseTensor:
        """Move it, and return it."""
        return self._apply(lambda tensor: tensor.cuda())

    def to(self, device: torch.device | str, non_blocking: bool = True) -> SparseTensor:
        """Move it, and return it."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def half(self) -> SparseTensor:
        """Make its features 16-bit, and return it."""
        self.feats = self.feats.half()
        return self

    def detach(self) -> SparseTensor:
        """Cut its features from their history, and return it."""
        self.feats = self.feats.detach()
        return self

    def _apply(self, move: Callable[[Tensor], Tensor]) -> SparseTensor:
        coords = move(self.coords)
        self.feats = move(self.feats)
        if coords is not self.coords:
            self.coords = coords
            self._caches = TensorCache() if _global_cache is None else _global_cache
            self._caches.cmaps[self.stride] = (coords, self.spatial_range)
        return self

    def __add__(self, other: SparseTensor) -> SparseTensor:
        if not isinstance(other, SparseTensor):
            return NotImplemented
        if self.feats.shape != other.feats.shape or self.stride != other.stride:
            raise ValueError(
                f"+: features {tuple(self.feats.shape)} at stride {self.stride} and {tuple(other.feats.shape)} at "
                f"{other.stride} are not of the same sites"
            )
        return self.replace(self.feats + other.feats)

    def __repr__(self) -> str:
        return (
            f"SparseTensor(feats={tuple(self.feats.shape)} {self.feats.dtype}, coords={tuple(self.coords.shape)}, "
            f"stride={self.stride}, spatial_range={self.spatial_range}, device={self.feats.device})"
        )


class PointTensor:
    """Features of points, and where they lie among voxels.

    Args:
        feats: [N, C], floating point.
        coords: [N, dimensions + 1] or as an application has them; floating point or integers.
        idx_query: by stride, the rows of the voxels around each point.
        weights: by stride, what each of them counts.
    """

    def __init__(
        self,
        feats: Tensor,
        coords: Tensor,
        idx_query: dict[Stride, Tensor] | None = None,
        weights: dict[Stride, Tensor] | None = None,
    ) -> None:
        if feats.dim() != 2 or coords.dim() != 2 or len(feats) != len(coords):
            raise ValueError(
                f"feats, coords: got {tuple(feats.shape)} and {tuple(coords.shape)}, wanted as many rows of each"
            )
        self.F, self.C = feats, coords
        self.idx_query = {} if idx_query is None else idx_query
        self.weights = {} if weights is None else weights
        self.additional_features: dict[str, Any] = {"idx_query": {}, "counts": {}}

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PointTensor:
        """Move it, and return it."""
        self.F, self.C = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.F, self.C))
        for known in (self.idx_query, self.weights):
            known.update({key: tensor.to(device, non_blocking=non_blocking) for key, tensor in known.items()})
        return self

    def cuda(self) -> PointTensor:
        """Move it, and return it."""
        return self.to("cuda")

    def detach(self) -> PointTensor:
        """Cut its features from their history, and return it."""
        self.F = self.F.detach()
        return self

    def __add__(self, other: PointTensor) -> PointTensor:
        if not isinstance(other, PointTensor):
            return NotImplemented
        made = PointTensor(self.F + other.F, self.C, self.idx_query, self.weights)
        made.additional_features = self.additional_features
        return made


def _check(feats: Tensor, coords: Tensor) -> None:
    if not isinstance(feats, Tensor) or feats.dim() != 2 or not feats.is_floating_point():
        raise TypeError(f"feats: got {_kind(feats)}, wanted a floating-point tensor [N, C]")
    if not isinstance(coords, Tensor) or coords.dim() != 2 or coords.dtype != torch.int32:
        raise TypeError(f"coords: got {_kind(coords)}, wanted an int32 tensor [N, 1 + dimensions], batch index first")
    if not 2 <= coords.shape[1] <= 5:
        raise ValueError(f"coords: got {coords.shape[1]} columns, wanted a batch index and 1 to 4 dimensions")
    if len(feats) != len(coords):
        raise ValueError(f"feats: got {len(feats)} rows, coords have {len(coords)}")
    if feats.device != coords.device:
        raise ValueError(f"feats: are on {feats.device}, coords on {coords.device}")


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@functools.lru_cache(maxsize=256)
def _bounds_of(spatial_range: Range) -> Tensor:
    """Nobody writes to it."""
    sizes = torch.tensor(spatial_range)
    return torch.stack([torch.zeros_like(sizes), sizes - 1])


def _refuse_negative(bounds: Tensor) -> None:
    if torch.compiler.is_compiling():  # there are no values to look at before it runs
        least = bounds[0, :1] if settings.allow_negative_coordinates else bounds[0]
        torch._assert_async((least >= 0).all(), "coords: some are negative")
        return
    if bounds[0, 0] < 0 <= bounds[1, 0]:
        raise ValueError(f"coords: a batch index is {int(bounds[0, 0])}; the first column is the batch index")
    if not settings.allow_negative_coordinates and (bounds[0] < 0).any():
        raise ValueError(
            f"coords: the least are {bounds[0].tolist()}; negative ones are taken after "
            "set_allow_negative_coordinates(True)"
        )


class _Context(tuple[Stride, Range | None]):
    """Stride and range of a tensor, by which trees are told apart, and its cache for as long as that is used."""

    cache: Callable[[], TensorCache | None]

    def __reduce__(self) -> Any:
        return tuple, (tuple(self),)


def _flatten(tensor: SparseTensor) -> tuple[list[Tensor], _Context]:
    context = _Context((tensor.stride, tensor.spatial_range))
    context.cache = weakref.ref(tensor._caches)
    return [tensor.feats, tensor.coords], context


def _unflatten(parts: Any, context: Any) -> SparseTensor:
    feats, coords = parts
    stride, spatial_range = context
    made = SparseTensor.__new__(SparseTensor)  # parts may be anything, as in any tree
    made.feats, made.coords, made.stride, made.spatial_range = feats, coords, stride, spatial_range
    cache = context.cache() if isinstance(context, _Context) else None
    if cache is None or cache.cmaps.get(stride, (None,))[0] is not coords:  # other sites, as an export's
        cache = TensorCache({stride: (coords, spatial_range)})
    made._caches = cache
    return made


def _flatten_with_keys(tensor: SparseTensor) -> tuple[list[tuple[_pytree.KeyEntry, Tensor]], tuple[Any, ...]]:
    parts, context = _flatten(tensor)
    keys = map(_pytree.GetAttrKey, ("feats", "coords"))
    return list(zip(keys, parts, strict=True)), context


_pytree.register_pytree_node(
    SparseTensor, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="pronghorn.torchsparse.SparseTensor",
    to_dumpable_context=list,
    from_dumpable_context=lambda context: tuple(part and tuple(part) for part in context),  # JSON has no tuples
)  # fmt: skip
