"""A model's small operations as one kernel each: what takes no time by itself, but a launch each, thousands a token."""

from __future__ import annotations

from typing import Any

from torch import nn

from pronghorn.transformers.norms import find_rms_norms
from pronghorn.transformers.rotary import find_rotary


class FusedOperations:
    """RMS norms and rotary embeddings as one kernel each, until `restore` or the end of a `with` block.

    They are known by what they compute, whatever a model calls them. Results differ by roundings.

    Args:
        model: a model of transformers.

    Examples:
        >>> with FusedOperations(model):
        ...     model.generate(**inputs)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        norms, rotary = find_rms_norms(model), find_rotary(model)
        self._norms = {name: model.get_submodule(name) for name in norms}
        self._rotary: list[Any] = [model.get_submodule(name) for name in rotary]
        for name, norm in norms.items():
            model.set_submodule(name, norm)
        for module, forward in zip(self._rotary, rotary.values(), strict=True):
            module.forward = forward

    def restore(self) -> None:
        """Put the model's own modules and functions back."""
        for name, norm in self._norms.items():
            self.model.set_submodule(name, norm)
        for module in self._rotary:
            vars(module).pop("forward")
        self._norms, self._rotary = {}, []

    def __enter__(self) -> FusedOperations:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()
