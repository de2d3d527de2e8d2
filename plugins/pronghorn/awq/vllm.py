"""AWQ in vLLM: `--quantization pronghorn_awq`, and checkpoints in layouts that vLLM cannot read.

Checkpoint tensors are brought into the "natural" layout one by one as they are loaded, and vLLM shards them in that
form, where a code's row is its input channel and its column its output: one mechanism for all layouts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter, PackedvLLMParameter

from pronghorn.awq.config import METHOD, PUBLISHED_METHOD, AwqConfig
from pronghorn.awq.layers import rounding_dtype
from pronghorn.awq.selection import is_router
from pronghorn.kernels.dequantize_weight import dequantize_weight
from pronghorn.kernels.dequantize_weight.layouts import (
    pack,
    pack_codes,
    unpack_codes,
    unpack_scales,
    unpack_zeros,
    zeros_of_scaled,
)
from pronghorn.kernels.group_fake_quantize import group_quantize
from pronghorn.kernels.w4a16_matmul import w4a16_matmul

logger = logging.getLogger(__name__)

ONLINE_GROUP_SIZES = (128, 64, 32)
BITS_KEYS = ("bits", "w_bit")
VERSION_KEYS = ("version", "format", "checkpoint_format")


def register() -> None:
    """Make `pronghorn_awq` known to vLLM; once more is a no-op."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    try:
        known = get_quantization_config(METHOD)
    except ValueError:
        known = None
    if known is not VllmAwqConfig:
        register_quantization_config(METHOD)(VllmAwqConfig)


class VllmAwqConfig(QuantizationConfig):
    """vLLM's view of a checkpoint's `AwqConfig`; without one, weights are rounded to nearest while they are loaded."""

    def __init__(self, config: AwqConfig | None = None) -> None:
        super().__init__()
        self.online = config is None
        self.config = config or AwqConfig(version="natural")
        self.skipped = list(self.config.modules_to_not_convert or ())
        if self.online:
            logger.warning("the checkpoint is not quantized: its weights are rounded to the nearest of 4 bits")

    def __repr__(self) -> str:
        return f"VllmAwqConfig({self.config})"

    @classmethod
    def get_name(cls) -> Any:
        """What `--quantization` calls it."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere, as our Triton kernels."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: vLLM would insist on a side file where a model has no quantization configuration."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmAwqConfig:
        """Read the checkpoint's quantization configuration.

        Raises:
            ValueError: it does not say how many bits or which version, or what it says is not accepted.
        """
        for name, keys in (("bits", BITS_KEYS), ("version", VERSION_KEYS)):
            if not any(key in config for key in keys):
                raise ValueError(f"{name}: the checkpoint's quantization configuration lacks it; it has {config}")
        return cls(AwqConfig.from_dict(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Claim our own checkpoints, AWQ ones when the user names us, and AWQ ones that vLLM cannot read."""
        method = hf_quant_cfg.get("quant_method")
        if method == METHOD or (method == PUBLISHED_METHOD and user_quant == METHOD):
            return METHOD
        if method != PUBLISHED_METHOD or user_quant is not None:
            return None
        try:
            config = AwqConfig.from_dict(hf_quant_cfg)
        except (ValueError, TypeError) as error:  # vLLM may know what to do with it
            logger.warning("an AWQ checkpoint is left to vLLM, %s cannot read it: %s", METHOD, error)
            return None
        return METHOD if config.layout != "gemm" or not config.zero_point else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Skip what the checkpoint has in full precision, whether or not its configuration says so: vision towers."""
        if self.online:
            return
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        stored = get_safetensors_params_metadata(model_name, revision=revision)
        whole = {name.removesuffix(".weight") for name in stored if name.endswith(".weight")}
        packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
        self.skipped += sorted(whole - packed)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Bring the names of skipped modules from transformers' structure of the model to vLLM's."""
        self.skipped = hf_to_vllm_mapper.apply_list(self.skipped)

    def get_quant_method(self, layer: Any, prefix: str) -> LinearMethodBase | None:
        """The method of a linear; other layers stay as they are.

        Raises:
            ValueError: experts, or a fused linear of which only parts are quantized.
        """
        if isinstance(layer, LinearBase):
            if self._is_skipped(prefix):
                return UnquantizedLinearMethod()
            return OnlineAwqLinearMethod(self.config) if self.online else AwqLinearMethod(self.config)
        if any("Experts" in kind.__name__ or kind.__name__ == "FusedMoE" for kind in type(layer).__mro__):
            raise ValueError(
                f"{prefix}: {METHOD} does not run mixtures of experts in vLLM yet; 4-bit checkpoints of version 'gemm' "
                "run with vLLM's own --quantization awq, all others with transformers"
            )
        return None

    def _is_skipped(self, prefix: str) -> bool:
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        skipped = [self._names(f"{parent}.{part}") for part in parts]
        if any(skipped) and not all(skipped):
            raise ValueError(
                f"{prefix}: modules_to_not_convert names only some of {', '.join(parts)}, which vLLM runs as one linear"
            )
        return all(skipped)

    def _names(self, name: str) -> bool:
        return is_router(name) or any(f".{entry}." in f".{name}." for entry in self.skipped)


@register_weight_loader_v2_supported_method
class AwqLinearMethod(LinearMethodBase):
    """A linear with packed weights from a checkpoint."""

    def __init__(self, config: AwqConfig) -> None:
        self.config = config

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Parameters in the natural layout, whose loader takes the checkpoint's.

        Raises:
            ValueError: a shard of the input channels is not a whole number of groups.
        """
        bits = self.config.bits
        group_size = self.config.check_in_features(input_size, "a linear")
        columns = input_size_per_partition
        if columns % group_size or columns * bits % 32:
            raise ValueError(
                f"tensor parallelism gives a rank {columns} of {input_size} input channels, which is not a whole "
                f"number of groups of {group_size}; use fewer ranks"
            )
        layer.awq_in_features, layer.awq_group_size = columns, group_size
        layer.awq_out_features = sum(output_partition_sizes)
        groups, outputs = columns // group_size, layer.awq_out_features
        loader = extra["weight_loader"]
        full_groups = input_size // group_size
        layer.register_parameter(
            "qweight",
            PackedvLLMParameter(
                data=torch.empty(columns * bits // 32, outputs, dtype=torch.int32),
                input_dim=0,
                output_dim=1,
                packed_dim=0,
                packed_factor=Fraction(32, bits),
                weight_loader=_converting(loader, lambda tensor: self._natural_codes(tensor, input_size)),
            ),
        )
        layer.register_parameter(
            "scales",
            GroupQuantScaleParameter(
                data=torch.empty(groups, outputs, dtype=params_dtype),
                input_dim=0,
                output_dim=1,
                weight_loader=_converting(loader, lambda tensor: self._natural_scales(tensor, full_groups)),
            ),
        )
        if self.config.layout == "marlin":
            return
        scaled = self.config.layout == "gemv_fast"
        layer.register_parameter(
            "scaled_zeros" if self.config.version == "llm-awq" else "qzeros",
            GroupQuantScaleParameter(
                data=torch.empty(groups, outputs, dtype=params_dtype if scaled else torch.uint8),
                input_dim=0,
                output_dim=1,
                weight_loader=_converting(loader, lambda tensor: self._natural_zeros(tensor, full_groups)),
            ),
        )

    def _natural_codes(self, qweight: Tensor, columns: int) -> Tensor:
        layout, bits = self.config.layout, self.config.bits
        if layout in ("natural", "exllama"):  # at 4 bits their words are the same
            return qweight
        per_word = torch.iinfo(qweight.dtype).bits // bits
        rows = qweight.numel() * per_word // columns
        codes = unpack_codes(qweight, layout=layout, bits=bits, out_features=rows, in_features=columns)
        return pack_codes(codes, layout="natural", bits=bits)

    def _natural_scales(self, scales: Tensor, groups: int) -> Tensor:
        return unpack_scales(scales, layout=self.config.layout, groups=groups).T

    def _natural_zeros(self, zeros: Tensor, groups: int) -> Tensor:
        if self.config.layout == "gemv_fast":
            return zeros[:groups]
        rows = zeros.numel() * 8 // groups if self.config.layout != "gemv" else zeros.shape[0]
        return unpack_zeros(zeros, layout=self.config.layout, out_features=rows, groups=groups).T

    def process_weights_after_loading(self, layer: Any) -> None:
        """Zero points as integers, whatever the checkpoint had."""
        scales = layer.scales.data
        if self.config.layout == "marlin":
            zeros = torch.full_like(scales, 1 << (self.config.bits - 1), dtype=torch.uint8)
        elif self.config.layout == "gemv_fast":
            name = "scaled_zeros" if self.config.version == "llm-awq" else "qzeros"
            zeros = zeros_of_scaled(scales, getattr(layer, name).data)
            delattr(layer, name)
        else:
            zeros = layer.qzeros.data
        _set_packed(layer, layer.qweight.data, scales, zeros)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] to [..., N]."""
        return w4a16_matmul(
            x,
            layer.qweight,
            layer.scales,
            layer.qzeros,
            layout="natural",
            bits=self.config.bits,
            group_size=layer.awq_group_size,
            out_features=layer.awq_out_features,
            bias=bias,
        )

    def dequantize_weight(self, layer: Any) -> Tensor:
        """This rank's weight [N, K]; vLLM asks for it when it quantizes online on top."""
        return dequantize_weight(
            layer.qweight,
            layer.scales,
            layer.qzeros,
            layout="natural",
            bits=self.config.bits,
            group_size=layer.awq_group_size,
            out_features=layer.awq_out_features,
            in_features=layer.awq_in_features,
        )


@register_weight_loader_v2_supported_method
class OnlineAwqLinearMethod(AwqLinearMethod):
    """A linear whose full-precision weight is rounded to nearest once it is loaded."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """The full-precision weight.

        Raises:
            ValueError: no usual group size divides the input channels of a rank.
        """
        fitting = [size for size in ONLINE_GROUP_SIZES if input_size_per_partition % size == 0]
        if not fitting:
            raise ValueError(
                f"{input_size_per_partition} input channels are not a multiple of {ONLINE_GROUP_SIZES[-1]}"
            )
        layer.awq_in_features, layer.awq_group_size = input_size_per_partition, fitting[0]
        layer.awq_out_features = sum(output_partition_sizes)
        weight = ModelWeightParameter(
            data=torch.empty(layer.awq_out_features, input_size_per_partition, dtype=params_dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=extra["weight_loader"],
        )
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Round and pack."""
        how = {"bits": self.config.bits, "group_size": layer.awq_group_size}
        weight = layer.weight.data
        quantized = group_quantize(weight.to(rounding_dtype(weight.dtype)), **how)
        packed = pack(*quantized, layout="natural", **how)
        del layer.weight
        _set_packed(layer, packed["qweight"], packed["scales"].to(weight.dtype), packed["qzeros"])


def _converting(loader: Callable[..., None], convert: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def load(parameter: nn.Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
        loader(parameter, convert(loaded_weight), *args, **kwargs)

    return load


def _set_packed(layer: Any, qweight: Tensor, scales: Tensor, qzeros: Tensor) -> None:
    for name, tensor in (("qweight", qweight), ("scales", scales), ("qzeros", qzeros)):
        setattr(layer, name, nn.Parameter(tensor.contiguous(), requires_grad=False))
