"""DuoAttention's part of the contract of all methods: a small model of which half of the heads stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pronghorn.contract import Contract, randomize
from pronghorn.duoattention.config import DuoAttentionConfig
from pronghorn.duoattention.transformers import DuoAttention, apply_duo

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
CONFIG = DuoAttentionConfig(gates=[[1.0, 0.0], [0.0, 1.0]], sink_size=1, recent_size=2, prefill="streaming")
PATTERN = "duoattention"


class _Model(torch.nn.Module):
    """A model that makes the cache which its heads need."""

    def __init__(self, model: PreTrainedModel, config: DuoAttentionConfig) -> None:
        super().__init__()
        self.model = model
        self.duo_config = config
        apply_duo(model, config)

    def forward(self, ids: Tensor) -> Tensor:
        full_heads = self.duo_config.full_heads()
        assert full_heads is not None  # noqa: S101 - the configuration above has gates
        cache = DuoAttention(self.model, self.duo_config, full_heads).make_cache()
        for chunk in ids.split([5, 1, 1], dim=1):
            logits: Tensor = self.model(chunk, past_key_values=cache).logits
        return logits


def _module(seed: int) -> _Model:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    randomize(model, seed, 1 / 4)
    return _Model(model, CONFIG)


def _save(module: _Model, folder: Path) -> None:
    module.model.save_pretrained(folder)
    module.duo_config.save_pretrained(folder / PATTERN)


def _load(folder: Path) -> _Model:
    return _Model(LlamaForCausalLM.from_pretrained(folder), DuoAttentionConfig.from_pretrained(folder / PATTERN))


contract = Contract(
    module=_module,
    run=lambda module: module(torch.arange(7)[None]).detach(),
    save=_save,
    load=_load,
    exceptions={
        "compile": "its caches grow; the static one is compiled in tests/plugins/duoattention/test_cache.py",
    },
)
