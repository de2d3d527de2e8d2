"""The decoder blocks of a language model, whatever the model calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Block:
    """One decoder layer and its full name in the model."""

    name: str
    module: nn.Module


def find_decoder_blocks(model: Any) -> list[Block]:
    """The decoder layers of a causal language model, or of the language tower of a multimodal one, in order.

    One without its output layer will do, as pipelines for images have it for their prompts.

    Raises:
        ValueError: the model is no causal one, or no list of `num_hidden_layers` layers is found in it.
    """
    kind = type(model).__name__
    if not getattr(model, "can_generate", lambda: False)() and not _attends_causally(model):
        raise ValueError(f"model: {kind} is not a causal language model (it cannot generate)")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: {kind} is an encoder-decoder; only decoder-only language models are supported")
    count = model.config.get_text_config().num_hidden_layers
    tower = model.get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next((name for name, module in model.named_modules() if module is tower), "")
    for name, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and "." not in name:
            path = f"{prefix}.{name}" if prefix else name
            return [Block(f"{path}.{index}", layer) for index, layer in enumerate(module)]
    raise ValueError(f"model: no list of {count} decoder layers found in {type(tower).__name__} of {kind}")


def _attends_causally(model: Any) -> bool:
    """Whether it is a transformers model all of whose attention says of itself that it is causal."""
    if not hasattr(model, "config"):
        return False
    found = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(found) and all(found)
