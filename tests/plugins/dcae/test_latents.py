"""Statistics of latents, images in and out, and the dump that goes on where it was broken off."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tests.plugins.dcae.test_autoencoder import small

from pronghorn.dcae.images import find_images, load_image, to_image
from pronghorn.dcae.latents import dump_latents, latent_statistics, read_latent, statistics_of_images


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for name, size in (("a/one.png", (40, 24)), ("a/two.jpg", (21, 50)), ("b/three.png", (16, 16))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_statistics_are_those_of_all_together():
    z = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0)) * 3 + torch.arange(4.0)[:, None, None]
    found = latent_statistics([z[:1], z[1:]])
    assert found.scaling_factor == pytest.approx(1 / z.square().mean().sqrt().item(), rel=1e-5)
    assert found.mean == pytest.approx(z.mean(dim=(0, 2, 3)).tolist(), rel=1e-4)
    assert found.std == pytest.approx(z.std(dim=(0, 2, 3), correction=0).tolist(), rel=1e-4)
    assert found.count == 6 * 15
    assert found.to_dict()["count"] == 90
    for latents, match in (([], "there are none"), ([z, z[:, :2]], "got 2 channels"), ([z * float("nan")], "finite")):
        with pytest.raises(ValueError, match=match):
            latent_statistics(latents)


@pytest.mark.fault(27)
def test_images_in_and_out(photos, tmp_path):
    assert [path.name for path in find_images(photos)] == ["one.png", "two.jpg", "three.png"]
    x = load_image(photos / "a/one.png", multiple=16)
    assert x.shape == (3, 32, 16)
    assert -1 <= x.min() < x.max() <= 1
    to_image(x).save(tmp_path / "again.png")
    torch.testing.assert_close(load_image(tmp_path / "again.png"), x)
    assert load_image(photos / "a/two.jpg", size=8).shape == (3, 8, 8)
    (photos / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(photos / "bad.png")
    with pytest.raises(ValueError, match="wanted at least 32"):
        load_image(photos / "b/three.png", multiple=32)


@pytest.mark.fault(8)
def test_a_dump_goes_on(photos, tmp_path):
    vae, out = small(), tmp_path / "latents"
    assert dump_latents(vae, photos, out, size=16, scaling_factor=0.5, batch_size=2, verbose=False) == 3
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert names == ["a/one.npy", "a/two.npy", "b/three.npy", "latents.json"]
    with torch.no_grad():
        wanted = vae.encode(load_image(photos / "a/one.png", size=16)[None]).latent[0] * 0.5
    torch.testing.assert_close(torch.from_numpy(np.load(out / "a/one.npy")), wanted)
    kept = (out / "a/two.npy").stat().st_mtime_ns
    (out / "a/one.npy").unlink()
    assert dump_latents(vae, photos, out, size=16, scaling_factor=0.5, verbose=False) == 1
    assert (out / "a/two.npy").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="size: got 15"):
        dump_latents(vae, photos, out, size=15)
    with pytest.raises(ValueError, match="dcae stats MODEL IMAGES --write"):
        dump_latents(vae, photos, out, size=16)
    Image.new("RGB", (16, 16)).save(photos / "a/one.jpg")
    with pytest.raises(ValueError, match="name of another one"):
        dump_latents(vae, photos, out, size=16, scaling_factor=1.0)


@pytest.mark.fault(8)
def test_what_breaks_leaves_no_half_files(photos, tmp_path):
    out = tmp_path / "latents"
    (photos / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"c\.png: cannot be read"):
        dump_latents(small(), photos, out, size=16, scaling_factor=1.0, batch_size=1, verbose=False)
    assert not list(out.rglob("*.part"))
    assert len(list(out.rglob("*.npy"))) >= 2


@pytest.mark.fault(6)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_no_number_is_not_written(photos, tmp_path, value):
    vae, out = small(), tmp_path / "latents"
    next(vae.encoder.parameters()).data.view(-1)[0] = value
    with pytest.raises(ValueError, match=r"one\.png: its latent holds NaN or Inf"):
        dump_latents(vae, photos, out, size=16, scaling_factor=1.0, verbose=False)
    assert not list(out.rglob("*.npy"))


def dump(photos, out, vae=None, **changed):
    given = {"size": 16, "scaling_factor": 0.5, "verbose": False, **changed}
    return dump_latents(vae or small(), photos, out, **given)


@pytest.mark.fault(9)
def test_latents_that_were_made_otherwise_never_mix(photos, tmp_path):
    out, other = tmp_path / "latents", small()
    next(other.encoder.parameters()).data.view(-1)[0] += 1
    dump(photos, out)
    (out / "b/three.npy").unlink()
    for changed, message in (
        ({"vae": other}, r"encoder was '\w+' and is '\w+'; wanted another folder"),
        ({"size": 8}, "size was 16 and is 8"), ({"scaling_factor": 0.25}, r"scaling_factor was 0\.5 and is 0\.25"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            dump(photos, out, **changed)
    (photos / "b").rename(photos / "c")
    with pytest.raises(ValueError, match=r"classes was \['a', 'b'\] and is \['a', 'c'\]"):
        dump(photos, out)
    (photos / "c").rename(photos / "b")
    assert not (out / "b/three.npy").exists()
    decoder = small()
    next(decoder.decoder.parameters()).data.view(-1)[0] += 1
    assert dump(photos, out, decoder) == 1  # the decoder makes no latents: after phase 3 they stay right


@pytest.mark.fault(19)
def test_an_older_folder_says_how_to_go_on(photos, tmp_path):
    out = tmp_path / "latents"
    dump(photos, out)
    (out / "b/three.npy").unlink()
    (out / "latents.json").unlink()
    with pytest.raises(ValueError, match=r"no latents\.json says what made them") as told:
        dump(photos, out)
    (out / "latents.json").write_text(str(told.value).split("latents.json: ")[1])
    assert dump(photos, out) == 1


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scaling_factor_is_a_number_above_0(photos, tmp_path, factor):
    with pytest.raises(ValueError, match=r"scaling_factor: got .*, wanted a finite number above 0"):
        dump(photos, tmp_path / "latents", scaling_factor=factor)
    assert not (tmp_path / "latents").exists()


@pytest.mark.fault(9)
def test_a_dump_that_fails_at_once_may_be_started_otherwise(photos, tmp_path):
    broken = small()
    next(broken.encoder.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        dump(photos, tmp_path / "latents", broken)
    assert dump(photos, tmp_path / "latents") == 3


KL = {
    "norm_num_groups": 4, "block_out_channels": (8, 8), "latent_channels": 4, "shift_factor": 0.25,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


@torch.no_grad()
def test_statistics_and_dump_of_other_autoencoders(photos, tmp_path):
    """As the SD-VAE's and FLUX's: a distribution's mode, less the shift that FLUX's has."""
    vae, path = diffusers.AutoencoderKL(**KL, scaling_factor=0.5).eval(), photos / "a/one.png"
    wanted = vae.encode(load_image(path, size=16)[None]).latent_dist.mode()
    found = statistics_of_images(vae, [path], size=16)
    assert found.scaling_factor == pytest.approx((wanted - 0.25).square().mean().rsqrt().item(), rel=1e-5)
    assert found.mean == pytest.approx(wanted.mean(dim=(0, 2, 3)).tolist(), rel=1e-4)
    assert dump_latents(vae, photos, tmp_path / "z", size=16, verbose=False) == 3
    torch.testing.assert_close(read_latent(tmp_path / "z/a/one.npy"), (wanted[0] - 0.25) * 0.5)
    with pytest.raises(ValueError, match="size: got 15, wanted a multiple of 2"):
        dump_latents(vae, photos, tmp_path / "odd", size=15)
    with pytest.raises(TypeError, match="vae: got Linear, wanted an autoencoder of images"):
        dump_latents(torch.nn.Linear(1, 1), photos, tmp_path / "none", size=16)


def test_statistics_in_half_precision(photos):
    paths = find_images(photos)
    wanted = statistics_of_images(small(), paths, size=16).scaling_factor
    assert statistics_of_images(small().bfloat16(), paths, size=16).scaling_factor == pytest.approx(wanted, rel=0.02)
