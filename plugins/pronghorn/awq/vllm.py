"""AWQ in vLLM: `--quantization pronghorn_awq`, and checkpoints in layouts that vLLM cannot read.

Checkpoint tensors are brought into the "natural" layout one by one as they are loaded, and vLLM shards them in that
form, where a code's row is its input channel and its column its output: one mechanism for all layouts. Once loaded,
they go into the layout that the device multiplies fastest.
"""

from __future__ import annotations

import logging
import math
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
    get_layout,
    pack,
    pack_codes,
    repack,
    unpack_codes,
    unpack_scales,
    unpack_zeros,
    zeros_of_scaled,
)
from pronghorn.kernels.group_fake_quantize import group_quantize
from pronghorn.kernels.w4a16_matmul import preferred_layout, w4a16_matmul
from pronghorn.vllm.batch_invariance import refuse_batch_invariance
from pronghorn.vllm.missing_weights import refuse_missing_weights

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
        refuse_missing_weights(METHOD)


class VllmAwqConfig(QuantizationConfig):
    """vLLM's view of a checkpoint's `AwqConfig`; without one, weights are rounded to nearest while they are loaded.

    Raises:
        ValueError: vLLM is to be batch-invariant.
    """

    def __init__(self, config: AwqConfig | None = None) -> None:
        super().__init__()
        refuse_batch_invariance(METHOD)
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

        from pronghorn.files.sealed import check_seal

        check_seal(model_name)  # of a folder; what came from the Hub has no seal beside it

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
        layer.awq_loaded = {}  # which shards of each tensor the checkpoint had
        groups, outputs = columns // group_size, layer.awq_out_features

        def loader(name: str, stored_as: str) -> Callable[..., None]:
            return self._converting(layer, name, stored_as, input_size, extra["weight_loader"])

        layer.register_parameter(
            "qweight",
            PackedvLLMParameter(
                data=torch.empty(columns * bits // 32, outputs, dtype=torch.int32),
                input_dim=0,
                output_dim=1,
                packed_dim=0,
                packed_factor=Fraction(32, bits),
                weight_loader=loader("qweight", "qweight"),
            ),
        )
        layer.register_parameter(
            "scales",
            GroupQuantScaleParameter(
                data=torch.full((groups, outputs), torch.nan, dtype=params_dtype),
                input_dim=0,
                output_dim=1,
                weight_loader=loader("scales", "scales"),
            ),
        )
        if self.config.layout == "marlin":
            return
        scaled = self.config.layout == "gemv_fast"
        stored_as = "scaled_zeros" if self.config.version == "llm-awq" else "qzeros"
        layer.register_parameter(
            stored_as,
            GroupQuantScaleParameter(
                # Made-up weights, for measurements, leave integers as they are.
                data=torch.full((groups, outputs), 1 << (bits - 1), dtype=params_dtype if scaled else torch.uint8),
                input_dim=0,
                output_dim=1,
                weight_loader=loader("qzeros", stored_as),
            ),
        )

    def _converting(
        self, layer: Any, name: str, stored_as: str, columns: int, loader: Callable[..., None]
    ) -> Callable[..., None]:
        """vLLM's loader of a parameter, given the checkpoint's whole tensor in the natural layout."""

        def load(parameter: nn.Parameter, loaded_weight: Tensor, *shard: Any, **options: Any) -> None:
            if parameter.is_cuda:  # rearranging bits takes minutes on a CPU, for a large model
                loaded_weight = loaded_weight.to(parameter.device)
            try:
                natural = self._natural(name, loaded_weight, columns)
            except ValueError as error:
                raise ValueError(f"{_name_of(layer)}.{stored_as}: {error}") from error
            loader(parameter, natural, *shard, **options)
            layer.awq_loaded.setdefault(stored_as, set()).add((*shard, *options.values()))

        return load

    def _natural(self, name: str, tensor: Tensor, columns: int) -> Tensor:
        """A whole tensor of the checkpoint in the natural layout; its second dimension is the output's."""
        layout, bits = self.config.layout, self.config.bits
        group_size = columns if self.config.group_size == -1 else self.config.group_size
        groups = columns // group_size
        how = {"in_features": columns, "group_size": group_size, "bits": bits}
        # All shapes grow with the outputs; 64 is a multiple that every layout takes.
        rows = tensor.numel() * 64 // math.prod(get_layout(layout).shapes(64, **how)[name][0])
        shape, dtype = get_layout(layout).shapes(rows, **how)[name]
        if tuple(tensor.shape) != shape or (tensor.dtype != dtype if dtype else not tensor.is_floating_point()):
            raise ValueError(
                f"the checkpoint has {tensor.dtype} {tuple(tensor.shape)}, which is not layout {layout!r} with "
                f"{bits} bits and group_size {self.config.group_size} for {columns} input channels"
            )
        if name == "scales":
            return unpack_scales(tensor, layout=layout, groups=groups).T
        if name == "qzeros":
            if layout == "gemv_fast":
                return tensor[:groups]
            return unpack_zeros(tensor, layout=layout, out_features=rows, groups=groups).T
        if layout in ("natural", "exllama"):  # at 4 bits their words are the same; exllama's are packed faster
            return tensor
        codes = unpack_codes(tensor, layout=layout, bits=bits, out_features=rows, in_features=columns)
        return pack_codes(codes, layout="exllama", bits=bits)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Zero points as integers, whatever the checkpoint had.

        Raises:
            ValueError: the checkpoint lacks a tensor or a shard of it, or its numbers cannot be right.
        """
        scales = layer.scales.data
        self._check_loaded(layer, scales)
        if self.config.layout == "marlin":
            zeros = torch.full_like(scales, 1 << (self.config.bits - 1), dtype=torch.uint8)
        elif self.config.layout == "gemv_fast":
            name = "scaled_zeros" if self.config.version == "llm-awq" else "qzeros"
            zeros = zeros_of_scaled(scales, getattr(layer, name).data)
            delattr(layer, name)
        else:
            zeros = layer.qzeros.data
        if layer.awq_loaded and int(zeros.max()) >> self.config.bits:
            raise ValueError(f"{_name_of(layer)}: a zero point above {2**self.config.bits - 1}")
        self._set_packed(layer, layer.qweight.data, scales, zeros)

    def _check_loaded(self, layer: Any, scales: Tensor) -> None:
        # Integers cannot start as NaN to show what was filled, as scales and biases do.
        wanted = {name for name, _ in layer.named_parameters(recurse=False)} - {"bias"}
        shards = set().union(*layer.awq_loaded.values())
        if layer.awq_loaded:  # weights may also be made up, for measurements
            lacking = sorted(name for name in wanted if layer.awq_loaded.get(name, set()) != shards)
            if lacking:
                raise ValueError(f"{_name_of(layer)}.{lacking[0]}: the checkpoint lacks it, or a part of it")
            if bool((scales <= 0).any()):
                raise ValueError(f"{_name_of(layer)}.scales: holds zeros or negative numbers")
        if not bool(scales.isfinite().all()):
            raise ValueError(f"{_name_of(layer)}.scales: the checkpoint lacks them, or they hold NaN or Inf")

    def _set_packed(self, layer: Any, qweight: Tensor, scales: Tensor, qzeros: Tensor) -> None:
        """Take natural tensors, in the layout that is multiplied fastest here."""
        shape: dict[str, Any] = {
            "bits": self.config.bits,
            "group_size": layer.awq_group_size,
            "out_features": layer.awq_out_features,
            "in_features": layer.awq_in_features,
        }
        tensors = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
        layer.awq_layout = preferred_layout("natural", **shape, dtype=scales.dtype, device=scales.device)
        if layer.awq_layout != "natural":
            tensors = repack(tensors, "natural", layer.awq_layout, **shape)
        for name, tensor in tensors.items():
            setattr(layer, name, nn.Parameter(tensor.contiguous(), requires_grad=False))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] to [..., N]."""
        return w4a16_matmul(
            x,
            layer.qweight,
            layer.scales,
            layer.qzeros,
            layout=layer.awq_layout,
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
            layout=layer.awq_layout,
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
        self._set_packed(layer, packed["qweight"], packed["scales"].to(weight.dtype), packed["qzeros"])


def _name_of(layer: Any) -> str:
    return str(getattr(layer, "prefix", type(layer).__name__))
