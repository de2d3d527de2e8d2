"""Metrics of reconstructions, against scikit-image and SciPy."""

import diffusers
import numpy as np
import pytest
import scipy.linalg
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tests.plugins.dcae.test_autoencoder import small

from pronghorn.dcae.metrics import FrechetDistance, Reconstruction, encoded, evaluate, psnr, reconstructed, ssim
from pronghorn.dcae.texture import texture_statistics


def pair(*shape, seed=0, noise=0.2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.avg_pool2d(torch.rand(*shape, generator=generator) * 2 - 1, 3, stride=1, padding=1)
    return x, (x + noise * torch.randn(*shape, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize("shape", [(3, 3, 24, 31), (1, 1, 11, 11), (2, 3, 64, 12)])
def test_psnr_and_ssim_are_those_of_scikit_image(shape):
    x, y = pair(*shape)
    for one, other, decibels, similarity in zip(x, y, psnr(x, y), ssim(x, y), strict=True):
        one, other = one.double().numpy(), other.double().numpy()
        assert decibels == pytest.approx(peak_signal_noise_ratio(one, other, data_range=2), rel=1e-9)
        wanted = structural_similarity(
            one, other, channel_axis=0, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert similarity == pytest.approx(wanted, abs=1e-9)


def test_equal_images():
    x, _ = pair(2, 3, 16, 16)
    assert psnr(x, x).isinf().all()
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))


def features(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixed + seed


def frechet(one, other):
    found = FrechetDistance()
    for parts in zip(one.split(7), other.split(7), strict=True):
        found.update(*parts)
    return found.compute()


# The last has fewer vectors than numbers: its covariance has no full rank.
@pytest.mark.parametrize(("count", "size"), [(50, 6), (200, 20), (9, 12)])
def test_frechet_distance_is_that_of_scipy(count, size):
    one, other = features(count, size, 1), features(count, size, 2)
    covariances = [np.cov(side.numpy(), rowvar=False) for side in (one, other)]
    apart = (one.mean(dim=0) - other.mean(dim=0)).square().sum().item()
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    wanted = apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root).real
    assert frechet(one, other) == pytest.approx(wanted, rel=1e-5)
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)
    # Far from zero: the covariance does not drown in the mean.
    assert frechet(one + 1e4, other + 1e4) == pytest.approx(wanted, rel=1e-5)


def test_frechet_distance_of_parts_is_that_of_all():
    one, other = features(40, 5, 3), features(40, 5, 4)
    whole = FrechetDistance()
    whole.update(one, other)
    assert whole.compute() == pytest.approx(frechet(one, other), rel=1e-10)


def test_texture_tells_blur():
    sharp, _ = pair(30, 3, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, stride=1, padding=1)
    near, far = ((texture_statistics(sharp), texture_statistics(sharp + shift)) for shift in (0, blurred - sharp))
    assert near[0].shape == (30, 3 * 2 * 5)
    assert frechet(*far) > 100 * frechet(*near)
    with pytest.raises(ValueError, match="at least 16"):
        texture_statistics(torch.zeros(1, 3, 15, 20))


def test_evaluate_an_autoencoder():
    vae, (x, _) = small(), pair(5, 3, 16, 12)
    found = evaluate(
        vae, x.split(2), features=lambda images: images.flatten(1)[:, :4], perceptual=lambda x, y: (x - y).abs().mean()
    )
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent).sample.clamp(-1, 1)
    assert found.images == 5
    assert found.psnr == pytest.approx(psnr(x, y).mean().item(), rel=1e-5)
    assert found.ssim == pytest.approx(ssim(x, y).mean().item(), rel=1e-4)
    assert found.perceptual == pytest.approx((x - y).abs().mean().item(), rel=1e-5)
    assert found.frechet == pytest.approx(frechet(x.flatten(1)[:, :4], y.flatten(1)[:, :4]), rel=1e-4)
    assert found.to_dict()["images"] == 5
    assert evaluate(vae, [x]).frechet is None
    assert evaluate(vae.to(torch.bfloat16), [x]).psnr == pytest.approx(found.psnr, abs=0.1)


@torch.no_grad()
@pytest.mark.parametrize("make", [
    lambda: diffusers.AutoencoderKL(norm_num_groups=4, block_out_channels=(8, 8), latent_channels=4,
                                    down_block_types=("DownEncoderBlock2D",) * 2,
                                    up_block_types=("UpDecoderBlock2D",) * 2),
    lambda: diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                                      num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)),
    lambda: diffusers.VQModel(norm_num_groups=4, block_out_channels=(8, 8), latent_channels=4,
                              down_block_types=("DownEncoderBlock2D",) * 2,
                              up_block_types=("UpDecoderBlock2D",) * 2),
])  # fmt: skip
def test_other_autoencoders(make):
    vae, x = make().eval(), torch.zeros(1, 3, 16, 12)
    assert encoded(vae, x).shape == (1, 4, 8, 6)
    assert reconstructed(vae, x).shape == x.shape


def test_bad_input_is_named():
    x, y = pair(2, 3, 16, 16)
    for call in (psnr, ssim):
        with pytest.raises(ValueError, match=r"y: got \(2, 3, 16, 15\)"):
            call(x, y[..., :15])
    with pytest.raises(ValueError, match="at least 11"):
        ssim(x[..., :10], y[..., :10])
    for one, other, name in ((x * float("nan"), y, "images"), (x, y / 0, "reconstructions")):
        with pytest.raises(ValueError, match=f"{name}: some numbers"):
            Reconstruction().update(one, other)
    with pytest.raises(ValueError, match="there are none"):
        Reconstruction().compute()
    with pytest.raises(ValueError, match="training mode"):
        evaluate(small().train(), [x])
    distance = FrechetDistance()
    for one, other, match in ((x, x, "wanted .batch, size."), (x[:, 0, 0], x[:, 0, 0, :3], "the same size"),
                              (x[:, 0, 0] * float("inf"), x[:, 0, 0], "not finite")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            distance.update(one, other)
    distance.update(x[:1, 0, 0], y[:1, 0, 0])
    with pytest.raises(ValueError, match="got 1 and 1"):
        distance.compute()
    with pytest.raises(ValueError, match="got 3 numbers"):
        distance.update(x[:, 0, 0, :3], y[:, 0, 0, :3])
