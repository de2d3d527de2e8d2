"""Which norm, projection or activation feeds which linears: found by intervention, not by a table of model names.

A scale `s` may move from the linears that read a tensor into the module that makes it exactly when multiplying that
module's output by `s` multiplies the linears' inputs by `s`, channel by channel, and nothing else in the block
notices once those linears have divided it out again. So that is what is tried: each norm, projection and activation
of a block has its output multiplied by random factors, every reader whose input comes out multiplied by just these
factors is compensated on the spot, and the group stands if the block's output has not moved. The test finds
`v_proj -> o_proj` where there are as many key/value heads as heads and refuses it elsewhere, finds the last rows of a
fused QKV, sees through ReLU and through `act(gate) * up`, and counts routers among the readers (AWQ, section 3.2).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3  # relative; float32 noise lies near 1e-6, a factor that is missing near 0.3
PASS_THROUGH = (nn.Dropout, nn.Identity)  # nothing to hang a scale on
EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+(?=\.)")  # experts are alike, so one stands for all


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that read one tensor, and the module that makes it; names are those inside the block.

    Attributes:
        prev: the norm, linear or activation whose output is divided by the scale.
        linears: the quantized linears whose input columns are multiplied by it.
        others: further readers that must be multiplied but stay in 16 bits (routers, excluded linears).
        inspect: the submodule whose output the search compares, "" for the whole block.
    """

    prev: str
    linears: tuple[str, ...]
    others: tuple[str, ...] = ()
    inspect: str = ""

    @property
    def readers(self) -> tuple[str, ...]:
        """All modules whose input columns are multiplied by the scale."""
        return self.linears + self.others


def trace_scale_groups(
    block: nn.Module, hidden_states: Tensor, kwargs: Mapping[str, Any], quantized: Iterable[str]
) -> list[ScaleGroup]:
    """The scale groups of one decoder block, in the order in which the block runs them.

    Args:
        block: the decoder layer; it is copied in float32 and not changed.
        hidden_states: [batch, tokens, hidden], a real input of the block; a few dozen tokens are enough, save that
            experts that no token reaches are taken to be like those that some token reaches.
        kwargs: the block's other arguments, as the model passes them.
        quantized: names of the linears that will be quantized.
    """
    probe = _Probe(copy.deepcopy(block).float().eval(), hidden_states, kwargs)
    quantized = tuple(quantized)
    wanted = set(quantized)
    found = [group for group in map(probe.readers_of, probe.candidates()) if group is not None]
    chosen: list[ScaleGroup] = []
    taken: set[str] = set()
    # Norms before linears before activations; among equals the one that runs last, which is the one nearest.
    for kind, _, prev, readers in sorted(found, key=lambda item: (item[0], -item[1])):
        linears = tuple(name for name in readers if name in wanted)
        if not linears or taken & set(readers):
            continue
        taken |= set(readers)
        others = tuple(name for name in readers if name not in wanted)
        chosen.append(ScaleGroup(prev, linears, others, probe.inspect_module(kind, readers)))
    chosen.sort(key=lambda group: min(probe.order[name] for name in group.readers))
    return _for_all_experts(chosen, quantized)


class _Probe:
    """A float32 copy of a block that can be run with one module's output multiplied by random factors."""

    def __init__(self, block: nn.Module, hidden_states: Tensor, kwargs: Mapping[str, Any]) -> None:
        self.block = block
        self.hidden_states = hidden_states.float()
        self.kwargs = _float_tensors(dict(kwargs))
        self.modules = dict(block.named_modules())
        self.inputs: dict[str, Tensor] = {}
        self.order: dict[str, int] = {}
        self.width: dict[str, int] = {}
        with ExitStack() as hooks:
            for name, module in self.modules.items():
                if name:
                    hooks.enter_context(module.register_forward_pre_hook(self._note_input(name), with_kwargs=True))
                    hooks.enter_context(module.register_forward_hook(self._note_output(name)))
            self.output = self._run()
        # What the block adds, not what passes through it, is the measure of a change.
        self.update_norm = (self.output - self.hidden_states).norm()

    def candidates(self) -> list[tuple[int, str]]:
        """(kind, name) of the modules that could take a scale: 0 norms, 1 linears, 2 activations."""
        result = []
        patterns: set[str] = set()
        for name in self.order:
            module = self.modules[name]
            pattern = _expert_pattern(name)
            if list(module.children()) or pattern in patterns or isinstance(module, PASS_THROUGH):
                continue
            patterns.add(pattern)
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear):
                result.append((1, name))
            elif isinstance(weight, Tensor) and weight.dim() == 1 and weight.shape[0] == self.width.get(name):
                result.append((0, name))
            elif not list(module.parameters()) and name in self.width:
                result.append((2, name))
        return result

    def readers_of(self, candidate: tuple[int, str]) -> tuple[int, int, str, tuple[str, ...]] | None:
        """(kind, order, name, readers) if scaling this module's output is undone by its readers alone."""
        kind, name = candidate
        widths = {self._reads(other) for other in self.order if self.order[other] > self.order[name]} - {None}
        for width in sorted((w for w in widths if w is not None and w <= self.width[name]), reverse=True):
            if kind != 1 and width != self.width[name]:
                continue  # only a projection can be longer than what is read of it (the value rows of a fused QKV)
            readers = self._intervene(name, width)
            if readers:
                return kind, self.order[name], name, readers
        return None

    def inspect_module(self, kind: int, readers: tuple[str, ...]) -> str:
        """The smallest submodule with all readers; for a norm's only reader the largest one that it alone feeds."""
        path = readers[0].split(".")
        if len(readers) > 1:
            for n in range(len(path) - 1, 0, -1):
                outer = ".".join(path[:n])
                if outer in self.inputs and all(name.startswith(outer + ".") for name in readers):
                    return outer
            return ""
        if kind == 0:
            own = self.inputs[readers[0]]
            for n in range(1, len(path)):
                received = self.inputs.get(".".join(path[:n]))
                if received is not None and received.shape == own.shape and torch.equal(received, own):
                    return ".".join(path[:n])
        return readers[0]

    def _intervene(self, name: str, width: int) -> tuple[str, ...]:
        generator = torch.Generator().manual_seed(0)
        factors = torch.empty(width).uniform_(0.5, 2.0, generator=generator).to(self.hidden_states.device)
        readers: list[str] = []

        def multiply(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            head, tail = output[..., : output.shape[-1] - width], output[..., output.shape[-1] - width :]
            return torch.cat([head, tail * factors], dim=-1)

        def compensate(reader: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                value = _first_tensor(args, kwargs)
                before = self.inputs[reader]
                if value is None or value.shape != before.shape or not _same(value, before * factors, before.norm()):
                    return None
                readers.append(reader)
                return _replace_first_tensor(args, kwargs, value / factors)

            return hook

        with ExitStack() as hooks:
            hooks.enter_context(self.modules[name].register_forward_hook(multiply))
            for other, order in self.order.items():
                if order > self.order[name] and self._reads(other) == width:
                    module = self.modules[other]
                    hooks.enter_context(module.register_forward_pre_hook(compensate(other), with_kwargs=True))
            output = self._run()
        return tuple(readers) if readers and _same(output, self.output, self.update_norm) else ()

    def _reads(self, name: str) -> int | None:
        """Number of input channels of a module with a matrix (a linear, a router), None for the others."""
        weight = getattr(self.modules[name], "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or name not in self.inputs:
            return None
        return weight.shape[1] if self.inputs[name].shape[-1] == weight.shape[1] else None

    def _run(self) -> Tensor:
        with torch.no_grad():
            output = self.block(self.hidden_states, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def _note_input(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = _first_tensor(args, kwargs)
            if value is not None and name not in self.inputs:
                self.inputs[name] = value.detach()
                self.order[name] = len(self.order)

        return hook

    def _note_output(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 0:
                self.width[name] = output.shape[-1]

        return hook


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def _replace_first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> tuple[Any, dict[str, Any]]:
    old = _first_tensor(args, kwargs)
    return tuple(new if a is old else a for a in args), {k: new if v is old else v for k, v in kwargs.items()}


def _float_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _float_tensors(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_float_tensors(entry) for entry in value)
    return value


def _same(value: Tensor, wanted: Tensor, scale: Tensor) -> bool:
    return bool(scale > 0) and bool((value - wanted).norm() <= TOLERANCE * scale)


def _expert_pattern(name: str) -> str:
    return EXPERT_NUMBER.sub("#", name)


def _for_all_experts(groups: list[ScaleGroup], quantized: Iterable[str]) -> list[ScaleGroup]:
    """Give every expert what was found for the one that was tried, whether or not a token reached it."""
    by_pattern: dict[str, list[str]] = {}
    for name in quantized:
        by_pattern.setdefault(_expert_pattern(name), []).append(name)
    result = []
    for group in groups:
        number = EXPERT_NUMBER.search(group.prev)
        if number is None:
            patterns = dict.fromkeys(_expert_pattern(name) for name in group.linears)
            result.append(replace(group, linears=tuple(name for p in patterns for name in by_pattern[p])))
            continue
        for sibling in by_pattern[_expert_pattern(group.linears[0])]:
            index = EXPERT_NUMBER.search(sibling)
            result.append(_renumbered(group, number[0] if index is None else index[0]))
    return result


def _renumbered(group: ScaleGroup, number: str) -> ScaleGroup:
    prev, *names = (EXPERT_NUMBER.sub(number, name) for name in (group.prev, group.inspect, *group.readers))
    inspect, readers = names[0], names[1:]
    return ScaleGroup(prev, tuple(readers[: len(group.linears)]), tuple(readers[len(group.linears) :]), inspect)
