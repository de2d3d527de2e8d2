"""Definition of the gated GELU, and its gradients, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, in float32 or better, rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (functional.gelu(gate.to(wide), approximate="tanh") * up.to(wide)).to(gate.dtype)


def gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    given, g = grad.to(wide), gate.to(wide)
    of_gate = torch.ops.aten.gelu_backward(given * up.to(wide), g, approximate="tanh")
    return of_gate.to(gate.dtype), (given * functional.gelu(g, approximate="tanh")).to(gate.dtype)
