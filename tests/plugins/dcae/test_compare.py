"""Autoencoders side by side: as many tokens for each, pictures, metrics, and the command."""

import json

import diffusers
import pytest
import torch
from PIL import Image
from tests.plugins.dcae.test_autoencoder import small
from tests.plugins.dcae.test_cli import run
from tests.plugins.dcae.test_latents import photos  # noqa: F401 - a fixture

from pronghorn.dcae.compare import Budget, budgets, compare
from pronghorn.dcae.diffusers.loading import load_autoencoder
from pronghorn.dcae.images import load_image
from pronghorn.dcae.metrics import evaluate
from pronghorn.dcae.texture import texture_statistics


def shallow():
    """As Stable Diffusion's, with a ratio of 4."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        norm_num_groups=4, block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4,
    ).eval()  # fmt: skip


def test_budgets():
    deep, other = (32, 32), (8, 4)
    found = budgets({"deep": deep, "other": other}, 512)
    assert found["deep"] == Budget(32, 32, 1, 256, 8192, 32)
    assert found["other"] == Budget(8, 4, 4, 256, 16384, 64)
    assert budgets({"deep": deep, "other": other}, 512, tokens=64)["other"].patch_size == 8
    # 8 and 12 pixels fit into 24.
    assert [of.patch_size for of in budgets({"a": (8, 4), "b": (12, 4)}, 48).values()] == [3, 2]
    with pytest.raises(ValueError, match="accepted for ratios 32, 8 at 512 pixels are 256, 64, 16, 4, 1"):
        budgets({"deep": deep, "other": other}, 512, tokens=1024)
    with pytest.raises(ValueError, match="size: got 100, wanted a multiple of 32 for deep"):
        budgets({"deep": deep}, 100)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_compare(photos, tmp_path, batch_size):  # noqa: F811
    vaes, out = {"ours": small(), "shallow": shallow()}, tmp_path / "out"
    found = compare(vaes, photos, out, size=16, batch_size=batch_size, features=texture_statistics, verbose=False)
    assert [(one.name, one.budget.ratio, one.budget.patch_size) for one in found] == [("ours", 2, 2), ("shallow", 4, 1)]
    x = torch.stack([load_image(path, size=16) for path in sorted(photos.rglob("*.*g"))])
    for one, vae in zip(found, vaes.values(), strict=True):
        wanted = evaluate(vae, [x], features=texture_statistics)
        assert one.metrics.images == wanted.images
        for name in ("psnr", "ssim", "frechet"):
            assert getattr(one.metrics, name) == pytest.approx(getattr(wanted, name), rel=1e-4)
    assert sorted(path.name for path in out.iterdir()) == ["a-one.png", "a-two.png", "b-three.png", "metrics.json"]
    told = json.loads((out / "metrics.json").read_text())
    assert told["models"] == [one.to_dict() for one in found]
    with Image.open(out / "a-one.png") as sheet:
        width, height = sheet.size
        image = sheet.crop((0, height - 16, 16, height))
    assert width > 3 * 16
    image.save(tmp_path / "image.png")
    torch.testing.assert_close(load_image(tmp_path / "image.png"), x[0], atol=2 / 255, rtol=0)


def test_what_cannot_be_compared(photos, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="size: shallow makes a latent"):
        compare({"shallow": shallow()}, photos, tmp_path / "out", size=18, verbose=False)
    with pytest.raises(ValueError, match="training mode"):
        compare({"ours": small().train()}, photos, tmp_path / "out", size=16, verbose=False)
    Image.new("RGB", (16, 16)).save(photos / "a/one.jpg")
    with pytest.raises(ValueError, match="name of another one"):
        compare({"ours": small()}, photos, tmp_path / "out", size=16, verbose=False)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def folders(tmp_path):
    vae = small()
    vae.save_pretrained(tmp_path / "ours")
    vae.save_efficientvit(tmp_path / "official", model_name="tiny")
    shallow().save_pretrained(tmp_path / "shallow")
    return tmp_path


def test_load_autoencoder(folders, monkeypatch):
    from pronghorn.dcae import CONFIGURATIONS, AutoencoderDC

    monkeypatch.setitem(CONFIGURATIONS, "tiny", small().architecture)
    kinds = {"ours": AutoencoderDC, "official": AutoencoderDC, "shallow": diffusers.AutoencoderKL}
    for name, kind in kinds.items():
        loaded = load_autoencoder(folders / name)
        assert type(loaded) is kind
        assert not loaded.training
    diffusers.UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                          layers_per_block=1).save_pretrained(folders / "unet")  # fmt: skip
    with pytest.raises(TypeError, match="is a UNet2DModel, wanted an autoencoder"):
        load_autoencoder(folders / "unet")


def test_the_command(folders, photos, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "120")
    words = ["--size", 16, "--device", "cpu"]
    said = run("compare", folders / "ours", folders / "shallow", photos, folders / "out", *words)
    assert all(word in said for word in ("f2c8", "f4c4", "3 images", "texture"))
    models = json.loads((folders / "out" / "metrics.json").read_text())["models"]
    assert [model["tokens"] for model in models] == [16, 16]
    run("compare", folders / "ours", photos / "b", folders / "alone", *words)
    assert json.loads((folders / "alone" / "metrics.json").read_text())["models"][0]["frechet"] is None
    with pytest.raises(ValueError, match="tokens: got 17"):
        run("compare", folders / "ours", photos, folders / "out", *words, "--tokens", 17)
    with pytest.raises(ValueError, match="wanted each once"):
        run("compare", folders / "ours", folders / "ours", photos, folders / "out", *words)
