"""What trainings of an autoencoder and of a diffusion model have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from pronghorn.configuration import from_values

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long to train, and how fast. None stands for the paper's value.

    Attributes:
        steps: updates of the weights.
        batch_size: images of a step, on each device.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        betas: of AdamW.
        warmup_steps: over which the learning rate rises.
        gradient_accumulation_steps: batches of a step.
        max_grad_norm: gradients are shortened to this; 0 leaves them.
        ema_decay: of the mean of the weights over steps, which is what is kept in the end; 0 keeps the last weights.
        mixed_precision: "no", "bf16" or "fp16".
        gradient_checkpointing: compute blocks twice instead of keeping what they need for their gradients.
        evaluate_every: steps between evaluations; 0 does so at the end alone.
        save_every: steps between checkpoints; 0 makes none.
        workers: processes that read images or latents.
        seed: of all that is drawn.

    Raises:
        ValueError: a value is out of its range.
    """

    # The settings that have a value of the paper's, and of what is trained.
    PUBLISHED: ClassVar[dict[Any, dict[str, Any]]] = {}

    steps: int
    batch_size: int = 16
    learning_rate: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    warmup_steps: int = 0
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    evaluate_every: int = 1000
    save_every: int = 1000
    workers: int = 0
    seed: int = 0

    @property
    def kind(self) -> Any:
        """What of `PUBLISHED` this is."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for name, value in self.PUBLISHED[self.kind].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "betas", tuple(self.betas or ()))  # JSON gives a list
        self._check_whole(1, "steps", "batch_size", "gradient_accumulation_steps")
        self._check_whole(0, "warmup_steps", "evaluate_every", "save_every", "workers", "seed")
        self._check_number("learning_rate", "weight_decay", "max_grad_norm")
        self._check_switch("gradient_checkpointing")
        if len(self.betas or ()) != 2 or not all(0 <= beta < 1 for beta in self.betas or ()):
            raise ValueError(f"betas: got {self.betas}, wanted two numbers from 0 to below 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay!r}, wanted a number from 0 to below 1")
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(f"mixed_precision: got {self.mixed_precision!r}, accepted are {', '.join(PRECISIONS)}")

    def _check_whole(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least {least}")

    def _check_switch(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted True or False")

    def _check_number(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name}: got {value!r}, wanted a number of at least 0")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From what `to_dict` gave.

        Raises:
            ValueError, TypeError: there are other names, or values that are none.
        """
        return from_values(cls, values)
