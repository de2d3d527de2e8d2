"""From and to SpConv, and from MinkowskiEngine: weights, tensors, and the layers of a user's model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.torchsparse.config import ConvConfig
from pronghorn.torchsparse.conv import conv3d
from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.kernel_maps import kernel_indices
from pronghorn.torchsparse.nn.convolution import SparseConvolution
from pronghorn.torchsparse.quantize import make_ntuple
from pronghorn.torchsparse.tensor import SparseTensor, Stride, TensorCache

logger = logging.getLogger(__name__)

SPCONV_2, SPCONV_1, MINKOWSKI = "spconv2", "spconv1", "minkowski"
SOURCES = (SPCONV_2, SPCONV_1, MINKOWSKI)
DIMENSIONS = 3  # of kernels for which nothing else is said

Sizes = Mapping[str, int | tuple[int, ...]]
State = dict[str, Any]


def convert_state_dict(
    state_dict: Mapping[str, Any],
    source: str = SPCONV_2,
    kernel_sizes: Sizes | None = None,
    *,
    strided: Collection[str] = (),
    names: Collection[str] | None = None,
) -> State:
    """Weights of another library, for the same layers of this one; names of layers stay.

    SpConv: a weight [output channels, *kernel size, input channels], or [*kernel size, input channels, output channels]
    in version 1, becomes a `kernel`. SpConv 2 multiplies by the memory of a 1x1x1 weight as if it were [input channels,
    output channels], and so does this. Seen on the outputs of SpConv 2.3.8; version 1 was read, not run.

    MinkowskiEngine: a `kernel` [kernel volume, ...] whose volume is odd stays as it is. Where the volume is even,
    MinkowskiEngine has the first dimension run fastest, we the last one. A bias [1, channels] becomes [channels], and
    what a MinkowskiBatchNorm calls `bn.weight` is `weight`. Read in its sources (0.5), not run. Compute with
    `downsample_mode="minkowski"`; kernel edges of 4, 6 ... reach from 0 there, and from -1 here.

    Args:
        state_dict: of the other library. What is no weight of a sparse convolution is passed on.
        source: "spconv2", "spconv1" or "minkowski".
        kernel_sizes: for layers of MinkowskiEngine by name; by default they are cubes.
        strided: names of 1x1x1 layers that have a stride, so that their kernel keeps its first dimension.
        names: of SpConv's sparse convolutions; by default they are what has a weight of 5 dimensions. Give them where
            there are dense 3-D convolutions too, or sparse ones of other than 3 dimensions.

    Raises:
        ValueError: the source is unknown, a layer is not there, or a kernel's size is not known.
    """
    if source not in SOURCES:
        raise ValueError(f"source: got {source!r}, accepted are {', '.join(SOURCES)}")
    leaf = "kernel" if source == MINKOWSKI else "weight"
    layers = set(_layers(state_dict, leaf, names, (2, 3) if source == MINKOWSKI else (DIMENSIONS + 2,)))
    for name, given in (("kernel_sizes", kernel_sizes or ()), ("strided", strided)):
        _check_known(name, given, layers)
    converted: State = {}
    for key, value in state_dict.items():
        name, _, last = key.rpartition(".")
        if name in layers and last == leaf:
            converted[_join(name, "kernel")] = (
                _from_minkowski(name, value, kernel_sizes or {})
                if source == MINKOWSKI
                else _from_spconv(value, source, squeezed=name not in strided)
            )
        elif source == MINKOWSKI and name in layers and last == "bias":
            converted[key] = value.flatten()
        elif source == MINKOWSKI and name.rpartition(".")[2] == "bn":
            converted[_join(name.rpartition(".")[0], last)] = value
        else:
            converted[key] = value
    return converted


def to_spconv2_state_dict(state_dict: Mapping[str, Any], kernel_sizes: Sizes | None = None) -> State:
    """Weights for SpConv 2: the inverse of `convert_state_dict`.

    Args:
        state_dict: of our layers, whose `kernel` becomes a `weight`.
        kernel_sizes: by the names of layers; by default kernels are cubes.

    Raises:
        ValueError: a layer is not there, or a kernel's size is not known.
    """
    layers = set(_layers(state_dict, "kernel", None, (2, 3)))
    _check_known("kernel_sizes", kernel_sizes or (), layers)
    converted: State = {}
    for key, value in state_dict.items():
        name, _, last = key.rpartition(".")
        if name not in layers or last != "kernel":
            converted[key] = value
            continue
        *volume, inputs, outputs = value.shape
        size = _size(name, volume[0] if volume else 1, kernel_sizes or {})
        if volume:
            weight = value.new_empty(*size, inputs, outputs)
            weight[tuple(kernel_indices(size).T)] = value
            weight = weight.movedim(-1, 0).contiguous()
        else:
            weight = value.reshape(outputs, *size, inputs)
        converted[_join(name, "weight")] = weight
    return converted


def from_spconv(tensor: Any) -> SparseTensor:
    """Our tensor of SpConv's; nothing is copied. Axes have the same order, z, y, x as a rule.

    Args:
        tensor: has `features`, `indices`, `spatial_shape` and `batch_size`.

    Raises:
        TypeError: it does not. What SparseTensor raises.
    """
    missing = [name for name in ("features", "indices", "spatial_shape", "batch_size") if not hasattr(tensor, name)]
    if missing:
        raise TypeError(f"tensor: got {type(tensor).__name__} without {', '.join(missing)}, wanted a SparseConvTensor")
    return SparseTensor(
        tensor.features, tensor.indices, spatial_range=(int(tensor.batch_size), *map(int, tensor.spatial_shape))
    )


def to_spconv(tensor: SparseTensor) -> Any:
    """A `spconv.pytorch.SparseConvTensor` of our tensor; only its coordinates are copied, and only if they must be.

    Raises:
        ValueError: the tensor has no spatial range. ImportError: spconv is not installed.
    """
    if tensor.spatial_range is None:
        raise ValueError("tensor: has no spatial_range, which SpConv needs")
    from spconv.pytorch import SparseConvTensor

    batch, *sizes = tensor.spatial_range
    # SpConv reads memory row by row, whatever the strides say.
    return SparseConvTensor(tensor.feats, tensor.coords.contiguous(), sizes, batch)


def replace_spconv(module: nn.Module, *, source: str = SPCONV_2, config: ConvConfig | None = None) -> nn.Module:
    """Let the sparse convolutions of a model that is written for SpConv be computed here; in place.

    Layers go on taking and giving the model's own SparseConvTensor, so that all that is around them stays as it is:
    SparseSequential, batch norms, `replace_feature`, `dense()`, losses. Kernel maps are shared by `indice_key`, as in
    SpConv; outputs are in another order of rows. Names of layers stay, their `weight` is a `kernel`: load checkpoints
    before, or by `convert_state_dict`. Parameters are new, so an optimizer must be made afterwards; hooks on replaced
    layers are lost.

    What cannot be computed here is left to SpConv, and logged at WARNING: transposed convolutions, which make new
    sites; others that do so without a stride; paddings, on edges without a stride, that do not centre the kernel;
    activations within the layer; even sub-manifold kernels; inverse convolutions of layers that are left. Pooling is
    left as well.

    Args:
        module: the model.
        source: "spconv2" or "spconv1", whose weights it has.
        config: how to compute; by default `get_global_config()` at each call. Sites are always those of SpConv.

    Returns:
        The model, or its replacement where it is such a layer itself.

    Raises:
        ValueError: the source is unknown, or there is no layer of SpConv.
    """
    if source not in (SPCONV_2, SPCONV_1):
        raise ValueError(f"source: got {source!r}, accepted are {SPCONV_2}, {SPCONV_1}")
    layers = {name: layer for name, layer in module.named_modules() if _is_spconv(layer)}
    if not layers:
        raise ValueError(f"module: {type(module).__name__} has no sparse convolution of SpConv")
    reasons = {name: _unsupported(layer) for name, layer in layers.items()}
    partners = {layer.indice_key for name, layer in layers.items() if not reasons[name] and not _kept_sites(layer)}
    for name, layer in layers.items():
        if layer.inverse and not _pointwise(layer) and layer.indice_key not in partners:
            reasons[name] = reasons[name] or f"the layer with indice_key {layer.indice_key!r} is not replaced"
    for name, reason in reasons.items():
        if reason:
            logger.warning("%s is left to SpConv: %s", name or type(module).__name__, reason)
    made = {layer: _ours(layer, source, config) for name, layer in layers.items() if not reasons[name]}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children() gives a shared layer only once
            if child in made:
                parent.add_module(name, made[child])
    return made.get(module, module)


class SpconvConvolution(SparseConvolution):
    """A convolution that takes and gives SpConv's tensors, and finds kernel maps by `indice_key` as SpConv does.

    Args:
        layer: the SubMConv, SparseConv or SparseInverseConv that it stands for; its weights are taken over.
        source: "spconv2" or "spconv1".
        config: how it is computed.
    """

    def __init__(self, layer: Any, source: str, config: ConvConfig | None) -> None:
        self.ndim = layer.ndim
        plain = _kept_sites(layer)
        with torch.device("meta"):  # draws no random numbers
            super().__init__(
                layer.in_channels, layer.out_channels, tuple(layer.kernel_size),
                stride=1 if plain else tuple(layer.stride), padding=0 if plain else tuple(layer.padding),
                dilation=tuple(layer.dilation), transposed=layer.inverse, config=config,
            )  # fmt: skip
        self.indice_key: str | None = layer.indice_key
        weight = _from_spconv(layer.weight.detach(), source, squeezed=self.kernel.dim() == 2)
        if weight.shape != self.kernel.shape:
            raise ValueError(
                f"source: a weight {tuple(layer.weight.shape)} of {self.in_channels} input and {self.out_channels} "
                f"output channels is not {source}'s"
            )
        self.kernel = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        self.bias = layer.bias
        self.train(layer.training)

    def forward(self, input: Any) -> Any:
        """The convolution of a SparseConvTensor, as one.

        Raises:
            ValueError: no layer with this `indice_key` made the sites that an inverse convolution starts from.
        """
        x, cache = from_spconv(input), TensorCache()
        if self.indice_key is not None:
            cache = input.indice_dict.setdefault(f"pronghorn.{self.indice_key}", cache)
        x._caches = cache
        geometry = (self.stride, self.padding, self.dilation)
        if self.transposed and self.kernel.dim() == 3:
            x, geometry = self._back(x)
        output = conv3d(
            x, self.kernel, self.kernel_size, self.bias, *geometry, config=self._config(), transposed=self.transposed
        )
        return _alike(input, output)

    def _back(self, x: SparseTensor) -> tuple[SparseTensor, tuple[Stride, Stride, Stride]]:
        """The input as what its partner gave, and the partner's stride, padding and dilation."""
        for key, found in x._caches.kmaps.items():
            if found.coords[1] is x.coords or torch.equal(found.coords[1], x.coords):
                _, _, stride, padding, dilation, *_ = key
                return x._at(x.feats, found.coords[1], stride, x.spatial_range), (stride, padding, dilation)
        raise ValueError(f"indice_key: no convolution with {self.indice_key!r} made the sites of the input")

    def _config(self) -> ConvConfig:
        """The settings, but for those that would make other sites than SpConv's."""
        config = settings.config if self.config is None else self.config
        mode = "hashmap_on_the_fly" if config.kmap_mode == "hashmap" else config.kmap_mode
        return replace(config, kmap_mode=mode, downsample_mode="spconv")


def _alike(given: Any, output: SparseTensor) -> Any:
    """A tensor of the user's own kind that knows what the one that came in knows."""
    assert output.spatial_range is not None  # noqa: S101 - it came from SpConv
    made = type(given)(output.feats, output.coords, list(output.spatial_range[1:]), given.batch_size)
    made.indice_dict = given.indice_dict
    return made


def _ours(layer: Any, source: str, config: ConvConfig | None) -> SpconvConvolution:
    return _class_beside(_named(type(layer), "SparseModule"))(layer, source, config)


@functools.cache
def _class_beside(marker: type | None) -> type[SpconvConvolution]:
    """Our layer, which SparseSequential takes for one of SpConv's: it hands plain modules only the features."""
    return SpconvConvolution if marker is None else type("SpconvConvolution", (SpconvConvolution, marker), {})


def _named(kind: type, name: str) -> type | None:
    """The class of that name that `kind` comes from; SpConv itself need not be imported."""
    return next((base for base in kind.__mro__ if base.__name__ == name and base is not SparseConvolution), None)


def _is_spconv(layer: nn.Module) -> bool:
    return not isinstance(layer, SparseConvolution) and _named(type(layer), "SparseConvolution") is not None


def _pointwise(layer: Any) -> bool:
    """Whether SpConv multiplies by one matrix and leaves sites alone."""
    return set(layer.kernel_size) == {1} and (layer.subm or set(layer.stride) == {1})


def _kept_sites(layer: Any) -> bool:
    """Whether outputs lie on the grid of the inputs, or go back to one that is known."""
    return layer.subm or layer.inverse or _pointwise(layer)


def _unsupported(layer: Any) -> str:
    """Why a layer cannot be computed here; empty where it can."""
    if layer.transposed:
        return "it is transposed, and makes new sites"
    if not str(getattr(layer, "act_type", "None_")).endswith("None_"):
        return "it has an activation of its own"
    if layer.subm and any(size % 2 == 0 for size in layer.kernel_size):
        return f"its kernel is even, {list(layer.kernel_size)}"
    if _kept_sites(layer):
        return ""
    if set(layer.stride) == {1}:
        return "it makes new sites without a stride"
    for size, stride, padding, dilation in zip(
        layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True
    ):
        if size % 2 and stride == 1 and padding != size // 2 * dilation:
            return f"padding {list(layer.padding)} does not centre its kernel where it has no stride"
    return ""


def _from_spconv(weight: Tensor, source: str, *, squeezed: bool) -> Tensor:
    """[kernel volume, input channels, output channels]; of one offset [input channels, output channels] if squeezed."""
    if source == SPCONV_2:
        outputs, *size, inputs = weight.shape
    else:
        *size, inputs, outputs = weight.shape
    if squeezed and set(size) == {1}:
        return weight.reshape(inputs, outputs)
    if source == SPCONV_2:
        weight = weight.movedim(0, -1)
    return weight[tuple(kernel_indices(size).T)].contiguous()


def _from_minkowski(name: str, kernel: Tensor, sizes: Sizes) -> Tensor:
    if kernel.dim() == 2 or len(kernel) % 2:
        return kernel
    size = _size(name, len(kernel), sizes)
    backwards = kernel.view(*reversed(size), *kernel.shape[1:])
    axes = range(len(size))
    return backwards[tuple(kernel_indices(size).T[axis] for axis in reversed(axes))].contiguous()


def _size(name: str, volume: int, sizes: Sizes) -> tuple[int, ...]:
    given = sizes.get(name, round(volume ** (1 / DIMENSIONS)))
    size = make_ntuple(given, DIMENSIONS if isinstance(given, int) else len(given))
    if torch.Size(size).numel() != volume:
        raise ValueError(f"kernel_sizes: {name!r} has {volume} offsets, which are not {size}; give its size")
    return size


def _layers(
    state_dict: Mapping[str, Any], leaf: str, names: Collection[str] | None, dimensions: tuple[int, ...]
) -> Iterator[str]:
    """Names of the layers whose `leaf` is to be converted."""
    found = {key.rpartition(".")[0]: value for key, value in state_dict.items() if key.rpartition(".")[2] == leaf}
    if names is not None:
        _check_known("names", names, found)
    for name, value in found.items():
        if name in names if names is not None else isinstance(value, Tensor) and value.dim() in dimensions:
            yield name


def _check_known(name: str, given: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{name}: no sparse convolution is called {', '.join(map(repr, unknown))}")


def _join(name: str, last: str) -> str:
    return f"{name}.{last}" if name else last
