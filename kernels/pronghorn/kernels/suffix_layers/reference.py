"""Definition of the layers of an action expert, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pronghorn.kernels._autocast import without_autocast
from pronghorn.kernels.suffix_layers.call import SuffixLayer, unflattened


@without_autocast
def suffix_layers(
    x: Tensor, tensors: list[Tensor], prefix_mask: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """[tokens, width], rounded where a value would be stored."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    size = cos.shape[1]
    total = x.to(wide).contiguous()

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(wide)

    def turned(part: Tensor) -> Tensor:
        first, second = part.chunk(2, dim=-1)
        return part * cos.to(wide)[:, None] + torch.cat([-second, first], dim=-1) * sin.to(wide)[:, None]

    for given in unflattened(tensors):
        # Contiguous, because on a CPU the way a product is added up, and with it the last bit, depends on strides.
        layer = SuffixLayer(*(tensor.to(wide).contiguous() for tensor in given))
        projected = rounded(_normed(total, layer.scale, layer.shift, eps, dtype) @ layer.qkv.mT)
        parts = projected.unflatten(1, (-1, size))
        query, key = rounded(turned(parts[:, :-2])), rounded(turned(parts[:, -2:-1]))[:, 0]
        keys, values = torch.cat([layer.key, key]), torch.cat([layer.value, parts[:, -1]])
        seen = torch.cat([prefix_mask, prefix_mask.new_ones(len(key))])
        weights = (query @ keys.mT * size**-0.5).masked_fill(~seen, -torch.inf).softmax(dim=-1)
        attended = rounded(rounded(weights @ values).flatten(1) @ layer.out.mT)
        total = rounded(total + rounded(attended * layer.gate))
        normed = _normed(total, layer.late_scale, layer.late_shift, eps, dtype)
        gate, up = rounded(normed @ layer.gate_up.mT).chunk(2, dim=-1)
        inner = rounded(functional.gelu(gate, approximate="tanh") * up)
        total = rounded(total + rounded(rounded(inner @ layer.down.mT) * layer.late_gate))
    return total.to(dtype)


def _normed(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    ratio = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (x * ratio * (1 + scale) + shift).to(dtype).to(x.dtype)
