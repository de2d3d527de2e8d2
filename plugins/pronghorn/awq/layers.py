"""Modules of a quantized model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.awq.config import AwqConfig
from pronghorn.kernels.dequantize_weight import dequantize_weight
from pronghorn.kernels.dequantize_weight.layouts import LAYOUTS, pack, unpack
from pronghorn.kernels.group_fake_quantize import group_quantize
from pronghorn.kernels.w4a16_matmul import w4a16_matmul


class AwqLinear(nn.Module):
    """A linear whose weight lies packed in a checkpoint's own layout: its buffers are the checkpoint's tensors.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        config: bits, group size and version.
        dtype: of scales and bias, fp16, bf16 or fp32.
        device: of the buffers.
        name: the module's name, for errors.

    Raises:
        ValueError: the shape does not fit the layout or the group size.
    """

    qweight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        config: AwqConfig,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        name: str = "this linear",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = config.bits
        self.group_size = config.check_in_features(in_features, name)
        self.layout = config.layout
        # llm-awq calls the same tensor by what it holds.
        self.zeros_name = "scaled_zeros" if config.version == "llm-awq" else "qzeros"
        try:
            shapes = LAYOUTS[self.layout].shapes(out_features, in_features, self.group_size, self.bits)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        for key, (shape, fixed) in shapes.items():
            stored = self.zeros_name if key == "qzeros" else key
            self.register_buffer(stored, torch.zeros(shape, dtype=fixed or dtype, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: AwqConfig, *, dtype: torch.dtype | None = None, name: str = "this linear"
    ) -> AwqLinear:
        """Quantize a linear, rounding to nearest in `dtype`.

        `dtype` is the linear's own by default, and fp16 for an fp32 linear, as published checkpoints are made: scales
        are then fp16 numbers, stored in the model's dtype.

        Raises:
            ValueError: the weight holds NaN or Inf (also after the cast), or the shape does not fit.
        """
        weight = linear.weight.detach().to(dtype or rounding_dtype(linear.weight.dtype))
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name}.weight: holds NaN or Inf in {weight.dtype}")
        packed = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            config=config,
            dtype=linear.weight.dtype,
            device=weight.device,
            name=name,
        )
        codes, scales, zeros = group_quantize(
            weight, bits=config.bits, group_size=packed.group_size, symmetric=not config.zero_point
        )
        tensors = pack(codes, scales, zeros, layout=packed.layout, bits=packed.bits, group_size=packed.group_size)
        packed.load_packed(tensors)
        if linear.bias is not None:
            packed.bias = linear.bias.detach().clone()
        return packed

    def load_packed(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over packed tensors named as `LAYOUTS` names them."""
        for key, tensor in tensors.items():
            getattr(self, self.zeros_name if key == "qzeros" else key).copy_(tensor)

    def packed_tensors(self) -> dict[str, Tensor]:
        """The packed tensors, named as `LAYOUTS` names them."""
        names = {key: self.zeros_name if key == "qzeros" else key for key in LAYOUTS[self.layout].tensors}
        return {key: getattr(self, name) for key, name in names.items()}

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [N, K], scales [N, K/g] and zero points uint8 [N, K/g]."""
        return unpack(
            self.packed_tensors(),
            layout=self.layout,
            bits=self.bits,
            group_size=self.group_size,
            out_features=self.out_features,
            in_features=self.in_features,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K]."""
        return dequantize_weight(
            qzeros=self.packed_tensors().get("qzeros"),
            qweight=self.qweight,
            scales=self.scales,
            layout=self.layout,
            bits=self.bits,
            group_size=self.group_size,
            out_features=self.out_features,
            in_features=self.in_features,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], in the dtype of `x`."""
        return w4a16_matmul(
            x,
            self.qweight,
            self.scales,
            self.packed_tensors().get("qzeros"),
            layout=self.layout,
            bits=self.bits,
            group_size=self.group_size,
            out_features=self.out_features,
            bias=self.bias,
        )

    def extra_repr(self) -> str:
        """Shape and format."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, layout={self.layout!r}"
        )


def rounding_dtype(dtype: torch.dtype) -> torch.dtype:
    """What weights of a dtype are rounded in: their own, and fp16 for fp32, as published checkpoints are made."""
    return torch.float16 if dtype == torch.float32 else dtype


class ScaledActivation(nn.Module):
    """y = act(x) / scales: where an activation feeds a linear directly, it takes the linear's scale."""

    def __init__(self, act: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act = act
        self.scales = nn.Parameter(scales.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """[..., K] to [..., K]."""
        y = self.act(x, *args)
        return y / self.scales.to(y)
