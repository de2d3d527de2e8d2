"""Sparse convolution of a tensor: finds its kernel map, and computes it by the dataflow that the layer asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.kernels.fetch_on_demand import fetch_on_demand
from pronghorn.kernels.kernel_map import kernel_map
from pronghorn.kernels.sparse_convolution import CountedMap, Epilogue, SortedMap, sparse_convolution
from pronghorn.kernels.sparse_convolution.tiles import MOST_BITS
from pronghorn.torchsparse.config import FETCH_ON_DEMAND, GATHER_SCATTER, IMPLICIT_GEMM, ConvConfig
from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.grouping import gather_scatter, group_offsets
from pronghorn.torchsparse.kernel_maps import (
    Geometry,
    KernelMap,
    build_kernel_map,
    geometry_of,
    get_kernel_offsets,
    out_spatial_range,
)
from pronghorn.torchsparse.tensor import SparseTensor

Numbers = int | Sequence[int]


def conv3d(
    input: SparseTensor,
    weight: Tensor,
    kernel_size: Numbers,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    config: ConvConfig | None = None,
    transposed: bool = False,
    generative: bool = False,
    epilogue: Epilogue | None = None,
) -> SparseTensor:
    """Sparse convolution, of 1 to 4 dimensions.

    Without a stride, outputs are the input's sites. With one, they are the sites that a kernel reaches, in
    lexicographic order. A transposed convolution goes back to the sites that the convolution with the same kernel size,
    stride and dilation came from; a generative one makes all sites that its kernel reaches.

    Args:
        input: features [N, input channels].
        weight: [kernel volume, input channels, output channels], or [input channels, output channels] where the volume
            and the stride are 1. The first dimension of the kernel runs fastest where the volume is odd, the last one
            where it is even.
        kernel_size: one number, or one for each dimension.
        bias: [output channels].
        stride: likewise.
        padding: likewise; on odd edges without a stride the kernel is centred, whatever this says.
        dilation: likewise.
        config: how it is computed; by default `get_global_config()`.
        transposed: compute the transposed convolution.
        generative: let a transposed convolution make new sites.
        epilogue: what is done to the result before it is rounded, for inference.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, no strided convolution came before a transposed
            one, or a generative one has no spatial range. RuntimeError: a gradient is asked for beside an epilogue.

    Source: Tang et al. (MICRO 2023), section 2; Gwak et al. (arXiv 2006.12356) for generative ones.
    """
    if epilogue is not None and torch.is_grad_enabled() and (input.feats.requires_grad or weight.requires_grad):
        raise RuntimeError("epilogue: is for inference; a gradient was asked for")
    kind = input.feats.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        # It would reach into the operations, too, and round what they sum up in float32.
        with torch.autocast(kind, enabled=False):
            return conv3d(
                input.replace(input.feats.to(dtype)), weight.to(dtype), kernel_size,
                None if bias is None else bias.to(dtype), stride, padding, dilation, config, transposed, generative,
                epilogue,
            )  # fmt: skip
    dimensions = input.coords.shape[1] - 1
    config = settings.config if config is None else config
    geometry = geometry_of(
        _hashable(kernel_size), _hashable(stride), _hashable(padding), _hashable(dilation), dimensions,
        config.kmap_mode, config.downsample_mode,
    )  # fmt: skip
    _check_weight(input, weight, geometry, bias)
    if geometry.volume == 1 and not geometry.strided:
        output = input.replace(_finished(input.feats @ weight.view(weight.shape[-2:]), epilogue))
    elif generative:
        output = _generative(input, weight, geometry, config, epilogue)
    elif transposed:
        found = _matching(input, geometry)
        feats = _compute(input.feats, weight, found, config, epilogue, transposed=True)
        output = input._at(feats, found.coords[0], found.stride, found.spatial_range)
    else:
        found = build_kernel_map(input, geometry)
        feats = _compute(input.feats, weight, found, config, epilogue, transposed=False)
        if geometry.strided:
            to = tuple(a * b for a, b in zip(input.stride, geometry.stride, strict=True))
            output = input._at(feats, found.coords[1], to, out_spatial_range(input.spatial_range, geometry))
        else:
            output = input.replace(feats)
    if bias is not None:
        output.feats = output.feats + bias
    return output


def _hashable(numbers: Numbers) -> int | tuple[int, ...]:
    return numbers if isinstance(numbers, int) else tuple(numbers)


@dataclass(frozen=True)
class _Way:
    """One direction of a kernel map."""

    found: KernelMap
    transposed: bool

    def table(self, splits: int | None) -> Tensor | SortedMap | CountedMap:
        if splits is None:
            return self.found.table(transposed=self.transposed)
        return self.found.sorted(splits, transposed=self.transposed)

    @property
    def pairs(self) -> Tensor:
        return self.found.pairs[0].flip(0) if self.transposed else self.found.pairs[0]


def _compute(
    x: Tensor, weight: Tensor, found: KernelMap, config: ConvConfig, epilogue: Epilogue | None, *, transposed: bool
) -> Tensor:
    weight = weight[None] if weight.dim() == 2 else weight
    forward, backward = _Way(found, transposed), _Way(found, not transposed)
    volume, outputs = weight.shape[0], found.coords[0 if transposed else 1].shape[0]
    # Without a GPU implicit gemm would look for the pairs at each call; here they are kept.
    plain = x.device.type == "cpu" and not config.ifsort and not torch.compiler.is_compiling()
    if config.dataflow == GATHER_SCATTER or (plain and config.dataflow == IMPLICIT_GEMM):
        # Every row goes to itself by the middle of an odd kernel.
        centre = volume // 2 if volume % 2 and found.coords[0] is found.coords[1] else None
        groups = group_offsets(
            found.sizes, epsilon=config.epsilon, mm_thresh=config.mm_thresh, without_centre=centre is not None
        )
        return _finished(gather_scatter(x, weight, forward.pairs, found.sizes, outputs, groups, centre), epilogue)
    if config.dataflow == FETCH_ON_DEMAND and not settings.deterministic:
        y = fetch_on_demand(x, weight, forward.pairs, found.pairs[1], outputs, tf32=settings.allow_tf32)
        return _finished(y, epilogue)
    least = -(-volume // MOST_BITS)
    splits = min(max(config.split_mask_num, least), volume) if config.ifsort else None
    splits_bwd = min(max(config.split_mask_num_bwd, least), volume) if config.ifsort else None
    trains = torch.is_grad_enabled() and x.requires_grad
    return sparse_convolution(
        x, weight, forward.table(splits), backward.table(splits_bwd) if trains else None, tf32=settings.allow_tf32,
        epilogue=epilogue,
    )  # fmt: skip


def _finished(y: Tensor, epilogue: Epilogue | None) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    return y if epilogue is None else epilogue(y.to(wide)).to(y.dtype)


def _matching(input: SparseTensor, geometry: Geometry) -> KernelMap:
    """The map of the convolution that made the input's sites."""
    stride = tuple(a // b for a, b in zip(input.stride, geometry.stride, strict=True))
    wanted = (stride, geometry.kernel_size, geometry.stride, geometry.dilation)
    known = {
        key[3]: found
        for key, found in input._caches.kmaps.items()
        if (key[0], key[1], key[2], key[4]) == wanted and found.coords[1] is input.coords
    }
    if len(known) > 1 and geometry.padding not in known:
        raise ValueError(
            f"padding: got {geometry.padding}, there are maps of {' and '.join(map(str, sorted(known)))} to go back by"
        )
    if not known:
        raise ValueError(
            f"transposed: no convolution of kernel size {geometry.kernel_size}, stride {geometry.stride} and dilation "
            f"{geometry.dilation} made these sites, at stride {input.stride}; there are maps of "
            f"{[key[:3] for key in input._caches.kmaps] or 'none'}"
        )
    return known.get(geometry.padding) or next(iter(known.values()))


def _generative(
    input: SparseTensor, weight: Tensor, geometry: Geometry, config: ConvConfig, epilogue: Epilogue | None
) -> SparseTensor:
    """Input x adds x W[k] to site x * stride + offset k, where that is within the range."""
    if input.spatial_range is None:
        raise ValueError("generative: needs a tensor with a spatial_range")
    device = input.coords.device
    steps = (1, *geometry.stride)
    offsets = get_kernel_offsets(geometry.kernel_size, 1, geometry.dilation, device)
    offsets = torch.nn.functional.pad(offsets, (1, 0))
    reached = (input.coords * torch.tensor(steps, dtype=torch.int32, device=device))[:, None] + offsets
    sizes = tuple(size * step for size, step in zip(input.spatial_range, steps, strict=True))
    limit = torch.tensor(sizes, dtype=torch.int32, device=device)
    inside = ((reached >= 0) & (reached < limit)).all(dim=2)
    sites = reached[inside].unique(dim=0)
    bounds = torch.stack([torch.zeros(len(sizes)), torch.tensor(sizes) - 1]).long()
    # An input has one site for each offset: that is the map of the sites' inputs, the other way round.
    found = kernel_map(sites, input.coords, offsets, stride=steps, bounds=bounds)
    stride = tuple(a // b for a, b in zip(input.stride, geometry.stride, strict=True))
    back = KernelMap(found, (sites, input.coords), stride, sizes)
    output = SparseTensor(_compute(input.feats, weight, back, config, epilogue, transposed=True), sites, stride, sizes)
    return output


def _check_weight(input: SparseTensor, weight: Tensor, geometry: Geometry, bias: Tensor | None) -> None:
    channels = input.feats.shape[1]
    volume = weight.shape[0] if weight.dim() == 3 else 1
    if weight.dim() not in (2, 3) or volume != geometry.volume or weight.shape[-2] != channels:
        raise ValueError(f"weight: got {tuple(weight.shape)}, wanted [{geometry.volume}, {channels}, output channels]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != input.feats.device:
            raise ValueError(f"{name}: is on {tensor.device}, the input on {input.feats.device}")
    if weight.dtype != input.feats.dtype:
        raise TypeError(f"weight: got {weight.dtype}, the input is {input.feats.dtype}")
