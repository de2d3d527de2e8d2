"""AWQ in transformers: `from_pretrained` quantizes full-precision models and loads quantized checkpoints."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from pronghorn.awq.config import METHOD, PUBLISHED_METHOD, AwqConfig
from pronghorn.awq.layers import AwqLinear, ScaledActivation
from pronghorn.awq.quantize import check_linear, decoder_linears, quantize_model
from pronghorn.kernels.dequantize_weight.layouts import unpack_scales

if TYPE_CHECKING:
    from pronghorn.transformers.quantizer import StoredTensor

logger = logging.getLogger(__name__)


def register() -> None:
    """Register `quant_method: pronghorn_awq`, and claim "awq" where transformers' own cannot load it.

    transformers needs gptqmodel for AWQ checkpoints; where that is installed, they stay with it until `install()`.
    """
    # Importing the integration registers all methods, this one included: not while this room is being imported.
    from pronghorn.transformers.quantizer import register_method

    register_method(METHOD, AwqConfig, AwqQuantizer)
    if importlib.util.find_spec("gptqmodel") is None:
        install()


def install() -> None:
    """Load checkpoints with `quant_method: awq` by Pronghorn, whatever else is installed."""
    from pronghorn.transformers.quantizer import register_method

    register_method(METHOD, AwqConfig, AwqQuantizer)
    register_method(PUBLISHED_METHOD, AwqConfig, AwqQuantizer, claim=True)


class AwqQuantizer(HfQuantizer):
    """Quantizes a model after its weights are loaded, or prepares it for weights that are packed already."""

    quantization_config: AwqConfig  # type: ignore[assignment]  # it need not be a QuantizationConfigMixin

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._stored: dict[str, StoredTensor] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from pronghorn.files.sealed import check_seal
        from pronghorn.transformers.quantizer import check_shapes, check_stored, stored_tensors

        config = self.quantization_config
        files = kwargs.get("checkpoint_files")
        self._stored = stored_tensors(files)
        # Older checkpoints have their configuration in a side file, which transformers does not read; users give it.
        self.pre_quantized |= any(name.endswith(".qweight") for name in self._stored)
        if not self.pre_quantized:
            return
        for folder in {Path(path).parent for path in files or ()}:
            check_seal(folder)
        if "scaled_zeros" in {name.rsplit(".", 1)[-1] for name in self._stored} and config.layout == "gemv_fast":
            config.version = "llm-awq"
        with torch.device("meta"):
            for name, linear in decoder_linears(model, config):
                packed = AwqLinear(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    config=config,
                    dtype=linear.weight.dtype,
                    name=name,
                )
                check_stored(name, packed.state_dict(), self._stored)
                model.set_submodule(name, packed)
            self._restore_scaled_activations(model)
        check_shapes(model, self._stored)

    def _restore_scaled_activations(self, model: PreTrainedModel) -> None:
        modules = dict(model.named_modules())
        for key, stored in self._stored.items():
            name, _, leaf = key.rpartition(".")
            module = modules.get(name)
            if leaf == "scales" and module is not None and not list(module.parameters()) and not list(module.buffers()):
                model.set_submodule(name, ScaledActivation(module, torch.empty(stored.shape, dtype=model.dtype)))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            self._check_checkpoint(model)
        else:
            quantize_pretrained(model, self.quantization_config)
        return model

    def _check_checkpoint(self, model: PreTrainedModel) -> None:
        from pronghorn.transformers.quantizer import check_loaded

        packed = {name: module for name, module in model.named_modules() if isinstance(module, AwqLinear)}
        stored = [name for name in self._stored if name.endswith(".qweight")]
        if len(stored) > len(packed):
            known = {f"{name}.qweight" for name in packed}
            extra = next((name for name in stored if name not in known), stored[0])
            raise ValueError(
                f"{extra}: the checkpoint has it quantized, the model has no such linear to quantize; "
                "is modules_to_not_convert right?"
            )
        check_loaded(model)
        for name, module in packed.items():
            check_packed(name, module)

    def get_weight_conversions(self) -> list[Any]:
        """Mixtral's published names of an expert's linears, both ways."""
        from transformers.core_model_loading import WeightRenaming

        if not any(".experts.0.w1." in name for name in self._stored):
            return []
        names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        return [
            WeightRenaming(rf"\.experts\.(\d+)\.{theirs}\.", rf".experts.\1.{ours}.") for theirs, ours in names.items()
        ]

    def is_serializable(self) -> bool:
        """Packed weights are saved as they are."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
        """The model's own tensors.

        Raises:
            ValueError: the model is fused; that form is for running only.
        """
        if hasattr(model, "awq_fused"):
            raise ValueError("a fused model is not saved; model.awq_fused.restore() gives the checkpoint's form back")
        return super().get_state_dict_and_metadata(model)

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: gradients pass through the packed linears."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The packed matmul is one operation to `torch.compile`."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a configuration's dtype may be its name
        for name, module in list(model.named_modules()):
            if isinstance(module, AwqLinear):
                model.set_submodule(name, dequantized_linear(module, dtype))
        return model


def quantize_pretrained(model: PreTrainedModel, config: AwqConfig, *, tokenizer: Any = None) -> None:
    """Search (or load a search, or only round), scale, clip and pack a full-precision model, in place.

    Args:
        model: the model; without `tokenizer`, its own is read from where it was loaded from.
        config: what to do.
        tokenizer: for calibration texts.

    Raises:
        ValueError: bad calibration data, weights or shapes; the linears are checked before the search.
    """
    from pronghorn.awq.search import AwqSearch, SearchResult
    from pronghorn.transformers.calibration_data import calibration_samples
    from pronghorn.transformers.quantizer import tokenizer_of

    for name, linear in decoder_linears(model, config):
        check_linear(name, linear, config)
    if config.search_result is not None:
        SearchResult.load(config.search_result).apply(model)
    elif config.method == "awq":
        samples = calibration_samples(
            config.calibration,
            tokenizer or tokenizer_of(model),
            n_samples=config.n_samples,
            seq_len=config.seq_len,
            vocab_size=model.config.get_text_config().vocab_size,
        )
        state_dir = None if config.state_dir is None else Path(config.state_dir)
        AwqSearch(config, state_dir=state_dir).run(model, samples).apply(model)
    quantize_model(model, config)


def mark_quantized(model: Any, config: AwqConfig) -> None:
    """Make transformers see a model that was quantized in memory as one that was loaded so: it can be saved."""
    model.hf_quantizer = AwqQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.quantization_method = config.quant_method
    model.is_quantized = True


def check_packed(name: str, module: AwqLinear) -> None:
    """Raise ValueError if a packed linear's numbers cannot be right."""
    scales = module.scales
    if not bool(scales.isfinite().all()) or bool((scales < 0).any()):
        raise ValueError(f"{name}.scales: holds NaN, Inf or negative numbers")
    groups = module.in_features // module.group_size
    if not bool((unpack_scales(scales, layout=module.layout, groups=groups) > 0).all()):  # but in what is padded
        raise ValueError(f"{name}.scales: holds zeros")
    if module.bias is not None and not bool(module.bias.isfinite().all()):
        raise ValueError(f"{name}.bias: holds NaN or Inf")
    zeros = module.packed_tensors().get("qzeros")
    if zeros is None:
        return
    if zeros.is_floating_point():
        # -scale * zero: a zero point beyond the codes shows as a quotient beyond 2^bits - 1.
        limit = scales.float() * (2**module.bits - 1) * 1.01
        if not bool(zeros.isfinite().all()) or bool((-zeros.float() > limit).any()) or bool((zeros > 0).any()):
            raise ValueError(f"{name}.{module.zeros_name}: outside -scale * 0 … -scale * {2**module.bits - 1}, or NaN")
    elif zeros.dtype == torch.uint8 and zeros.numel() and int(zeros.max()) >> module.bits:
        raise ValueError(f"{name}.{module.zeros_name}: a zero point above {2**module.bits - 1}")


def dequantized_linear(module: AwqLinear, dtype: torch.dtype | None = None) -> nn.Linear:
    """A plain linear with the same weight."""
    weight = module.dequantize(dtype)
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.to(weight.dtype), requires_grad=False)
    return linear
