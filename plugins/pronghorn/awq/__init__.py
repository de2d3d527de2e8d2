"""AWQ: activation-aware weight quantization to 4 (or 2, 3, 8) bits, for whoever runs a language model on one GPU.

Weights shrink to a quarter without training: a few thousand tokens of text tell which input channels matter, those are
scaled up before rounding, and the scale moves into the operation before (Lin et al., arXiv 2306.00978).

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=pronghorn.awq.AwqConfig(bits=4))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.awq.config import AwqConfig
    from pronghorn.awq.convert import convert_checkpoint
    from pronghorn.awq.fused import fuse
    from pronghorn.awq.layers import AwqLinear
    from pronghorn.awq.peft import prepare_lora
    from pronghorn.awq.quantize import fake_quantize_model, quantize_model
    from pronghorn.awq.search import AwqSearch, SearchResult
    from pronghorn.awq.transformers import install

__all__ = [
    "AwqConfig",
    "AwqLinear",
    "AwqSearch",
    "SearchResult",
    "convert_checkpoint",
    "fake_quantize_model",
    "fuse",
    "install",
    "prepare_lora",
    "quantize_model",
]

_ROOMS = {
    "AwqConfig": "config",
    "AwqLinear": "layers",
    "AwqSearch": "search",
    "SearchResult": "search",
    "convert_checkpoint": "convert",
    "fake_quantize_model": "quantize",
    "fuse": "fused",
    "install": "transformers",
    "prepare_lora": "peft",
    "quantize_model": "quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
