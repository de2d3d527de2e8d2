"""The three phases in which an autoencoder is trained, so that high resolution and a discriminator cost little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pronghorn.dcae.recipe import Recipe

ALL, MIDDLE, HEAD = 1, 2, 3
MAX, MIN_MAX = "max", "min_max"
# Settings that mean nothing in other phases.
OF_A_PHASE = {
    "middle_blocks": MIDDLE, "head_blocks": HEAD, "adversarial_weight": HEAD, "adaptive": HEAD,
    "discriminator_start": HEAD, "discriminator_learning_rate": HEAD,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PhaseConfig(Recipe):
    """One phase of training: what learns, from what, and for how long. None stands for the paper's value.

    Attributes:
        phase: 1 trains everything at low resolution; 2 adapts the middle (the encoder's last layer and the decoder's
            first) to high resolution; 3 refines the decoder's last layers against a discriminator.
        resolution: edge of an image, in pixels; None: 256, 1024 and 256.
        learning_rate: None: 6.4e-5, 1.6e-5 and 5.4e-5.
        weight_decay: None: 0.1, 0.001 and, where none was published, 0.01.
        betas: None: (0.9, 0.999), and (0.5, 0.9) in phase 3, also for the discriminator.
        middle_blocks: phase 2 also trains so many blocks on both sides of the latent.
        head_blocks: phase 3 also trains the last so many blocks of the decoder.
        l1_weight: of the mean absolute difference.
        perceptual_weight: of the perceptual distance; 0 leaves it out.
        adversarial_weight: of the discriminator's judgement, in phase 3.
        adaptive: whether that is also weighted to a gradient as large as the other losses'.
        discriminator_start: the step after which it counts.
        discriminator_learning_rate: None: as `learning_rate`.
        channel_samples: how many numbers of latent channels a step draws for an adaptive model (1.5), beside those that
            it always has.
        always_channels: those that it always has: "max" is all of them, "min_max" also the fewest that the model was
            made for.
        zoom: images are shrunk so that their shorter edge is at most so many times the resolution.

    All others are those of `Recipe`.

    Raises:
        ValueError: a value is out of its range, or belongs to another phase.

    Source: Chen et al. (arXiv 2410.10733), section 3.3 and appendix; weights of the losses from public reports.
    """

    PUBLISHED: ClassVar[dict[Any, dict[str, Any]]] = {
        ALL: {"resolution": 256, "learning_rate": 6.4e-5, "weight_decay": 0.1, "betas": (0.9, 0.999)},
        MIDDLE: {"resolution": 1024, "learning_rate": 1.6e-5, "weight_decay": 0.001, "betas": (0.9, 0.999)},
        HEAD: {"resolution": 256, "learning_rate": 5.4e-5, "weight_decay": 0.01, "betas": (0.5, 0.9)},
    }

    phase: int
    resolution: int | None = None
    middle_blocks: int = 0
    head_blocks: int = 0
    l1_weight: float = 1.0
    perceptual_weight: float = 0.25
    adversarial_weight: float = 0.5
    adaptive: bool = True
    discriminator_start: int = 0
    discriminator_learning_rate: float | None = None
    channel_samples: int = 1
    always_channels: str = MAX
    zoom: float = 2.0

    @property
    def kind(self) -> int:
        """The phase."""
        return self.phase

    def __post_init__(self) -> None:
        if self.phase not in self.PUBLISHED:
            raise ValueError(f"phase: got {self.phase!r}, accepted are 1, 2 and 3")
        super().__post_init__()
        self._check_whole(1, "resolution")
        self._check_whole(0, "middle_blocks", "head_blocks", "discriminator_start", "channel_samples")
        self._check_number("l1_weight", "perceptual_weight", "adversarial_weight", "zoom")
        self._check_switch("adaptive")
        if self.zoom < 1:
            raise ValueError(f"zoom: got {self.zoom!r}, wanted at least 1")
        if self.discriminator_learning_rate is not None:
            self._check_number("discriminator_learning_rate")
        if self.always_channels not in (MAX, MIN_MAX):
            raise ValueError(f"always_channels: got {self.always_channels!r}, accepted are {MAX} and {MIN_MAX}")
        for name, phase in OF_A_PHASE.items():
            if getattr(self, name) != getattr(PhaseConfig, name) and self.phase != phase:
                raise ValueError(f"{name}: got {getattr(self, name)}, it belongs to phase {phase}")
