"""What is made of times, images, states and tasks before a model sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STATE_BINS = 256


def sincos(time: Tensor, width: int, shortest: float = 4e-3, longest: float = 4.0) -> Tensor:
    """Sines, then cosines, of times, with periods spaced evenly on a logarithmic scale.

    Args:
        time: [...].
        width: even.
        shortest: period, in units of time.
        longest: period.

    Returns:
        float64 [..., width].

    Raises:
        ValueError: `width` is odd.
    """
    if width % 2:
        raise ValueError(f"width: got {width}, wanted an even number")
    steps = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = shortest * (longest / shortest) ** steps
    angles = 1.0 / period * 2 * math.pi * time[..., None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def resize_with_padding(images: Tensor, height: int, width: int, *, centred: bool = False) -> Tensor:
    """Scale images to fit, with their aspect kept, and fill the rest with zeros.

    Args:
        images: float [batch, channels, h, w], 0 to 1.
        height: of the result.
        width: of the result.
        centred: fill on both sides, as LeRobot and openpi do; otherwise on the left and on top, as VLASH does.

    Returns:
        [batch, channels, height, width], 0 to 1; `to_model_range` comes after.

    Raises:
        ValueError, TypeError: `images` has another rank or is not floating point.
    """
    if images.dim() != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}, wanted [batch, channels, h, w]")
    if not images.is_floating_point():
        raise TypeError(f"images: got {images.dtype}, wanted floating point from 0 to 1")
    ratio = max(images.shape[3] / width, images.shape[2] / height)
    inner = (int(images.shape[2] / ratio), int(images.shape[3] / ratio))
    if inner != images.shape[2:]:
        images = F.interpolate(images, size=inner, mode="bilinear", align_corners=False)
    top, left = height - inner[0], width - inner[1]
    if centred:
        return F.pad(images, (left // 2, left - left // 2, top // 2, top - top // 2))
    return F.pad(images, (left, 0, top, 0))


def to_model_range(images: Tensor) -> Tensor:
    """From 0 ... 1 to -1 ... 1, which SigLIP takes."""
    return images * 2.0 - 1.0


def state_bins(state: Tensor) -> Tensor:
    """Each coordinate of a normalised state as one of 256 equal bins of -1 ... 1.

    Args:
        state: [..., state_dim].

    Returns:
        int64 [..., state_dim]: -1 at and below -1, 255 above the last edge. A value on an edge is of the bin below.
    """
    edges = torch.linspace(-1, 1, STATE_BINS + 1, device=state.device)[:-1]
    return torch.bucketize(state.contiguous(), edges) - 1


def prompt(task: str, bins: Sequence[int] | None = None) -> str:
    """The text that pi0.5 reads.

    Args:
        task: what is to be done.
        bins: of `state_bins`; None where the model sees the state elsewhere.
    """
    words = task.strip().translate({ord("_"): " ", ord("\n"): " "})
    state = "" if bins is None else f", State: {' '.join(map(str, bins))}"
    return f"Task: {words}{state};\nAction: "
