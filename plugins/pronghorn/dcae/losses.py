"""What an autoencoder is trained on, besides L1: a perceptual distance, and a game against a discriminator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 4
MOST_ADAPTIVE = 1e4


def pyramid_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean L1 distance of the bands of two Laplacian pyramids, and of their gradients: a stand-in for LPIPS.

    It knows edges and scales, and nothing of what is to be seen: no network was trained for it, and its numbers are no
    LPIPS. For that, give the trainer the callable of the package `lpips`.

    Args:
        x: [batch, channels, height, width].
        y: likewise.

    Returns:
        A scalar, 0 for equal images.

    Raises:
        ValueError: shapes differ.

    Source: Bojanowski et al. (arXiv 1707.05776), section 3.1, for the pyramid.
    """
    if x.shape != y.shape:
        raise ValueError(f"y: got {tuple(y.shape)}, wanted that of x, {tuple(x.shape)}")
    rest, total = x - y, x.new_zeros(())
    for level in range(LEVELS):
        last = level == LEVELS - 1 or min(rest.shape[2:]) < 2
        if last:
            band = rest
        else:
            smaller = functional.avg_pool2d(rest, 2, ceil_mode=True)
            band = rest - functional.interpolate(smaller, size=rest.shape[2:], mode="bilinear")
            rest = smaller
        total = total + band.abs().mean()
        for axis in (2, 3):
            if band.shape[axis] > 1:
                total = total + band.diff(dim=axis).abs().mean()
        if last:
            break
    return total


def hinge_of_discriminator(real: Tensor, made: Tensor) -> Tensor:
    """A discriminator's loss, of its scores of real and made images: hinge, halved.

    Source: Lim and Ye, Geometric GAN (arXiv 1705.02894).
    """
    return (functional.relu(1 - real).mean() + functional.relu(1 + made).mean()) / 2


def hinge_of_generator(made: Tensor) -> Tensor:
    """The loss of what made images, of their scores."""
    return -made.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, layer: Tensor) -> Tensor:
    """How the adversarial loss has to be weighted for its gradient at a layer to be as large as reconstruction's.

    Args:
        reconstruction: scalar loss, whose graph is kept.
        adversarial: likewise.
        layer: weight of the decoder's last layer.

    Returns:
        A scalar without gradient, at most 10⁴.

    Source: Esser et al., Taming Transformers (arXiv 2012.09841), equation 7.
    """
    wanted, given = (
        torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    )
    return (wanted / (given + 1e-4)).clamp(0, MOST_ADAPTIVE).detach()
