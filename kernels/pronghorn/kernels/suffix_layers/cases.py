"""What is checked and measured of `suffix_layers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pronghorn.kernels._operation import Arguments, Cost, Operation
from pronghorn.kernels.suffix_layers import SuffixLayer, suffix_layers


def _example(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    """Random numbers; weights keep what goes through them as large as it was."""
    tokens, prefix, width, inner = knobs["tokens"], knobs["prefix"], knobs["width"], knobs["inner"]
    heads, size = knobs["heads"], knobs["size"]

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(device, dtype)

    def weight(outputs: int, inputs: int) -> Tensor:
        return random(outputs, inputs, std=max(inputs, 1) ** -0.5)

    layers = [
        SuffixLayer._make(
            [weight((heads + 2) * size, width), weight(width, heads * size), weight(2 * inner, width),
             weight(width, inner), *(random(width, std=0.3) for _ in range(6)), random(prefix, size),
             random(prefix, size)]
        )
        for _ in range(knobs["layers"])
    ]  # fmt: skip
    prefix_mask = torch.rand(prefix, generator=generator) >= knobs.get("absent", 0.0)
    places = int(prefix_mask.sum()) + torch.arange(tokens)
    angles = (places[:, None] * 1e4 ** (-torch.arange(size // 2) / max(size // 2, 1))).repeat(1, 2)
    return {
        "x": random(tokens, width), "layers": layers, "prefix_mask": prefix_mask.to(device),
        "cos": angles.cos().to(device), "sin": angles.sin().to(device), "eps": 1e-6,
    }  # fmt: skip


def _oracle(arguments: Arguments) -> Tensor:
    """With PyTorch's own norm and attention, over the keys that are seen alone, and a rotation by complex numbers."""
    x: Tensor = arguments["x"].double().cpu()
    real = arguments["prefix_mask"].cpu()
    by = torch.complex(*(arguments[name].double().cpu().chunk(2, dim=1)[0] for name in ("cos", "sin")))[:, None]
    eps, width, size = arguments["eps"], x.shape[1], 2 * by.shape[2]

    def normed(scale: Tensor, shift: Tensor) -> Tensor:
        return functional.rms_norm(x, (width,), 1 + scale, eps) + shift

    def turned(part: Tensor) -> Tensor:
        whole = torch.complex(*part.chunk(2, dim=2)) * by
        return torch.cat([whole.real, whole.imag], dim=2)

    for given in arguments["layers"]:
        layer = SuffixLayer(*(tensor.double().cpu() for tensor in given))
        parts = functional.linear(normed(layer.scale, layer.shift), layer.qkv).unflatten(1, (-1, size))
        keys, values = turned(parts[:, -2:-1])[:, 0], parts[:, -1]
        keys, values = torch.cat([layer.key[real], keys]), torch.cat([layer.value[real], values])
        query = turned(parts[:, :-2]).transpose(0, 1)
        attended = functional.scaled_dot_product_attention(query, keys[None], values[None])
        x = x + functional.linear(attended.transpose(0, 1).flatten(1), layer.out) * layer.gate
        gate, up = functional.linear(normed(layer.late_scale, layer.late_shift), layer.gate_up).chunk(2, dim=1)
        inner = functional.gelu(gate, approximate="tanh") * up
        x = x + functional.linear(inner, layer.down) * layer.late_gate
    return x


def _cost(knobs: Mapping[str, Any]) -> Cost:
    tokens, width, inner = knobs["tokens"], knobs["width"], knobs["inner"]
    of_heads = knobs["heads"] * knobs["size"]
    weights = width * (2 * of_heads + 2 * knobs["size"] + 3 * inner)
    keys = knobs["prefix"] + tokens
    numbers = weights + 2 * knobs["prefix"] * knobs["size"] + 6 * width
    return Cost(
        2 * (knobs["layers"] * numbers + 2 * tokens * width),
        knobs["layers"] * tokens * (2 * weights + 4 * keys * of_heads),
    )


def _shape(layers: int, tokens: int, prefix: int, width: int, inner: int, heads: int, size: int, **more: Any) -> Any:
    return {"layers": layers, "tokens": tokens, "prefix": prefix, "width": width, "inner": inner, "heads": heads,
            "size": size, **more}  # fmt: skip


OPERATION = Operation(
    name="suffix_layers",
    function=suffix_layers,
    example=_example,
    oracle=_oracle,
    shapes=(
        _shape(2, 5, 12, 16, 24, 2, 8, absent=0.3),
        _shape(1, 1, 3, 8, 8, 1, 2, absent=1.0),
        _shape(3, 9, 40, 32, 40, 4, 16),
        # The others are what the CUDA kernels take.
        _shape(2, 50, 130, 1024, 512, 2, 256, absent=0.3),
        _shape(1, 63, 700, 1024, 1024, 4, 256, absent=0.9),
        _shape(2, 1, 1, 1024, 512, 2, 256, absent=1.0),
    ),
    large=_shape(6, 50, 572, 1024, 4096, 8, 256),
    cost=_cost,
    tolerance={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
)
