"""AWQ's part of the contract of all methods: a packed linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pronghorn.awq.config import AwqConfig
from pronghorn.awq.layers import AwqLinear
from pronghorn.contract import Contract, randomize

CONFIG = AwqConfig(group_size=32)
IN_FEATURES, OUT_FEATURES = 64, 32


def _module(seed: int) -> AwqLinear:
    linear = nn.Linear(IN_FEATURES, OUT_FEATURES)
    randomize(linear, seed)
    return AwqLinear.from_linear(linear, CONFIG)


def _run(module: AwqLinear) -> Tensor:
    return _batch(module, 2)


def _batch(module: AwqLinear, size: int) -> Tensor:
    found: Tensor = module(torch.linspace(-1, 1, size * IN_FEATURES).view(size, IN_FEATURES))
    return found


contract = Contract(
    module=_module,
    run=_run,
    batches=_batch,
    exceptions={
        "unknown settings": "configurations on the hub hold settings of other programs beside those of the format",
    },
)
