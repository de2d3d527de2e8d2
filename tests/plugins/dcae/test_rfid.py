"""rFID by a feature network that the user names on the command line."""

import json
import logging

import pytest
import torch
from tests.plugins.dcae.test_autoencoder import small
from tests.plugins.dcae.test_cli import run
from tests.plugins.dcae.test_crops import picture
from tests.plugins.dcae.test_latents import photos  # noqa: F401 - a fixture

from pronghorn.dcae.features import checked_features
from pronghorn.dcae.images import find_images, load_image
from pronghorn.dcae.metrics import evaluate

NETWORKS = """
import torch

def colours(images):
    assert images.abs().max() <= 1
    return images.mean(dim=(2, 3))

def flat(images):
    return images.flatten(2)

def one_row(images):
    return images.mean(dim=(0, 2, 3))[None]

def many(images):
    return [images.mean(dim=(2, 3))]

def numbers(images):
    return images.mean(dim=(2, 3)) / 0

def whole(images):
    return images.mean(dim=(2, 3)).long()

class Network(torch.nn.Module):
    def forward(self, images):
        assert not self.training
        return images.mean(dim=(2, 3))

network = Network()
number = 3
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """A module of networks in the folder that commands are called in."""
    (tmp_path / "my_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_networks", raising=False)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def folder(tmp_path):
    small(scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def colours(images):
    return images.mean(dim=(2, 3))


def test_reconstruct(networks, folder, photos, tmp_path):  # noqa: F811
    given = ("reconstruct", folder, photos, tmp_path / "out", "--device", "cpu")
    assert "rFID" not in run(*given)
    said = run(*given, "--rfid", "my_networks:colours").splitlines()[-1]
    batches = [load_image(path, multiple=2)[None] for path in find_images(photos)]
    wanted = evaluate(small(), batches, features=colours)
    figures = f"PSNR {wanted.psnr:.2f} dB, SSIM {wanted.ssim:.4f}, rFID {wanted.frechet:.4g}"
    assert said == f"3 images: {figures} by my_networks:colours"
    assert "images" in run(*given, "--rfid", "my_networks:colours", "--dry-run")
    picture(30, 8).save(photos / "small.png")
    with pytest.raises(ValueError, match=r"small\.png: .*11"):
        run(*given, "--rfid", "my_networks:colours")


def test_compare(networks, folder, photos, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "120")
    given = ("compare", folder, photos, tmp_path / "out", "--size", 16, "--device", "cpu")
    assert "texture" in run(*given)
    told = json.loads((tmp_path / "out/metrics.json").read_text())
    assert told["features"] == "pronghorn.dcae.texture:texture_statistics"
    said = run(*given, "--rfid", "my_networks:network")
    assert "rFID" in said
    assert "texture" not in said
    told = json.loads((tmp_path / "out/metrics.json").read_text())
    assert told["features"] == "my_networks:Network"
    batch = torch.stack([load_image(path, size=16) for path in find_images(photos)])
    wanted = evaluate(small(), [batch], features=colours).frechet
    assert told["models"][0]["frechet"] == pytest.approx(wanted, rel=1e-4)


def test_train(networks, folder, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        picture(40, 36, number).save(tmp_path / "pictures" / f"{number}.png")
    given = ("train", folder, tmp_path / "pictures", tmp_path / "run", "--phase", 1, "--steps", 2, "--batch-size", 2,
             "--resolution", 16, "--evaluate-every", 1, "--rfid", "my_networks:colours")  # fmt: skip
    with pytest.raises(ValueError, match="no images are held out for it; wanted --held-out"):
        run(*given)
    said = run(*given, "--held-out", tmp_path / "pictures")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(line["held_out_frechet"] >= 0 for line in lines)
    assert f"rFID {lines[-1]['held_out_frechet']:.4g} by my_networks:colours" in said
    report = json.loads((tmp_path / "run/model/quality.json").read_text())
    assert report["figures"]["source"].keys() == report["figures"]["trained"].keys() >= {"frechet"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_networks", "wanted package.module:function"),
        ("my_networks:nothing", "wanted package.module:function; module 'my_networks' has no attribute 'nothing'"),
        ("no_such_module:network", "wanted package.module:function; No module named 'no_such_module'"),
        (".my_networks:network", "wanted package.module:function"),
        ("my_networks:number", "wanted a function, not int"),
        ("my_networks:Network", "which is a class; wanted a function of images"),
        ("my_networks:flat", r"makes \(2, 3, 256\) of torch.float32 of images \(2, 3, 16, 16\); wanted features"),
        ("my_networks:one_row", r"makes \(1, 3\) of torch.float32"),
        ("my_networks:many", "makes list of images"),
        ("my_networks:whole", r"makes \(2, 3\) of torch.int64"),
        ("my_networks:numbers", "makes numbers that are not finite"),
    ],
)
def test_what_gives_no_features_is_named_before_any_work(networks, folder, photos, tmp_path, name, message):  # noqa: F811
    with pytest.raises(ValueError, match=f"rfid: got '{name}', .*{message}"):
        run("compare", folder, photos, tmp_path / "out", "--size", 16, "--device", "cpu", "--rfid", name)
    assert not (tmp_path / "out").exists()


def test_how_many_images_it_needs(networks, folder, photos, tmp_path, caplog):  # noqa: F811
    given = {"size": 16, "device": "cpu"}
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        assert checked_features("colours", colours, images=4, **given) is colours
    assert not caplog.text
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        checked_features("colours", colours, images=3, **given)
    assert "3 images for 3 features; wanted more images than features, and papers have 50000" in caplog.text
    with pytest.raises(ValueError, match="rfid: got 1 image, wanted at least two"):
        run("reconstruct", folder, photos / "b", tmp_path / "out", "--rfid", "my_networks:colours", "--device", "cpu")
    assert not (tmp_path / "out").exists()
