"""AWQ's part of the contract of all methods: a packed linear."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pronghorn.awq.config import AwqConfig
from pronghorn.awq.layers import AwqLinear
from pronghorn.contract import Contract

CONFIG = AwqConfig(group_size=32)
IN_FEATURES, OUT_FEATURES = 64, 32
WEIGHTS = "model.safetensors"


def _module(seed: int) -> AwqLinear:
    linear = nn.Linear(IN_FEATURES, OUT_FEATURES)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return AwqLinear.from_linear(linear, CONFIG)


def _run(module: AwqLinear) -> Tensor:
    found: Tensor = module(torch.linspace(-1, 1, 2 * IN_FEATURES).view(2, IN_FEATURES))
    return found


def _load(folder: Path) -> AwqLinear:
    module = AwqLinear(IN_FEATURES, OUT_FEATURES, bias=True, config=CONFIG, dtype=torch.float32)
    module.load_state_dict(load_file(folder / WEIGHTS))
    return module


contract = Contract(
    module=_module,
    run=_run,
    save=lambda module, folder: save_file(module.state_dict(), folder / WEIGHTS),
    load=_load,
    exceptions={
        "unknown settings": "configurations on the hub hold settings of other programs beside those of the format",
    },
)
