"""How a diffusion model on latents is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pronghorn.dcae.objectives import FlowObjective, LearnedVarianceObjective, NoiseObjective, Objective
from pronghorn.dcae.recipe import Recipe

OBJECTIVES: dict[str, type[Objective]] = {
    "uvit": NoiseObjective, "usit": FlowObjective, "dit": LearnedVarianceObjective,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Recipe):
    """The training of a diffusion model. None stands for the paper's value.

    Attributes:
        method: "uvit" predicts noise, "usit" a velocity, "dit" noise and its variance.
        learning_rate: None: 2e-4, 1e-4 and 1e-4.
        weight_decay: None: 0.03, 0 and 0.
        betas: None: (0.99, 0.99), likewise, and (0.9, 0.999).
        ema_decay: 0.9999 in the paper, for its 500 thousand steps of 1024 images after 5 thousand of warm-up.
        label_dropout: share of the images that have no label, for guidance.
        channels: numbers of first latent channels to learn at once, of an adaptive autoencoder (1.5).
        channel_draws: how many of these a batch draws.

    All others are those of `Recipe`.

    Raises:
        ValueError: a value is out of its range.

    Source: Chen et al. (arXiv 2410.10733), appendix; Chen et al. (arXiv 2508.00413), section 3.3.
    """

    PUBLISHED: ClassVar[dict[Any, dict[str, Any]]] = {
        "uvit": {"learning_rate": 2e-4, "weight_decay": 0.03, "betas": (0.99, 0.99)},
        "usit": {"learning_rate": 1e-4, "weight_decay": 0.0, "betas": (0.99, 0.99)},
        "dit": {"learning_rate": 1e-4, "weight_decay": 0.0, "betas": (0.9, 0.999)},
    }

    method: str = "usit"
    ema_decay: float = 0.9999
    label_dropout: float = 0.1
    channels: tuple[int, ...] = ()
    channel_draws: int = 1

    @property
    def kind(self) -> str:
        """The method."""
        return self.method

    def __post_init__(self) -> None:
        if self.method not in OBJECTIVES:
            raise ValueError(f"method: got {self.method!r}, accepted are {', '.join(OBJECTIVES)}")
        object.__setattr__(self, "channels", tuple(self.channels))
        super().__post_init__()
        self.objective(1)

    def objective(self, num_classes: int) -> Objective:
        """The loss of a model for so many classes.

        Raises:
            ValueError: a value is out of its range.
        """
        return OBJECTIVES[self.method](
            num_classes=num_classes, label_dropout=self.label_dropout, channels=self.channels,
            channel_draws=self.channel_draws,
        )  # fmt: skip
