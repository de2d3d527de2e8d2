"""Packing a model in place."""

import weakref

from tests.models import tiny_model
from torch import nn

from pronghorn.awq import AwqConfig, quantize_model
from pronghorn.awq.layers import AwqLinear
from pronghorn.awq.quantize import decoder_linears


def test_a_weight_goes_as_soon_as_it_is_packed(monkeypatch):
    model, config = tiny_model("llama"), AwqConfig(group_size=32)
    weights = [weakref.ref(linear.weight) for _, linear in decoder_linears(model, config)]
    left, pack = [], AwqLinear.from_linear

    def counting(linear: nn.Linear, *args, **options):
        left.append(sum(weight() is not None for weight in weights))
        return pack(linear, *args, **options)

    monkeypatch.setattr(AwqLinear, "from_linear", counting)
    quantize_model(model, config, progress=False)
    assert left == list(range(len(weights), 0, -1))
