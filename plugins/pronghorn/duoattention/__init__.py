"""DuoAttention: only retrieval heads keep the whole cache, for whoever decodes with long contexts on one GPU.

Some key/value heads look far back; the others need the first tokens and the last ones. Which ones they are is found
once for a model, by optimizing a gate for each head (Xiao et al., arXiv 2410.10819).

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="duo")
    duo = pronghorn.duoattention.apply_duo(model, DuoAttentionConfig.from_pattern(pattern, sparsity=0.5))
    model.generate(ids, past_key_values=duo.make_cache())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.duoattention.config import DuoAttentionConfig
    from pronghorn.duoattention.find import find_heads
    from pronghorn.duoattention.memory import plan
    from pronghorn.duoattention.passkey import MultiPasskeyDataset
    from pronghorn.duoattention.pattern import published_patterns, save_pattern
    from pronghorn.duoattention.transformers import DuoAttention, apply_duo

__all__ = [
    "DuoAttention",
    "DuoAttentionConfig",
    "MultiPasskeyDataset",
    "apply_duo",
    "find_heads",
    "plan",
    "published_patterns",
    "save_pattern",
]

_ROOMS = {
    "DuoAttention": "transformers",
    "DuoAttentionConfig": "config",
    "MultiPasskeyDataset": "passkey",
    "apply_duo": "transformers",
    "find_heads": "find",
    "plan": "memory",
    "published_patterns": "pattern",
    "save_pattern": "pattern",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
