"""One description of an operation for its tests, for `pronghorn verify` and for its benchmark."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """The least work an operation can do: bytes read and written once, and floating-point operations."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Operation:
    """An operation as its users call it, and how to tell whether and how fast it works.

    Attributes:
        name: of the operation, its folder, its test and its benchmark.
        function: the public function, or what of its result is compared.
        example: (shape knobs, dtype, generator, device) to the function's arguments.
        oracle: arguments to the result in float64.
        shapes: knobs for a smoke test.
        large: knobs for a measurement on a GPU.
        cost: knobs to the least work.
        tolerance: largest ‖result - oracle‖ / ‖oracle‖ by dtype.
        trains: names of the arguments that gradients flow to.
        timed: the public function, where `function` computes something around it.
        atomics: atomic functions that its kernels use.
        ordered: whether results have the same bits at every call; if not, its docstring says why.
        rows: arguments, and for each the dimension of rows that know nothing of each other: what is computed of one
            has the same bits however many others are there. Where it is empty nothing of the kind is promised.
    """

    name: str
    function: Callable[..., Any]
    example: Callable[[Mapping[str, Any], torch.dtype, torch.Generator, torch.device], Arguments]
    oracle: Callable[[Arguments], Any]
    shapes: tuple[Mapping[str, Any], ...]
    large: Mapping[str, Any]
    cost: Callable[[Mapping[str, Any]], Cost]
    tolerance: Mapping[torch.dtype, float]
    trains: tuple[str, ...] = ()
    timed: Callable[..., Any] = None  # type: ignore[assignment]  # set below
    atomics: tuple[str, ...] = ()
    ordered: bool = True
    rows: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.timed is None:
            object.__setattr__(self, "timed", self.function)


def operations() -> Iterator[Operation]:
    """All operations of this package: every folder with a `cases.py` that holds `OPERATION`."""
    import pronghorn.kernels as package

    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
        if module.ispkg:
            yield importlib.import_module(f"{package.__name__}.{module.name}.cases").OPERATION


def relative_error(result: Any, wanted: Any) -> float:
    """‖result - wanted‖ / ‖wanted‖ in float64; of several tensors the largest. NaN stays NaN."""
    if isinstance(result, Tensor):
        difference = (result.detach().double().cpu() - wanted.detach().double().cpu()).norm()
        size = wanted.detach().double().cpu().norm()
        return float(difference / size if size > 0 else difference)
    errors = torch.tensor([relative_error(r, w) for r, w in zip(result, wanted, strict=True)])
    return float(errors.max())


def to_float64(arguments: Arguments) -> Arguments:
    """The same arguments on the CPU with floating-point tensors in float64, which hold the same numbers."""
    return {
        name: value.cpu().double() if isinstance(value, Tensor) and value.is_floating_point() else _on_cpu(value)
        for name, value in arguments.items()
    }


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
