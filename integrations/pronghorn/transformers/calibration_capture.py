"""What a running model calls its decoder blocks with, found without running them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pronghorn.transformers.decoder import Block

CACHES = ("past_key_values", "past_key_value", "layer_past", "use_cache", "output_attentions")
FEW_TOKENS = 8  # that tell what blocks return: all of a batch may need more memory than there is
DISTINCT = 4  # tensors of one name and shape to compare a new one with: masks of local and of global attention


class BlockCalls:
    """Records the arguments of every block in a pass of the model with stand-ins for its blocks.

    Equal tensors (rotary embeddings, masks) of blocks and of batches are kept once.
    """

    def __init__(self, model: Any, blocks: Sequence[Block]) -> None:
        self._model = model
        self._blocks = blocks
        self._returns_tuple: bool | None = None
        self._kept: dict[tuple[str, torch.Size, torch.dtype], list[Tensor]] = {}

    def record(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """The first block's hidden states, and for every block its other arguments by name, on the CPU.

        Args:
            ids: int64 token ids [batch, tokens].
        """
        if self._returns_tuple is None:
            self._pass(ids[:1, :FEW_TOKENS])
        return self._pass(ids)

    def _pass(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        hidden: list[Tensor] = []
        arguments: list[dict[str, Any]] = [{} for _ in self._blocks]
        copies: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of a tensor that they keep alive

        def stand_in(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
            names = [name for name in inspect.signature(original).parameters if name != "self"]

            def forward(*args: Any, **kwargs: Any) -> Any:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                hidden_states = given.pop(names[0])
                given = {name: value for name, value in given.items() if not _is_cache(name, value)}
                if self._returns_tuple is None:
                    # One block runs once for real, on little: some models' blocks return a tuple, most a tensor.
                    self._returns_tuple = isinstance(original(hidden_states, **given), tuple)
                hidden.append(hidden_states)
                arguments[index] = {name: self._on_cpu(name, value, copies) for name, value in given.items()}
                return (hidden_states,) if self._returns_tuple else hidden_states

            return forward

        try:
            for index, block in enumerate(self._blocks):
                block.module.forward = stand_in(index, block.module.forward)
            device = self._model.get_input_embeddings().weight.device
            base = getattr(self._model, "base_model", self._model)  # without the head, whose logits nobody reads
            base(input_ids=ids.to(device), use_cache=False)
        finally:
            for block in self._blocks:
                block.module.__dict__.pop("forward", None)
        return hidden[0], arguments

    def _on_cpu(self, name: str, value: Any, copies: dict[int, tuple[Tensor, Tensor]]) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in copies:
                copies[id(value)] = (value, self._once(name, value.cpu()))
            return copies[id(value)][1]
        if isinstance(value, dict):
            return {key: self._on_cpu(f"{name}.{key}", entry, copies) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._on_cpu(f"{name}.{place}", entry, copies) for place, entry in enumerate(value))
        return value

    def _once(self, name: str, tensor: Tensor) -> Tensor:
        kept = self._kept.setdefault((name, tensor.shape, tensor.dtype), [])
        for known in kept:
            if torch.equal(known, tensor):
                return known
        kept.append(tensor)
        del kept[:-DISTINCT]
        return tensor


def _is_cache(name: str, value: Any) -> bool:
    return name in CACHES or type(value).__name__.endswith("Cache")
