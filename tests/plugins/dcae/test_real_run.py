"""Pieces of benchmarks/dcae_photos.py and dcae_digits.py on tiny inputs: what is trained, scored, written and drawn."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.plugins.dcae.test_crops import picture

from pronghorn.dcae import FlowODEScheduler, USiTPipeline, UViT2DModel
from pronghorn.dcae.diffusers.training import Latents
from pronghorn.dcae.latents import dump_latents

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def photos(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("dcae_photos")


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("dcae_digits")


def short(room, monkeypatch):
    """Phases of two steps on small crops."""
    real = room.phases
    monkeypatch.setattr(
        room, "phases", lambda scale: [replace(phase, steps=2, batch_size=2, resolution=32, warmup_steps=0)
                                       for phase in real(scale)]
    )  # fmt: skip


def test_whole_photographs_are_held_out(photos, monkeypatch, tmp_path):
    for number, name in enumerate(("Picture_0B.jpg", "friends_1.jpg", "Fossa_2.jpg", "lake.jpg")):
        picture(400, 340, number).save(tmp_path / name)
    monkeypatch.setattr(photos, "fetched", lambda: sorted(tmp_path.iterdir()))
    seen, held_out = photos.photographs()
    assert (len(seen), len(held_out)) == (8, 3)  # of scikit-image 7 and 1; a drawing is neither
    assert all(min(image.size) <= photos.EDGE + 2 for image in seen + held_out)


def test_without_debian_there_are_fewer_photographs_and_it_is_said(photos, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(photos, "CACHE", tmp_path / "photos")
    monkeypatch.setattr(photos.shutil, "which", lambda name: None)
    seen, held_out = photos.photographs()
    assert (len(seen), len(held_out)) == (7, 1)
    assert "apt-get is not there" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_photographs(photos, monkeypatch, tmp_path):
    short(photos, monkeypatch)
    monkeypatch.setattr(photos, "SIZE", 64)
    squares = torch.rand(2, 3, 64, 64) * 2 - 1
    rows, pictures = photos.run([picture(48, 40, seed) for seed in range(2)], squares, 1.0)
    assert [(found["what"], found["against"]) for found in rows] == [
        ("PSNR after phase 1", "before it"), ("PSNR after phase 1", "without residual autoencoding"),
        ("PSNR after phase 2", "before it"), ("PSNR after phase 3", "before it"),
    ]  # fmt: skip
    assert [rows[place]["theirs"] for place in (2, 3)] == [rows[place]["ours"] for place in (0, 2)]
    assert list(pictures) == ["photograph", "after phase 1", "without shortcuts", "after phase 2", "after phase 3"]
    assert torch.equal(pictures["photograph"], squares)
    photos.draw(pictures, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (20 + 2 * 64, 5 * 64, 3)
    shown = torch.from_numpy(sheet[20:84, :64].copy()).permute(2, 0, 1)
    assert torch.equal(shown, ((squares[0] + 1) * 127.5).round().byte())


def test_digits_are_what_scikit_learn_has(digits):
    seen, held_out = digits.digits()
    assert (len(seen.labels), len(held_out.labels)) == (1347, 450)
    assert seen.pictures.shape == (1347, 3, 32, 32)
    assert held_out.labels.bincount().min() > 40
    theirs = {tuple(image.flatten()) for image in importlib.import_module("sklearn.datasets").load_digits().images}
    ours = digits.small(held_out.pictures)
    assert (ours >= 0).all()
    assert (ours <= 16).all()
    nearest = min(np.abs(np.array(sorted(theirs)) - ours[0]).mean(axis=1))
    assert nearest < 1  # of 16: upsampled and averaged again


def test_measures_of_samples(digits):
    seen, held_out = digits.digits()
    assert digits.nearest(seen, seen) == pytest.approx(0, abs=1e-3)
    assert digits.nearest(held_out, seen) > 5
    same = digits.Digits(held_out.pictures[:1].expand(20, -1, -1, -1), torch.arange(10).repeat_interleave(2))
    assert digits.spread(same) == pytest.approx(0, abs=1e-3)
    assert digits.spread(held_out) > 10


def test_a_run_on_digits(digits, tmp_path):
    seen, held_out = digits.digits()
    places = torch.cat([(seen.labels == label).nonzero()[:4, 0] for label in range(digits.CLASSES)])
    few = digits.Digits(seen.pictures[places], seen.labels[places])
    digits.write_pictures(few, tmp_path / "images")
    vae = digits.scaled(digits.autoencoder(tmp_path / "images", tmp_path / "autoencoder", 2), few)
    z = vae.encode(few.pictures).latent
    assert vae.config.scaling_factor == pytest.approx(1 / z.square().mean().sqrt().item(), rel=1e-4)
    assert dump_latents(vae, tmp_path / "images", tmp_path / "latents", size=digits.SIZE, verbose=False) == 40
    data = Latents(tmp_path / "latents")
    assert data.classes == [str(label) for label in range(10)]
    assert data[0][0].shape == (4, 4, 4)
    pipe = digits.diffusion(vae, tmp_path / "latents", tmp_path / "diffusion", 2, hidden_size=16)
    samples = digits.sampled(pipe, 1, steps=2)
    assert samples.pictures.shape == (10, 3, 32, 32)
    rows = digits.score(seen, held_out, vae, samples, "note")
    named = {found["what"]: found for found in rows}
    assert named["recognised, samples"]["theirs"]["p50"] > 0.97
    assert named["recognised, samples"]["ours"]["p50"] < digits.LEAST  # of noise
    assert len(rows) == 4
    digits.draw(samples, tmp_path / "digits.png", columns=1)
    assert Image.open(tmp_path / "digits.png").size == (24 + 36, 360)


def test_too_few_recognised_samples_fail(digits, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["dcae_digits.py", "--each", "1"])
    monkeypatch.setattr(digits, "autoencoder", lambda images, output, steps: digits.AutoencoderDC(
        **digits.CONFIG.to_dict()).eval())  # fmt: skip
    model = {"sample_size": 4, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_attention_heads": 2,
             "num_classes": 10}  # fmt: skip
    monkeypatch.setattr(digits, "diffusion", lambda vae, latents, output, steps: USiTPipeline(
        vae, UViT2DModel(**model).eval(), FlowODEScheduler(method="euler")))  # fmt: skip
    with pytest.raises(SystemExit, match="too few samples are recognised"):
        digits.main()
    assert json.loads((tmp_path / "dcae_digits-cpu.json").read_text())["topic"] == "dcae_digits"
    assert (tmp_path / "dcae_digits.png").is_file()
