"""For inference: batch norms, ReLUs and the sums of residual blocks become part of the convolution before them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pronghorn.kernels.sparse_convolution import Epilogue
from pronghorn.torchsparse.backbones.blocks import SparseResBlock
from pronghorn.torchsparse.conv import conv3d
from pronghorn.torchsparse.nn.activation import ReLU
from pronghorn.torchsparse.nn.convolution import SparseConvolution
from pronghorn.torchsparse.nn.norm import BatchNorm
from pronghorn.torchsparse.tensor import SparseTensor


class FusedConvolution(nn.Module):
    """A convolution with what came after it.

    Args:
        conv: the convolution.
        norm: a batch norm with running statistics, or None.
        relu: whether a ReLU follows.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, conv: SparseConvolution, norm: BatchNorm | None, relu: bool) -> None:
        super().__init__()
        self.conv, self.relu = conv, relu
        scale, shift = _line(norm)
        if conv.bias is not None:
            bias = conv.bias.detach().float()
            shift = bias if shift is None else shift + (bias if scale is None else bias * scale)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, input: SparseTensor, residual: SparseTensor | None = None) -> SparseTensor:
        """The convolution of a tensor; `residual` is added before the ReLU."""
        beside = None if residual is None else residual.feats
        conv, epilogue = self.conv, Epilogue(self.scale, self.shift, beside, self.relu)
        return conv3d(
            input, conv.kernel, conv.kernel_size, None, conv.stride, conv.padding, conv.dilation, conv.config,
            conv.transposed, conv.generative, epilogue,
        )  # fmt: skip


class FusedResBlock(nn.Module):
    """A residual block in two convolutions, and one for a shortcut that is none."""

    def __init__(self, block: SparseResBlock) -> None:
        super().__init__()
        first, last = _fused(list(block.main))
        assert isinstance(last, FusedConvolution)  # noqa: S101 - a block's own parts
        last.relu = True
        self.first, self.last = first, last
        self.shortcut = (
            block.shortcut if isinstance(block.shortcut, nn.Identity) else _fused(list(block.shortcut.children()))[0]
        )

    def forward(self, x: SparseTensor) -> SparseTensor:
        """The block of a tensor."""
        result: SparseTensor = self.last(self.first(x), self.shortcut(x))
        return result


class Fused:
    """A model in its fast form; `restore` (or the end of a `with` block) gives the old one back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._visit(model)
        if not self._replaced:
            raise ValueError(
                "model: has nothing to fuse: no sparse convolution with a batch norm or a ReLU after it that is not "
                "fused already"
            )

    def _visit(self, module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            if type(child) is SparseResBlock:
                self._replace(module, name, FusedResBlock(child))
            elif isinstance(child, nn.Sequential) and any(isinstance(part, SparseConvolution) for part in child):
                self._replace(module, name, nn.Sequential(*_fused(list(child))))
                self._visit(module.get_submodule(name))
            else:
                self._visit(child)

    def _replace(self, module: nn.Module, name: str, by: nn.Module) -> None:
        self._replaced.append((module, name, module.get_submodule(name)))
        setattr(module, name, by.eval())

    def restore(self) -> None:
        """Put the model's own modules back."""
        for module, name, own in reversed(self._replaced):
            setattr(module, name, own)
        self._replaced = []

    def __enter__(self) -> Fused:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


def fuse(model: nn.Module) -> Fused:
    """Bring a model into its fast form for inference, in place.

    In every `nn.Sequential`, and in the residual blocks of the backbones, batch norms and ReLUs that follow a
    convolution are computed by it, in float32, before its result is rounded. Their statistics are read now: a model
    that learns on must be restored first. Run it without gradients.

    Args:
        model: in evaluation mode.

    Returns:
        The fused model's handle, also a context manager.

    Raises:
        ValueError: the model is in training mode, or has nothing to fuse.

    Examples:
        >>> with ts.fuse(model.eval()), torch.no_grad():
        ...     model(x)
    """
    if any(module.training for module in model.modules() if isinstance(module, BatchNorm)):
        raise ValueError("model: is in training mode; call its eval method first")
    return Fused(model)


def _fused(parts: list[nn.Module]) -> list[nn.Module]:
    """The same layers with each convolution and what follows it as one."""
    result: list[nn.Module] = []
    while parts:
        part = parts.pop(0)
        if isinstance(part, SparseConvolution):
            norm = parts.pop(0) if parts and _has_statistics(parts[0]) else None
            relu = bool(parts) and isinstance(parts[0], ReLU)
            if relu:
                parts.pop(0)
            if norm is not None or relu:
                part = FusedConvolution(part, norm, relu)  # type: ignore[arg-type]
        result.append(part)
    return result


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm) and module.running_mean is not None


@torch.no_grad()
def _line(norm: BatchNorm | None) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift, float32 [channels], of a batch norm in evaluation mode."""
    if norm is None:
        return None, None
    assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101, PT018 - seen before
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.float(), shift.float()
