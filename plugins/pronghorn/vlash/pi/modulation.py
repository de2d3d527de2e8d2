"""What all adaptive norms make of the conditions of all Euler steps, computed before the first step.

A condition depends on the time, the state and the delay, and not on the actions, so each norm's weight is read once for
a chunk and not once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pronghorn.vlash.pi.gemma import Modulation, modulation


def adaptive_norms(expert: Any) -> list[Any]:
    """The norms of an expert in the order in which they act: two a layer, and the last."""
    pairs = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in expert.layers]
    return [norm for pair in pairs for norm in pair] + [expert.norm]


def modulations(norms: Sequence[Any], conditions: Tensor) -> list[list[Modulation]]:
    """Norm by norm, for all steps at once.

    Args:
        norms: adaptive, each with a projection `dense`.
        conditions: [steps, rows, condition_width].

    Returns:
        For each step those of all norms, [rows, width].
    """
    made = [modulation(norm, conditions) for norm in norms]
    return [[Modulation(*(part[step] for part in parts)) for parts in made] for step in range(len(conditions))]


class StackedModulation:
    """The projections of all norms as one matrix product.

    It holds a copy of their weights, as they are when it is made: make it again when it is `outdated`.

    Args:
        norms: adaptive, of one width, each with a plain linear projection `dense`.

    Raises:
        TypeError: a projection is no plain linear layer, as inside of LoRA: merge it, or use `modulations`.
    """

    def __init__(self, norms: Sequence[Any]) -> None:
        for norm in norms:
            if type(norm.dense) is not torch.nn.Linear:
                raise TypeError(f"norms: got a dense of {type(norm.dense).__name__}, wanted torch.nn.Linear")
        self.count = len(norms)
        self._copied = [part for norm in norms for part in (norm.dense.weight, norm.dense.bias)]
        self._versions = self._found_versions()
        self.weight = torch.cat([norm.dense.weight.detach() for norm in norms])
        self.bias = torch.cat([norm.dense.bias.detach() for norm in norms])

    def __call__(self, conditions: Tensor, dtype: torch.dtype) -> list[list[Modulation]]:
        """[steps, rows, condition_width] to what `modulations` gives, rounded to `dtype`, that of the layers.

        The kernel `suffix_layers` takes it so: rounding here is one operation, and there it would be six a layer.
        """
        made = F.linear(conditions.to(self.weight.dtype), self.weight, self.bias).to(dtype)
        made = made.unflatten(-1, (self.count, 3, -1))
        return [[Modulation(*made[step, :, norm].unbind(1)) for norm in range(self.count)] for step in range(len(made))]

    def outdated(self) -> bool:
        """Whether a weight has been moved, or written to, since it was copied."""
        return self._versions != self._found_versions()

    def _found_versions(self) -> list[tuple[int, int]]:
        return [(part.data_ptr(), part._version) for part in self._copied]
