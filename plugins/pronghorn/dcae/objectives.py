"""What latent diffusion is trained by: predicting noise (UViT), a velocity (USiT), or noise and its variance (DiT)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

STEPS = 1000  # of the noising that UViT and DiT learn to undo
UVIT_BETAS = (0.00085, 0.012)  # of the first and the last step; their roots are evenly spaced
DIT_BETAS = (0.0001, 0.02)  # evenly spaced themselves
GRAY_LEVEL = 2 / 255  # of an 8-bit image from -1 to 1


@dataclass(frozen=True)
class Objective(ABC):
    """A training loss: `objective(model, latents, labels)`.

    With `channels`, the model learns all these lengths of an adaptive latent (DC-AE 1.5) at once: it sees the first
    channels, zeros for the rest, and answers for the first alone.

    Attributes:
        num_classes: also the label of no class.
        label_dropout: share of the images whose label is replaced by that of no class, which guidance needs.
        channels: numbers of first latent channels, one of which is drawn at a time; by default all channels count.
        channel_draws: how many of `channels` are drawn for a batch; their losses are averaged.

    Raises:
        ValueError: a number is out of its range, or more than one draw is asked for without `channels`.

    Source: Chen et al. (arXiv 2508.00413), section 3.3, for augmented diffusion training; Ho and Salimans
    (arXiv 2207.12598) for label dropout.
    """

    num_classes: int = 1000
    label_dropout: float = 0.1
    channels: tuple[int, ...] = ()
    channel_draws: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON gives lists
        if type(self.num_classes) is not int or self.num_classes < 1:
            raise ValueError(f"num_classes: got {self.num_classes!r}, wanted a positive number")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout: got {self.label_dropout!r}, wanted from 0 to below 1")
        if any(type(count) is not int or count < 1 for count in self.channels):
            raise ValueError(f"channels: got {self.channels}, wanted positive numbers")
        if (
            type(self.channel_draws) is not int
            or self.channel_draws < 1
            or (self.channel_draws > 1 > len(self.channels))
        ):
            raise ValueError(f"channel_draws: got {self.channel_draws!r}, wanted 1, or with channels also more")

    def __call__(
        self, model: Callable[..., Any], latents: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The mean loss of a batch, a float32 scalar to go backward from.

        Args:
            model: `model(sample, timestep, class_labels)`, giving a tensor or what has one as `.sample`.
            latents: [batch, channels, height, width], scaled.
            labels: int64 [batch], from 0 to num_classes - 1.
            generator: what times, noise, dropped labels and channels are drawn with, on the device of the latents.

        Raises:
            ValueError: a shape does not fit, or the model's answer has another one than the objective needs.
        """
        if latents.dim() != 4 or labels.shape != latents.shape[:1]:
            got = f"{tuple(latents.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"latents, labels: got {got}, wanted [batch, channels, height, width] and [batch]")
        if self.channels and max(self.channels) > latents.shape[1]:
            raise ValueError(f"channels: got {self.channels}, wanted at most the latents' {latents.shape[1]}")
        dropped = _uniform(latents, generator) < self.label_dropout
        labels = labels.masked_fill(dropped, self.num_classes)
        drawn = [latents.shape[1]]
        if self.channels:
            places = torch.randint(
                len(self.channels), (self.channel_draws,), generator=generator, device=latents.device
            )
            drawn = [self.channels[place] for place in places.tolist()]
        losses = [
            self._loss(_Sliced(model, latents.shape[1]), latents[:, :count], labels, generator) for count in drawn
        ]
        return torch.stack(losses).mean()

    @abstractmethod
    def _loss(self, model: _Sliced, latents: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Of latents that have the drawn channels alone."""


@dataclass(frozen=True)
class NoiseObjective(Objective):
    """UViT's: the noise in latents after 1 to 1000 steps is predicted, by mean squared error.

    The model is told the number of the step, from 1 on.

    Attributes:
        num_classes: see `Objective`, as for all others.
        label_dropout: see there.
        channels: see there.
        channel_draws: see there.

    Raises:
        ValueError: see there.

    Source: Bao et al. (arXiv 2209.12152); Chen et al. (arXiv 2410.10733), section 4.
    """

    def _loss(self, model: _Sliced, latents: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        steps = torch.randint(1, STEPS + 1, (len(latents),), generator=generator, device=latents.device)
        noise = _noise(latents, generator)
        found = model(_noised(latents, noise, _kept(uvit=True), steps), steps, labels, answers=1)[0]
        return functional.mse_loss(found, noise)


@dataclass(frozen=True)
class FlowObjective(Objective):
    """USiT's: the velocity of a straight way from noise, at time 0, to the latents, at time 1.

    The model is told the time as it is, between 0 and 1.

    Attributes:
        num_classes: see `Objective`, as for all others.
        label_dropout: see there.
        channels: see there.
        channel_draws: see there.

    Raises:
        ValueError: see there.

    Source: Ma et al., SiT (arXiv 2401.08740); Lipman et al. (arXiv 2210.02747).
    """

    def _loss(self, model: _Sliced, latents: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        times = _uniform(latents, generator)
        noise = _noise(latents, generator)
        share = times[:, None, None, None]
        noised = (share * latents + (1 - share) * noise).to(latents.dtype)
        found = model(noised, times, labels, answers=1)[0]
        return functional.mse_loss(found, latents.float() - noise)


@dataclass(frozen=True)
class LearnedVarianceObjective(Objective):
    """DiT's: noise by mean squared error, and the variance of a step back by the variational bound.

    The model is told the number of the step from 0 to 999, and answers with the noise in its first half of channels
    and with the variance in its second: from -1 for the smallest that can be right, to 1 for the largest. The bound
    is in bits per number and, as DiT has it for 1000 steps, neither weighted nor allowed to change the noise.

    Attributes:
        num_classes: see `Objective`, as for all others.
        label_dropout: see there.
        channels: see there.
        channel_draws: see there.

    Raises:
        ValueError: see there.

    Source: Nichol and Dhariwal (arXiv 2102.09672), sections 3.1 and 3.2; Peebles and Xie, DiT (arXiv 2212.09748).
    """

    def _loss(self, model: _Sliced, latents: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        steps = torch.randint(STEPS, (len(latents),), generator=generator, device=latents.device)
        noise = _noise(latents, generator)
        found, variance = model(_noised(latents, noise, _kept(uvit=False)[1:], steps), steps, labels, answers=2)
        return functional.mse_loss(found, noise) + _bound(latents.float(), noise, found.detach(), variance, steps)


def _bound(latents: Tensor, noise: Tensor, found: Tensor, variance: Tensor, steps: Tensor) -> Tensor:
    """The variational bound of the steps, in bits per number.

    The distance of the means is taken from that of the noises: through the latents, the last steps would lose it to
    rounding.
    """
    kept, before = _kept(uvit=False)[1:], _kept(uvit=False)[:-1]
    beta = 1 - kept / before
    smallest = (beta * (1 - before) / (1 - kept)).log()
    smallest[0] = smallest[1]  # the first step has a variance of 0
    apart = _spread(beta / ((1 - beta) * (1 - kept)).sqrt(), steps) * (noise - found)
    least, most = _spread(smallest, steps), _spread(beta.log(), steps)
    log_variance = least + (variance + 1) / 2 * (most - least)
    divergence = 0.5 * (log_variance - least - 1 + (least - log_variance).exp() + apart**2 * (-log_variance).exp())
    first = (steps == 0)[:, None, None, None]
    return torch.where(first, _surprise(latents, -apart, log_variance), divergence).mean() / math.log(2)


def _surprise(latents: Tensor, apart: Tensor, log_variance: Tensor) -> Tensor:
    """-log p of latents `apart` from the mean. As DiT does, this takes them for grey levels of an image."""
    scale = (-0.5 * log_variance).exp()
    below = torch.special.ndtr(scale * (apart + GRAY_LEVEL / 2))
    under = torch.special.ndtr(scale * (apart - GRAY_LEVEL / 2))
    share = torch.where(latents < -0.999, below, torch.where(latents > 0.999, 1 - under, below - under))
    return -share.clamp_min(1e-12).log()


class _Sliced:
    """A model of `channels` channels, asked about the first of them."""

    def __init__(self, model: Callable[..., Any], channels: int) -> None:
        self.model, self.channels = model, channels

    def __call__(self, x: Tensor, timestep: Tensor, labels: Tensor, *, answers: int) -> list[Tensor]:
        """Its answers about x, float32 and each as large as x.

        Its first layer is linear over channels, so zeros are as if its weights for them were cut off.
        """
        count = x.shape[1]
        found = self.model(functional.pad(x, (0, 0, 0, 0, 0, self.channels - count)), timestep, labels)
        found = found if isinstance(found, Tensor) else found.sample
        wanted = (len(x), answers * self.channels, *x.shape[2:])
        if found.shape != wanted:
            raise ValueError(f"model: got an answer {tuple(found.shape)}, wanted {wanted}")
        return [answer[:, :count].float() for answer in found.chunk(answers, dim=1)]


@cache
def _kept(*, uvit: bool) -> Tensor:
    """The latents' share of variance after 0 to 1000 steps, float64."""
    first, last = UVIT_BETAS if uvit else DIT_BETAS
    if uvit:
        betas = torch.linspace(math.sqrt(first), math.sqrt(last), STEPS, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(first, last, STEPS, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(dim=0)])


def _noised(latents: Tensor, noise: Tensor, kept: Tensor, steps: Tensor) -> Tensor:
    # Roots are taken in float64: of the first steps' noise, float32 keeps four digits in 1 - kept.
    x = _spread(kept.sqrt(), steps) * latents + _spread((1 - kept).sqrt(), steps) * noise
    return x.to(latents.dtype)


def _spread(table: Tensor, steps: Tensor) -> Tensor:
    """Values of steps, float32 [batch, 1, 1, 1]."""
    return table.float().to(steps.device)[steps][:, None, None, None]


def _uniform(latents: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(len(latents), generator=generator, device=latents.device)


def _noise(latents: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(latents.shape, generator=generator, device=latents.device)
