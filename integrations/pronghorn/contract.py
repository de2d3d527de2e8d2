"""What a method says of itself for the tests that every method passes, `tests/plugins/test_contract.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "model.safetensors"

CHECKS = {
    "face": "the package imports in under 0.2 s and without torch; every public name is documented",
    "configuration": "it survives JSON, documents every knob, and refuses what is no value, NaN included",
    "unknown settings": "a configuration with a name that it does not know is refused",
    "registration": "registering again changes nothing",
    "save and load": "what was saved computes the same bits when it is loaded, with the same state dict",
    "deepcopy": "a copy computes the same bits, and shares no tensor",
    "state dict": "a module made anew takes the state dict of another, key by key, and then computes the same bits",
    "repeats": "it computes the same bits again, also where torch insists on that, in threads and after a fork",
    "compile": "torch.compile makes one graph of it and torch.export takes it, with the same result",
}


@dataclass(frozen=True)
class Contract:
    """A method's part of the contract; the entry point in `pronghorn.contract` is one, named as the method.

    Attributes:
        module: makes a small module of the method's on the CPU, from a seed; others than 0 give other numbers, and the
            same names. None where the method has no module.
        run: what the module computes of a fixed example.
        save: writes the module into a folder that is there, in the way that users do; None where that is the way of
            torch: its state dict, loaded into a module that was made anew.
        load: reads what `save` wrote; None likewise.
        batches: what the module computes of an example of so many samples, where sizes of batches change while it is
            used: torch.compile then makes two graphs of it at most, the second for all sizes, and torch.export one.
        exceptions: names of `CHECKS` that are not the method's, each with the reason, which the docs print.

    Raises:
        ValueError: an exception is no check or has no reason, or a part is missing that is no exception.
    """

    module: Callable[[int], Any] | None = None
    run: Callable[[Any], Tensor] | None = None
    save: Callable[[Any, Path], object] | None = None
    load: Callable[[Path], Any] | None = None
    batches: Callable[[Any, int], Tensor] | None = None
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.module is not None and self.save is None and self.load is None:
            object.__setattr__(self, "save", _save_state)
            object.__setattr__(self, "load", partial(_load_state, self.module))
        for check, reason in self.exceptions.items():
            if check not in CHECKS or not reason.strip():
                raise ValueError(f"exceptions: got {check!r}: {reason!r}, wanted one of {', '.join(CHECKS)}: a reason")
        needed = {
            "save and load": (self.module, self.run, self.save, self.load),
            **dict.fromkeys(("deepcopy", "state dict", "repeats", "compile"), (self.module, self.run)),
        }
        for check, parts in needed.items():
            if None in parts and check not in self.exceptions:
                raise ValueError(f"{check}: the method gives nothing to try it with, and no reason in `exceptions`")


def randomize(module: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Normal numbers, times `scale`, for all parameters of a module on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def _save_state(module: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(module.state_dict(), folder / WEIGHTS)


def _load_state(make: Callable[[int], Any], folder: Path) -> Any:
    from safetensors.torch import load_file

    module = make(1)
    module.load_state_dict(load_file(folder / WEIGHTS))
    return module
