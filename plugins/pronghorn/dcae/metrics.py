"""How near reconstructions are to their images: PSNR, SSIM, and how far two sets of features lie apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

RANGE = 2.0  # images go from -1 to 1
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
Features = Callable[[Tensor], Tensor]


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB.

    Args:
        x: [batch, channels, height, width] from -1 to 1.
        y: likewise.

    Returns:
        float64 [batch]; infinite where both are equal.

    Raises:
        ValueError: shapes differ, or are of another kind.
    """
    _check(x, y)
    error = (x.double() - y.double()).square().mean(dim=(1, 2, 3))
    return 10 * (RANGE**2 / error).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity in Gaussian windows of 11 by 11 places that lie within the image, the mean over channels.

    Args:
        x: [batch, channels, height, width] from -1 to 1, at least 11 high and wide.
        y: likewise.

    Returns:
        float64 [batch], 1 where both are equal.

    Raises:
        ValueError: shapes differ, are of another kind, or the images are too small.

    Source: Wang et al., Image Quality Assessment (IEEE Transactions on Image Processing 13, 2004), section III.
    """
    _check(x, y)
    if min(x.shape[2:]) < WINDOW:
        raise ValueError(f"x: got {tuple(x.shape)}, wanted a height and width of at least {WINDOW}")
    x, y = x.double(), y.double()
    window = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    window = (-(window**2) / (2 * SIGMA**2)).exp()
    window = window / window.sum()

    def averaged(values: Tensor) -> Tensor:
        of_each = values.flatten(0, 1)[:, None]
        return functional.conv2d(functional.conv2d(of_each, window[None, None, None]), window[None, None, :, None])

    mean_x, mean_y = averaged(x), averaged(y)
    variances = averaged(x * x) - mean_x.square() + averaged(y * y) - mean_y.square()
    covariance = averaged(x * y) - mean_x * mean_y
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    means = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (means * (2 * covariance + c2) / (variances + c2)).reshape(len(x), -1).mean(dim=1)


class _Moments:
    """Number, mean and scatter of vectors that come in parts."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.zeros(())

    def update(self, values: Tensor) -> None:
        """Take more, [n, size]."""
        values = values.detach().double()
        if values.dim() != 2:
            raise ValueError(f"features: got {tuple(values.shape)}, wanted [batch, size]")
        if not values.isfinite().all():
            raise ValueError("features: some numbers are not finite")
        if not len(values):
            return
        mean = values.mean(dim=0)
        scatter = (values - mean).T @ (values - mean)
        if not self.count:
            self.count, self.mean, self.scatter = len(values), mean, scatter
            return
        if mean.shape != self.mean.shape:
            raise ValueError(f"features: got {len(mean)} numbers, the ones before had {len(self.mean)}")
        total, apart = self.count + len(values), mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(apart, apart) * (self.count * len(values) / total)
        self.mean = self.mean + apart * (len(values) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """float64 [size, size]."""
        return self.scatter / (self.count - 1)


class FrechetDistance:
    """The Fréchet distance between two sets of features, each taken as a normal distribution, in float64.

    It is what the Fréchet Inception distance (FID) is if the features are that network's, and only then.

    Source: Heusel et al., GANs Trained by a Two Time-Scale Update Rule (arXiv 1706.08500), equation 6.
    """

    def __init__(self) -> None:
        self._sides = (_Moments(), _Moments())

    def update(self, one: Tensor, other: Tensor) -> None:
        """Take more features of both sets, each [batch, size].

        Raises:
            ValueError: sizes differ, or a number is not finite.
        """
        if one.shape[1:] != other.shape[1:]:
            raise ValueError(f"features: got {tuple(one.shape)} and {tuple(other.shape)}, wanted the same size")
        for side, values in zip(self._sides, (one, other), strict=True):
            side.update(values)

    def compute(self) -> float:
        """The distance.

        Raises:
            ValueError: a set has fewer than two.
        """
        one, other = self._sides
        if min(one.count, other.count) < 2:
            raise ValueError(f"features: got {one.count} and {other.count}, wanted at least two of each")
        # The trace of the root of a product is the sum of singular values of the roots' product.
        shared = torch.linalg.svdvals(_root(one.covariance) @ _root(other.covariance)).sum()
        spread = one.covariance.trace() + other.covariance.trace() - 2 * shared
        return max(0.0, float((one.mean - other.mean).square().sum() + spread))


@dataclass(frozen=True)
class ReconstructionMetrics:
    """What a set of reconstructions is like.

    Attributes:
        images: how many.
        psnr: mean over images of the peak signal-to-noise ratio, dB.
        ssim: mean over images of the structural similarity.
        frechet: Fréchet distance of features of images and reconstructions; an rFID if they are of FID's Inception.
        perceptual: mean over images of the perceptual distance that was given.
    """

    images: int
    psnr: float
    ssim: float
    frechet: float | None = None
    perceptual: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Reconstruction:
    """Adds up the metrics of reconstructions that come in batches.

    Args:
        features: of images [batch, 3, height, width] from -1 to 1, to [batch, size]; for a Fréchet distance.
        perceptual: a distance of images and reconstructions, one number or one for each image.
    """

    def __init__(
        self, *, features: Features | None = None, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        self._features, self._perceptual = features, perceptual
        self._frechet = FrechetDistance()
        self._images, self._sums = 0, torch.zeros(3, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Take images and their reconstructions, [batch, 3, height, width]; what of these is beyond -1 to 1 is cut.

        Returns:
            PSNR of each, float64 [batch].

        Raises:
            ValueError: shapes differ, images are smaller than 11, or a number is not finite.
        """
        for name, values in (("images", x), ("reconstructions", y)):
            if not values.isfinite().all():
                raise ValueError(f"{name}: some numbers are not finite")
        x, y = x.float(), y.float().clamp(-1, 1)
        found = psnr(x, y)
        sums = [found.sum(), ssim(x, y).sum(), torch.zeros(())]
        if self._perceptual is not None:
            sums[2] = torch.as_tensor(self._perceptual(x, y)).double().mean() * len(x)
        if self._features is not None:
            self._frechet.update(self._features(x), self._features(y))
        self._sums += torch.stack([value.double().cpu() for value in sums])
        self._images += len(x)
        return found

    def compute(self) -> ReconstructionMetrics:
        """The metrics of all.

        Raises:
            ValueError: there are none, or with features only one.
        """
        if not self._images:
            raise ValueError("images: there are none")
        means = (self._sums / self._images).tolist()
        return ReconstructionMetrics(
            self._images, means[0], means[1], None if self._features is None else self._frechet.compute(),
            None if self._perceptual is None else means[2],
        )  # fmt: skip


@torch.no_grad()
def evaluate(
    vae: Any, batches: Iterable[Tensor], *, features: Features | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> ReconstructionMetrics:  # fmt: skip
    """Metrics of what an autoencoder makes of images.

    Args:
        vae: any autoencoder of diffusers, in evaluation mode.
        batches: images [batch, 3, height, width] from -1 to 1.
        features: see `Reconstruction`.
        perceptual: see there.

    Raises:
        ValueError: as there, or the autoencoder is in training mode.
    """
    found = Reconstruction(features=features, perceptual=perceptual)
    for x in batches:
        x = x.to(next(vae.parameters()).device)
        found.update(x, reconstructed(vae, x))
    return found.compute()


def encoded(vae: Any, x: Tensor) -> Tensor:
    """Latent of images [batch, 3, height, width], in the autoencoder's dtype.

    Where the autoencoder gives a distribution, the most likely one.

    Raises:
        ValueError: the autoencoder is in training mode.
    """
    if vae.training:
        raise ValueError("vae: is in training mode; call its eval method first")
    found = vae.encode(x.to(next(vae.parameters()).dtype))
    latent: Tensor
    if hasattr(found, "latent_dist"):
        latent = found.latent_dist.mode()
    else:
        latent = found.latents if hasattr(found, "latents") else found.latent
    return latent


def compression_ratio(vae: Any) -> int:
    """Pixels of an image's edge for one place of the latent's.

    Raises:
        TypeError: it is no autoencoder of images that diffusers has.
    """
    own = getattr(vae, "spatial_compression_ratio", None)
    config = getattr(vae, "config", {})
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if own is None and (widths is None or not hasattr(vae, "encode")):
        raise TypeError(f"vae: got {type(vae).__name__}, wanted an autoencoder of images")
    return int(own or 2 ** (len(widths or ()) - 1))  # as diffusers' pipelines count it


def reconstructed(vae: Any, x: Tensor) -> Tensor:
    """What an autoencoder makes of images [batch, 3, height, width], in its dtype; see `encoded`."""
    y: Tensor = vae.decode(encoded(vae, x)).sample
    return y


def _root(matrix: Tensor) -> Tensor:
    """The square root of a covariance."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _check(x: Tensor, y: Tensor) -> None:
    if x.dim() != 4 or x.shape != y.shape:
        raise ValueError(
            f"y: got {tuple(y.shape)} for x {tuple(x.shape)}, wanted both [batch, channels, height, width]"
        )
