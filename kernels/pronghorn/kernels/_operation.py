"""One description of an operation for its tests, for `pronghorn verify` and for its benchmark."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
        return (difference / size if size > 0 else difference).item()
    errors = torch.tensor([relative_error(r, w) for r, w in zip(result, wanted, strict=True)])
    return errors.max().item()


def to_float64(arguments: Arguments) -> Arguments:
    """The same arguments on the CPU with floating-point tensors in float64, which hold the same numbers."""
    return {
        name: value.cpu().double() if isinstance(value, Tensor) and value.is_floating_point() else _on_cpu(value)
        for name, value in arguments.items()
    }


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def random_packed(
    knobs: Mapping[str, Any], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Arguments:
    """Random packed weight of `knobs` (n, k, layout, bits, group_size): the arguments that describe it."""
    from pronghorn.kernels.dequantize_weight.layouts import pack

    n, k, layout, bits = (knobs[name] for name in ("n", "k", "layout", "bits"))
    groups = 1 if knobs["group_size"] == -1 else k // knobs["group_size"]
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, groups, generator=generator) + 0.1).to(dtype) / 2**bits
    zeros = torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8)
    if layout == "marlin":
        zeros.fill_(2 ** (bits - 1))
    tensors = pack(codes, scales, zeros, layout=layout, bits=bits, group_size=knobs["group_size"])
    arguments = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {
        "qzeros": None,
        **arguments,
        "layout": layout,
        "bits": bits,
        "group_size": knobs["group_size"],
        "out_features": n,
    }


def packed_bytes(knobs: Mapping[str, Any]) -> float:
    """Bytes of a packed weight with 16-bit scales and codes for zero points."""
    groups = 1 if knobs["group_size"] == -1 else knobs["k"] // knobs["group_size"]
    return knobs["n"] * (knobs["k"] * knobs["bits"] / 8 + groups * (2 + knobs["bits"] / 8))
