"""Definition of the gated mix and of its gate's gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def shares(gate: Tensor, like: Tensor) -> Tensor:
    """The clamped gate of each head, [1, heads, 1, 1], in float32 or better."""
    wide = torch.promote_types(torch.promote_types(gate.dtype, like.dtype), torch.float32)
    return gate.to(wide).clamp(0, 1).repeat_interleave(like.shape[1] // gate.shape[0])[None, :, None, None]


def gated_mix(full: Tensor, streaming: Tensor, gate: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim]; in float32 or better, and rounded once."""
    share = shares(gate, full)
    return (share * full + (1 - share) * streaming).to(streaming.dtype).contiguous()


def gate_gradient(grad: Tensor, full: Tensor, streaming: Tensor, gate: Tensor) -> Tensor:
    """[key/value heads], zero where the gate was clamped."""
    wide = torch.promote_types(full.dtype, torch.float32)
    of_heads = (grad.to(wide) * (full.to(wide) - streaming.to(wide))).sum(dim=(0, 2, 3))
    of_gates = of_heads.unflatten(0, (gate.shape[0], -1)).sum(dim=1)
    return torch.where((gate >= 0) & (gate <= 1), of_gates, 0).to(gate.dtype)
