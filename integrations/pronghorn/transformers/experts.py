"""Experts of mixture-of-experts models as one `nn.Linear` each.

transformers 5 keeps the experts of a layer in fused 3-D parameters (`gate_up_proj` [experts, 2 * intermediate, hidden]
and `down_proj` [experts, hidden, intermediate]). Methods that treat linears one by one need them apart again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One expert: `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, or `down_proj(act_fn(up_proj(x)))` without a gate."""

    def __init__(self, projections: dict[str, nn.Linear], act_fn: nn.Module) -> None:
        super().__init__()
        for name, linear in projections.items():
            self.add_module(name, linear)
        self.has_gate = "gate_proj" in projections
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[tokens, hidden] to [tokens, hidden]."""
        up = self.get_submodule("up_proj")(hidden_states)
        activated = (
            self.act_fn(self.get_submodule("gate_proj")(hidden_states)) * up if self.has_gate else self.act_fn(up)
        )
        output: Tensor = self.get_submodule("down_proj")(activated)
        return output


class ExpertList(nn.ModuleList):
    """The experts of one layer, called as transformers calls its fused experts; children are named "0", "1", …"""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], the experts of each token; `len(self)` stands for none.
            top_k_weights: [tokens, k].
        """
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index == len(self):
                continue
            token, position = torch.where(top_k_index == index)
            result = self[index](hidden_states[token]) * top_k_weights[token, position, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output


def unfuse_experts(model: nn.Module) -> list[str]:
    """Replace every fused experts module of `model` by an `ExpertList` with the same function, in place.

    Works on the meta device too, where the new linears are as empty as what they replace.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: experts whose gating is not `act_fn(gate) * up` (their linears alone do not define them).
    """
    fused = {name: module for name, module in model.named_modules() if _is_fused(module)}
    for name, module in fused.items():
        model.set_submodule(name, _unfuse(name, module))
    return list(fused)


def _is_fused(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    up = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in (down, up))


def _unfuse(name: str, fused: Any) -> ExpertList:
    from transformers.integrations import moe

    standard_gate = getattr(moe, "_default_apply_gate", None)
    own_gate = getattr(type(fused), "_apply_gate", standard_gate)
    if own_gate is not standard_gate or not isinstance(getattr(fused, "act_fn", None), nn.Module):
        raise ValueError(
            f"{name}: the experts of {type(fused).__name__} combine gate and up in a way of their own; "
            "accepted are experts that compute act_fn(gate) * up"
        )
    has_gate = hasattr(fused, "gate_up_proj")
    first = fused.gate_up_proj if has_gate else fused.up_proj
    experts = []
    for index in range(first.shape[0]):
        up, down = _oriented(fused, first[index]), _oriented(fused, fused.down_proj[index])
        up_bias = _bias(fused, "gate_up_proj_bias" if has_gate else "up_proj_bias", index)
        weights = {"up_proj": (up, up_bias), "down_proj": (down, _bias(fused, "down_proj_bias", index))}
        if has_gate:
            gate, up = _halves(fused, up)
            gate_bias, up_bias = (None, None) if up_bias is None else _halves(fused, up_bias)
            weights = {"gate_proj": (gate, gate_bias), "up_proj": (up, up_bias), "down_proj": weights["down_proj"]}
        act_fn = copy.deepcopy(fused.act_fn)  # shared, it could not be scaled for one expert alone
        experts.append(Expert({key: _linear(*value) for key, value in weights.items()}, act_fn))
    return ExpertList(experts).train(fused.training)


def _oriented(fused: Any, weight: Tensor) -> Tensor:
    return weight.T if getattr(fused, "is_transposed", False) else weight


def _bias(fused: Any, name: str, index: int) -> Tensor | None:
    bias = getattr(fused, name, None)
    return None if bias is None else bias[index]


def _halves(fused: Any, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    if getattr(fused, "is_concatenated", True):
        gate, up = gate_up.chunk(2)
        return gate, up
    return gate_up[0::2], gate_up[1::2]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear
