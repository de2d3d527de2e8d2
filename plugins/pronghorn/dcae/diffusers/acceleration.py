"""A stock autoencoder in its fast form: fused attention, norms, gates and shortcuts; channels last."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_dc import (
    AutoencoderDC,
    DCDownBlock2d,
    DCUpBlock2d,
    Decoder,
    EfficientViTBlock,
    Encoder,
    ResBlock,
)
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # of which synchronized ones are, too

from pronghorn.dcae.diffusers.attention import (
    attention_output,
    gated,
    normed,
    out_weight,
    qkv_weight,
    queries_keys_values,
)
from pronghorn.dcae.diffusers.convolution import convolved, fuses
from pronghorn.dcae.diffusers.graphs import GraphedForward
from pronghorn.dcae.diffusers.inference_only import InferenceOnly
from pronghorn.dcae.diffusers.inputs import check_images, whole_latents
from pronghorn.dcae.diffusers.resampling import FastDownBlock, FastStem, FastUpBlock
from pronghorn.dcae.diffusers.tiling import decode_in_tiles, encode_in_tiles
from pronghorn.kernels.channel_rms_norm import channel_rms_norm
from pronghorn.kernels.fused_convolution import fused_convolution
from pronghorn.kernels.relu_linear_attention import relu_linear_attention

ACTIVATIONS = {nn.SiLU: "silu", nn.ReLU: "relu"}


def _encode(vae: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    check_images(vae, x)
    return type(vae).encode(vae, x, *args, **kwargs)


def _decode(vae: Any, z: Tensor, *args: Any, **kwargs: Any) -> Any:
    return type(vae).decode(vae, whole_latents(vae, z), *args, **kwargs)


# Of a stock autoencoder, which checks little and whose tiles are not exact.
METHODS = {"encode": _encode, "decode": _decode, "tiled_encode": encode_in_tiles, "tiled_decode": decode_in_tiles}


class Accelerated:
    """An autoencoder in its fast form; `restore` (or the end of a `with` block) gives the old one back."""

    def __init__(self, vae: Any, channels_last: bool, cuda_graphs: bool) -> None:
        self.vae = vae
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._graphed: list[Any] = []
        self._wanted_gradients = [parameter for parameter in vae.parameters() if parameter.requires_grad]
        self._strides = {name: parameter.stride() for name, parameter in vae.named_parameters()}
        try:
            self._enter(channels_last, cuda_graphs)
        except BaseException:
            self.restore()
            raise

    def _enter(self, channels_last: bool, cuda_graphs: bool) -> None:
        vae = self.vae
        self._visit(vae)
        vae.requires_grad_(False)
        for name, ours in METHODS.items():
            setattr(vae, name, partial(ours, vae))
        if channels_last:
            vae.to(memory_format=torch.channels_last)
        for side in (vae.encoder, vae.decoder) if cuda_graphs else ():
            side.forward = GraphedForward(side)
            self._graphed.append(side)

    def _visit(self, module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            if type(child) is EfficientViTBlock:
                self._replace(module, name, FastEfficientViTBlock(child))
            elif type(child) is ResBlock:
                self._replace(module, name, FastResBlock(child))
            elif type(child) is DCDownBlock2d and child.shortcut:
                self._replace(module, name, FastDownBlock(child))
            elif type(child) is DCDownBlock2d and isinstance(module, Encoder):
                self._replace(module, name, FastStem(child))
            elif type(child) is DCUpBlock2d and child.shortcut and child.interpolation_mode == "nearest":
                self._replace(module, name, FastUpBlock(child))
            else:
                self._visit(child)
        if type(module) is Decoder and isinstance(module.norm_out, RMSNorm) and type(module.conv_act) in ACTIVATIONS:
            self._replace(module, "norm_out", _NormOut(module.norm_out, ACTIVATIONS[type(module.conv_act)]))
            self._replace(module, "conv_act", nn.Identity())

    def _replace(self, module: nn.Module, name: str, by: nn.Module) -> None:
        self._replaced.append((module, name, module.get_submodule(name)))
        setattr(module, name, by.eval())

    def restore(self) -> None:
        """Put the autoencoder's own modules back, and its weights as they lay in memory."""
        if not self._replaced:
            return
        for module, name, own in reversed(self._replaced):
            setattr(module, name, own)
        self._replaced = []
        for name in METHODS:
            vars(self.vae).pop(name, None)
        for side in self._graphed:
            del side.forward
        self._graphed = []
        for parameter in self._wanted_gradients:
            parameter.requires_grad_(True)
        for name, parameter in self.vae.named_parameters():
            stride = self._strides[name]
            if parameter.stride() != stride:
                lying = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=parameter.device)
                parameter.data = lying.copy_(parameter.data)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


def accelerate_dcae(vae: AutoencoderDC, *, channels_last: bool = True, cuda_graphs: bool = False) -> Accelerated:
    """Bring an autoencoder into its fast form for inference, in place; in a pipeline, too.

    Queries, keys and values become one convolution, attention and the gated depthwise convolution one kernel each, a
    norm one kernel together with the sum or activation after it, a batch norm part of the convolution before it, and a
    bias one pass with what follows it. On Hopper GPUs, in bfloat16, a convolution of a residual block is one kernel
    with all that follows it, where it fills the GPU.
    Where grids are halved or doubled, what follows the convolution is one kernel.
    After `vae.enable_tiling()`, tiles are exact and of any size.
    Names of weights stay, so it can be saved as it is; weights are read now, and what is loaded later is not seen.
    It cannot be trained until it is restored, and its parameters want no gradients; an image or a latent may.

    Args:
        vae: diffusers' `AutoencoderDC`, or ours, in evaluation mode and in the dtype that it will run in.
        channels_last: also let a pixel's channels lie side by side, as convolutions on a GPU want them.
        cuda_graphs: also record the encoder and the decoder, for each of the last shapes, and replay them: for few and
            small images, whose layers are shorter than their launches. Each recording keeps its memory.

    Returns:
        The handle of the autoencoder, also a context manager.

    Raises:
        TypeError: no `AutoencoderDC`. ValueError: it is in training mode, or fast already, or its weights are offloaded
            or cast layer by layer; it is then as it was.

    Examples:
        >>> with accelerate_dcae(pipe.vae):
        ...     image = pipe(prompt).images[0]
    """
    if not isinstance(vae, AutoencoderDC):
        raise TypeError(f"vae: got {type(vae).__name__}, wanted an AutoencoderDC")
    _check(vae)
    return Accelerated(vae, channels_last, cuda_graphs)


def _check(vae: AutoencoderDC) -> None:
    """Refuse what cannot be made fast, before anything is changed."""
    inner = [module for module in vae.modules() if module is not vae]
    if any(isinstance(module, InferenceOnly) for module in inner):
        raise ValueError("vae: is in its fast form already")
    if vae.training or any(module.training for module in inner if isinstance(module, _BatchNorm)):
        raise ValueError("vae: is in training mode; call its eval method first")
    away = [name for name, tensor in vae.state_dict().items() if tensor.is_meta]
    if away:
        raise ValueError(
            f"vae: {len(away)} of its weights are on the meta device ({away[0]}), as `enable_sequential_cpu_offload` "
            "leaves them; wanted weights that are there: offload whole models (`enable_model_cpu_offload`)"
        )
    hooked = [type(module).__name__ for module in inner if {"_hf_hook", "_diffusers_hook"} & vars(module).keys()]
    if hooked:
        raise ValueError(
            f"vae: hooks bring in weights of {len(hooked)} of its layers ({hooked[0]}), as group offloading and "
            "layerwise casting do, and the fast form goes past them; wanted none but on the whole autoencoder"
        )


class FastResBlock(InferenceOnly):
    """A residual block whose norm is one with the sum after it, or folded into the convolution before it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        self.conv1, self.nonlinearity, self.conv2, self.norm = block.conv1, block.nonlinearity, block.conv2, block.norm
        self.activation = ACTIVATIONS.get(type(block.nonlinearity))
        weight, bias = _folded(block.conv2, block.norm) if isinstance(block.norm, _BatchNorm) else (None, None)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block of features [batch, channels, height, width]."""
        self.refuse_gradients()
        inner: Any = self._modules
        y = convolved(inner["conv1"], x, activation=self.activation)
        y = y if self.activation else inner["nonlinearity"](y)
        derived = self._buffers
        if derived["weight"] is not None:
            return convolved(inner["conv2"], y, weight=derived["weight"], bias=derived["bias"], residual=x)
        conv, norm = inner["conv2"], inner["norm"]
        if isinstance(norm, RMSNorm) and fuses(conv, y, conv.weight, norm=norm):
            return fused_convolution(
                y, conv.weight, conv.bias, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, residual=x
            )
        return normed(convolved(conv, y), norm, x)


class FastEfficientViTBlock(InferenceOnly):
    """Linear attention and a gated convolution, each with its norm and sum in one kernel."""

    qkv: Tensor
    out: Tensor

    def __init__(self, block: EfficientViTBlock) -> None:
        super().__init__()
        self.attn, self.conv_out = block.attn, block.conv_out
        self.register_buffer("qkv", qkv_weight(self.attn).detach(), persistent=False)
        self.register_buffer("out", out_weight(self.attn).detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block of features [batch, channels, height, width]."""
        self.refuse_gradients()
        inner: Any = self._modules
        attn = inner["attn"]
        q, k, v = queries_keys_values(attn, x, self.qkv)
        x = attention_output(attn, relu_linear_attention(q, k, v, eps=attn.eps), x, self.out)
        return gated(inner["conv_out"], x)


class _NormOut(InferenceOnly):
    """The decoder's last norm with the activation after it; the decoder hands it channels last."""

    def __init__(self, norm: RMSNorm, activation: str) -> None:
        super().__init__()
        self.weight: Any = norm.weight
        self.bias = norm.bias
        self.eps, self.activation = norm.eps, activation

    def forward(self, x: Tensor) -> Tensor:
        self.refuse_gradients()
        y: Tensor = channel_rms_norm(x.movedim(-1, 1), self.weight, self.bias, eps=self.eps, activation=self.activation)
        return y.movedim(1, -1)


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution and the batch norm after it."""
    assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101, PT018 - a decoder's have them
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    weight = conv.weight.double() * scale[:, None, None, None]
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)
