"""Weights that a checkpoint lacks: vLLM looks for them only where nothing is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


def refuse_missing_weights(quantization: str) -> None:
    """Have vLLM's loader raise a ValueError that names the weights which a checkpoint of this quantization lacks.

    Those of a draft model are not looked at: they change no token, and some are the target model's own.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_weights = DefaultModelLoader.load_weights

    @wraps(load_weights)
    def load_all_weights(loader: DefaultModelLoader, model: nn.Module, model_config: Any) -> None:
        if model_config.quantization != quantization or model_config.runner_type == "draft":
            return load_weights(loader, model, model_config)
        # NaN shows what was not filled, a shard of a fused parameter too; loaders overwrite padding.
        for _, numbers in _floating(model):
            numbers.fill_(torch.nan)
        load_weights(loader, model, model_config)
        lacking = [name for name, numbers in _floating(model) if bool(numbers.min().isnan())]
        if lacking:
            raise ValueError(f"{', '.join(lacking)}: the checkpoint lacks it, or a part of it, or has NaN there")

    # vLLM asks a quantization nothing between reading the files and serving.
    DefaultModelLoader.load_weights = load_all_weights  # type: ignore[method-assign]


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.is_meta:
            yield name, parameter.data
