"""The commands, as users type them."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tests.plugins.dcae.test_autoencoder import small
from tests.plugins.dcae.test_latents import KL, photos  # noqa: F401 - a fixture
from typer.testing import CliRunner

from pronghorn.dcae import CONFIGURATIONS, AutoencoderDC
from pronghorn.dcae.cli import app
from pronghorn.dcae.diffusers.loading import load_dcae
from pronghorn.dcae.latents import read_latent
from pronghorn.files.sealed import seal


def run(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def folder(tmp_path, monkeypatch):
    model = small(scaling_factor=0.5)
    monkeypatch.setitem(CONFIGURATIONS, "tiny", model.architecture)
    model.save_pretrained(tmp_path / "diffusers")
    return tmp_path / "diffusers"


def test_convert_there_and_back(folder, tmp_path):
    run("convert", folder, tmp_path / "official", "--to", "efficientvit", "--name", "tiny")
    assert "0.0" in run("convert", tmp_path / "official", tmp_path / "back")
    ours, theirs = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (tmp_path / "back", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    diffusers.AutoencoderDC.from_pretrained(tmp_path / "back")
    run("convert", tmp_path / "official" / "model.safetensors", tmp_path / "file", "--config", "tiny")
    with pytest.raises(ValueError, match="to: got 'onnx'"):
        run("convert", folder, tmp_path / "x", "--to", "onnx")


def test_what_is_converted_is_read_again_whatever_it_is_called(folder, tmp_path, monkeypatch):
    def written(*words):
        run("convert", folder, tmp_path / "official", "--to", "efficientvit", *words)
        run("convert", tmp_path / "official", tmp_path / "back")
        back = load_dcae(tmp_path / "back")
        assert back.architecture == load_dcae(folder).architecture
        return json.loads((tmp_path / "official" / "config.json").read_text())

    assert written() == {"model_name": "tiny"}
    assert written("--name", "mine")["model_name"] == "mine"
    for name, there in (("tiny", {"scaling_factor": 0.25}), ("other", {"latent_channels": 16})):
        monkeypatch.setitem(CONFIGURATIONS, name, small(**there).architecture)
    found = written()  # the scaling factor alone is another one than that of the name
    assert found["model_name"] == "tiny"
    assert found["architecture"]["scaling_factor"] == 0.5
    with pytest.raises(ValueError, match="got other, which is another architecture; wanted one of tiny"):
        run("convert", folder, tmp_path / "x", "--to", "efficientvit", "--name", "other")
    monkeypatch.delitem(CONFIGURATIONS, "tiny")
    with pytest.raises(ValueError, match="model_name: got None, wanted one, as no published"):
        run("convert", folder, tmp_path / "x", "--to", "efficientvit")
    assert not (tmp_path / "x").exists()
    (tmp_path / "official" / "config.json").write_text('{"model_name": "tiny", "architecture": {"width": 3}}')
    seal(tmp_path / "official")
    with pytest.raises(ValueError, match=r"config\.json: architecture: width: no setting"):
        load_dcae(tmp_path / "official")


@pytest.mark.parametrize("tile", [0, 8])
def test_reconstruct(folder, photos, tmp_path, tile):  # noqa: F811
    output = run("reconstruct", folder, photos, tmp_path / "out", "--tile", tile, "--device", "cpu")
    assert output.count("PSNR") == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a-one.png", "a-two.png", "b-three.png"]


def test_stats_and_dump(folder, photos, tmp_path):  # noqa: F811
    said = run("stats", folder, photos, "--size", 16, "--output", tmp_path / "stats.json", "--device", "cpu")
    found = json.loads((tmp_path / "stats.json").read_text())
    assert f"{found['scaling_factor']:.5f}" in said
    assert len(found["mean"]) == 8
    assert "3 latents" in run("dump", folder, photos, tmp_path / "z", "--size", 16, "--device", "cpu")
    assert "0 latents" in run("dump", folder, photos, tmp_path / "z", "--size", 16, "--device", "cpu")


@pytest.mark.parametrize("command", ["stats", "dump", "compare"])
def test_a_batch_has_images(folder, photos, tmp_path, command):  # noqa: F811
    words = [command, folder, photos, *([] if command == "stats" else [tmp_path / "out"]), "--batch-size", 0]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 2
    assert "greater than or equal to 1" in done.output


def test_stats_and_dump_of_another_autoencoder(photos, tmp_path):  # noqa: F811
    diffusers.AutoencoderKL(**KL, scaling_factor=0.5).save_pretrained(tmp_path / "kl")
    assert "scaling_factor" in run("stats", tmp_path / "kl", photos, "--size", 16, "--device", "cpu")
    assert "3 latents" in run("dump", tmp_path / "kl", photos, tmp_path / "z", "--size", 16, "--device", "cpu")


def test_a_scaling_factor_is_written_where_dump_looks(photos, tmp_path):  # noqa: F811
    small().save_pretrained(tmp_path / "vae")
    given = (photos, tmp_path / "z", "--size", 16, "--device", "cpu")
    with pytest.raises(ValueError, match="`pronghorn dcae stats MODEL IMAGES --write`"):
        run("dump", tmp_path / "vae", *given)
    before = json.loads((tmp_path / "vae/config.json").read_text())
    run("stats", tmp_path / "vae", photos, "--size", 16, "--device", "cpu")
    assert json.loads((tmp_path / "vae/config.json").read_text()) == before
    output = tmp_path / "stats.json"
    run("stats", tmp_path / "vae", photos, "--size", 16, "--device", "cpu", "--write", "--output", output)
    factor = json.loads(output.read_text())["scaling_factor"]
    assert json.loads((tmp_path / "vae/config.json").read_text()) == {**before, "scaling_factor": factor}
    assert AutoencoderDC.from_pretrained(tmp_path / "vae").config.scaling_factor == factor  # its seal holds
    assert "3 latents" in run("dump", tmp_path / "vae", *given)
    z = torch.cat([read_latent(path).flatten() for path in sorted((tmp_path / "z").rglob("*.npy"))])
    assert z.square().mean() == pytest.approx(1, rel=1e-4)
    diffusers.AutoencoderKL(**KL, scaling_factor=0.5).save_pretrained(tmp_path / "kl")
    run("stats", tmp_path / "kl", photos, "--size", 16, "--device", "cpu", "--write")
    run("dump", tmp_path / "kl", photos, tmp_path / "of-kl", "--size", 16, "--device", "cpu")
    z = torch.cat([read_latent(path).flatten() for path in sorted((tmp_path / "of-kl").rglob("*.npy"))])
    assert z.square().mean() == pytest.approx(1, rel=1e-4)  # also where a shift is taken off first
    for nowhere in ("someone/model", tmp_path / "photos"):
        with pytest.raises(ValueError, match="no place for a scaling factor"):
            run("stats", nowhere, photos, "--write", "--device", "cpu")
