"""The commands that train and sample, as users type them."""

import importlib.util
import json
import sys
import types
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.plugins.dcae.test_autoencoder import small
from tests.plugins.dcae.test_cli import run
from tests.plugins.dcae.test_crops import picture
from tests.plugins.dcae.test_diffusion_training import dumped
from tests.plugins.dcae.test_training import BrokenOffError
from typer.main import get_command
from typer.testing import CliRunner

from pronghorn.dcae import CONFIGURATIONS, DCAEDiTPipeline, DiffusionConfig, DiT2DModel, PhaseConfig, UViT2DModel
from pronghorn.dcae.cli import app
from pronghorn.dcae.crops import batches
from pronghorn.dcae.diffusers.loading import load_dcae, start_dcae
from pronghorn.dcae.diffusers.training import autoencoder as room
from pronghorn.dcae.diffusers.training import new_model
from pronghorn.dcae.losses import pyramid_distance
from pronghorn.dcae.metrics import evaluate
from pronghorn.dcae.sources import squares

SHORT = ("--steps", 2, "--batch-size", 2, "--save-every", 1)
OWN = ("--hidden-size", 16, "--depth", 2, "--heads", 2)


@pytest.fixture
def photos(tmp_path):
    for number in range(3):
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        picture(40, 36, number).save(path)
    return tmp_path / "photos"


@pytest.fixture
def described(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small().architecture.to_dict()))
    return path


def trained(folder):
    return load_file(folder / "model" / "diffusion_pytorch_model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_three_phases(described, photos, tmp_path):
    said = run("train", described, photos, tmp_path / "1", "--phase", 1, "--resolution", 16, *SHORT,
               "--held-out", photos, "--evaluate-every", 1)  # fmt: skip
    assert "PSNR" in said
    assert len(list((tmp_path / "1" / "samples").iterdir())) == 2
    run("train", tmp_path / "1" / "model", photos, tmp_path / "2", "--phase", 2, "--resolution", 32,
        "--middle-blocks", 1, *SHORT)  # fmt: skip
    run("train", tmp_path / "2" / "model", photos, tmp_path / "3", "--phase", 3, "--resolution", 32,
        "--head-blocks", 1, "--gradient-accumulation-steps", 2, *SHORT)  # fmt: skip
    first, second, third = (trained(tmp_path / name) for name in "123")
    moved = [{name.split(".")[0] for name in new if not torch.equal(old[name], new[name])}
             for old, new in ((first, second), (second, third))]  # fmt: skip
    assert moved == [{"encoder", "decoder"}, {"decoder"}]
    found = json.loads((tmp_path / "3" / "config.json").read_text())
    assert (found["head_blocks"], found["gradient_accumulation_steps"], found["learning_rate"]) == (1, 2, 5.4e-5)


def reached(command, kind, aliases):
    """Settings of a configuration that a command has no option for."""
    options = {name.lstrip("-").replace("-", "_") for one in get_command(app).commands[command].params
               for name in one.opts}  # fmt: skip
    return {field.name for field in fields(kind)} - options - aliases


def test_every_setting_has_an_option():
    assert not reached("train", PhaseConfig, set())
    assert not reached("train-diffusion", DiffusionConfig, {"evaluate_every"})  # which has nothing to evaluate


def test_settings_arrive(described, photos, tmp_path):
    given = {
        "weight_decay": 0.02, "betas": [0.4, 0.8], "max_grad_norm": 0.5, "l1_weight": 2.0, "perceptual_weight": 0.125,
        "adversarial_weight": 0.25, "discriminator_start": 1, "discriminator_learning_rate": 1e-4,
        "channel_samples": 2, "zoom": 1.5, "ema_decay": 0.5, "warmup_steps": 1, "adaptive": False,
    }  # fmt: skip
    words = [word for name, value in given.items() if name not in ("adaptive", "betas")
             for word in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    run("train", described, photos, tmp_path / "out", "--phase", 3, "--resolution", 32, *SHORT, *words,
        "--betas", "0.4,0.8", "--no-adaptive")  # fmt: skip
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: found[name] for name in given} == given
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line.get("adversarial_weight") for line in lines] == [None, 0.25]
    assert lines[1]["loss"] == pytest.approx(
        2 * lines[1]["l1"] + 0.125 * lines[1]["perceptual"] + 0.25 * lines[1]["adversarial"], rel=1e-4
    )
    done = CliRunner().invoke(app, ["train", str(described), str(photos), str(tmp_path / "none"), "--phase", "1",
                                    "--steps", "1", "--betas", "0.9"])  # fmt: skip
    assert done.exit_code == 2
    assert "wanted two numbers with a comma, got '0.9'" in " ".join(done.output.replace("│", " ").split())
    with pytest.raises(ValueError, match="discriminator_start: got 2, it belongs to phase 3"):
        run("train", described, photos, tmp_path / "none", "--phase", 1, *SHORT, "--discriminator-start", 2)
    with pytest.raises(ValueError, match="always_channels: got 'min', accepted are max and min_max"):
        run("train", described, photos, tmp_path / "none", "--phase", 1, *SHORT, "--always-channels", "min")


def test_lengths_of_latents_arrive(photos, tmp_path):
    adaptive = small(encoder_out_shortcut=False, decoder_in_shortcut=False, latent_channels_list=(2, 8))
    (tmp_path / "adaptive.json").write_text(json.dumps(adaptive.architecture.to_dict()))
    run("train", tmp_path / "adaptive.json", photos, tmp_path / "vae", "--phase", 1, "--resolution", 16, *SHORT,
        "--always-channels", "min_max")  # fmt: skip
    assert json.loads((tmp_path / "vae/config.json").read_text())["always_channels"] == "min_max"
    run("train-diffusion", dumped(tmp_path / "latents"), tmp_path / "out", *OWN, *SHORT, "--channels", "2,8",
        "--channel-draws", 2, "--weight-decay", 0.02, "--betas", "0.4,0.8", "--max-grad-norm", 0.5)  # fmt: skip
    found = json.loads((tmp_path / "out/config.json").read_text())
    wanted = {"channels": [2, 8], "channel_draws": 2, "weight_decay": 0.02, "betas": [0.4, 0.8], "max_grad_norm": 0.5}
    assert {name: found[name] for name in wanted} == wanted
    with pytest.raises(ValueError, match="channel_draws: got 2, wanted 1, or with channels also more"):
        run("train-diffusion", tmp_path / "latents", tmp_path / "no", *OWN, *SHORT, "--channel-draws", 2)


def test_a_card_stands_beside_what_was_trained(described, photos, tmp_path):
    """What a phase left as it was is counted, and held-out images are reconstructed before and after."""
    given = ("--resolution", 16, *SHORT, "--held-out", photos)
    run("train", described, photos, tmp_path / "1", "--phase", 1, *given)
    first = json.loads((tmp_path / "1/model/quality.json").read_text())
    assert first["base_model"] is None
    assert first["figures"].keys() == {"tensors", "trained"}
    assert "base_model" not in (tmp_path / "1/model/README.md").read_text().split("---")[1]
    said = run("train", tmp_path / "1/model", photos, tmp_path / "2", "--phase", 2, "--base-model", "me/tiny", *given)
    report = json.loads((tmp_path / "2/model/quality.json").read_text())
    old, new = trained(tmp_path / "1"), trained(tmp_path / "2")
    alike = sum(torch.equal(old[name], new[name]) for name in new)
    assert 0 < alike < len(new)
    assert f"{alike} of {len(new)} tensors as they were" in said
    figures = report["figures"]
    assert (figures["tensors"], figures["tensors equal bit for bit"]) == (len(new), alike)
    assert figures["source"] == first["figures"]["trained"]
    for folder, name in ((tmp_path / "1", "source"), (tmp_path / "2", "trained")):
        found = evaluate(load_dcae(folder / "model"), batches(squares(photos, size=16), 2), perceptual=pyramid_distance)
        assert figures[name]["psnr"] == pytest.approx(found.psnr)
    assert report["recipe"]["phase"] == 2
    assert "base_model: me/tiny" in (tmp_path / "2/model/README.md").read_text()
    run("train", tmp_path / "1/model", photos, tmp_path / "3", "--phase", 2, "--no-report", *given)
    assert not (tmp_path / "3/model/README.md").exists()


def test_the_same_command_goes_on(described, photos, tmp_path, monkeypatch):
    given = ("--phase", 1, "--resolution", 16, "--steps", 4, "--batch-size", 2, "--save-every", 2)
    run("train", described, photos, tmp_path / "whole", *given)
    real, left = room.AutoencoderTrainer._step, iter(range(3))

    def step(self, *more):
        if next(left, None) is None:
            raise BrokenOffError
        return real(self, *more)

    monkeypatch.setattr(room.AutoencoderTrainer, "_step", step)
    with pytest.raises(BrokenOffError):
        run("train", described, photos, tmp_path / "parts", *given)
    monkeypatch.setattr(room.AutoencoderTrainer, "_step", real)
    run("train", described, photos, tmp_path / "parts", *given)
    assert_equal(trained(tmp_path / "whole"), trained(tmp_path / "parts"))
    logged = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2, 3, 4]  # the third step is done twice


def test_what_training_starts_from(described, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "tiny", small(scaling_factor=0.5).architecture)
    assert start_dcae("tiny").config.scaling_factor == 1  # of the published weights, which these are not
    assert start_dcae(str(described)).architecture == small().architecture
    model = small(scaling_factor=0.5)
    model.save_pretrained(tmp_path / "model")
    assert_equal(start_dcae(str(tmp_path / "model")).state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="name: got 'phase-1', known are"):
        start_dcae("phase-1")
    described.write_text(json.dumps({"width": 3}))
    with pytest.raises(ValueError, match="width: no setting of DCAEConfig"):
        start_dcae(str(described))


def test_lpips_is_asked_for_by_name(described, photos, tmp_path, monkeypatch):
    given = ("train", described, photos, tmp_path / "out", "--phase", 1, "--resolution", 16, *SHORT)
    with pytest.raises(ValueError, match="perceptual: got 'vgg', accepted are pyramid, lpips"):
        run(*given, "--perceptual", "vgg")
    if importlib.util.find_spec("lpips") is None:
        with pytest.raises(ModuleNotFoundError, match="pip install lpips"):
            run(*given, "--perceptual", "lpips")
    asked = []

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            asked.append(net)

        def forward(self, x, y):
            return (x - y).square().mean(dim=(1, 2, 3), keepdim=True)  # as the package's, one for each image

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    run(*given, "--perceptual", "lpips")
    assert asked == ["vgg"]


@pytest.mark.parametrize(("method", "kind"), [("uvit", UViT2DModel), ("usit", UViT2DModel), ("dit", DiT2DModel)])
def test_diffusion_from_latents_to_pictures(method, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.DDPMScheduler.set_timesteps", _few)
    latents = dumped(tmp_path / "latents")
    said = run("train-diffusion", latents, tmp_path / "out", "--method", method, *OWN, *SHORT)
    assert "8 latents of 2 classes" in said
    model = kind.from_pretrained(tmp_path / "out" / "model")
    assert (model.config.sample_size, model.config.in_channels, model.num_classes) == (4, 8, 2)
    report = json.loads((tmp_path / "out/model/quality.json").read_text())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert report["figures"] == {"parameters": model.num_parameters(), "mean loss": sum(losses) / 2}
    assert report["recipe"]["method"] == method
    small(scaling_factor=1.0).save_pretrained(tmp_path / "vae")
    given = ("sample", tmp_path / "vae", tmp_path / "out", tmp_path / "pictures", "--device", "cpu")
    with pytest.raises(ValueError, match="the autoencoder has 1, which stands for none"):
        run(*given, "--classes", "0")
    run(*given, "--classes", "1,0", "--each", 2, "--scaling-factor", 0.5, "--guidance-scale", 2)
    found = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in found] == ["0000-000.png", "0000-001.png", "0001-000.png", "0001-001.png"]
    assert np.asarray(Image.open(found[0])).shape == (8, 8, 3)


def test_samples_by_name_in_batches(tmp_path, described, photos, monkeypatch):
    monkeypatch.setattr("diffusers.DDPMScheduler.set_timesteps", _few)
    run("train-diffusion", dumped(tmp_path / "latents"), tmp_path / "out", "--method", "dit", *OWN, *SHORT)
    small(scaling_factor=0.5).save_pretrained(tmp_path / "vae")

    def sample(classes, name, *words, training=tmp_path / "out"):
        given = ("--classes", classes, "--each", 3, "--device", "cpu", *words)
        said = run("sample", tmp_path / "vae", training, tmp_path / name, *given)
        return said, [np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / name).iterdir())]

    said, whole = sample("dog,cat", "whole")
    assert "6 pictures of 1 dog, 0 cat" in said
    assert "5 of 5 pictures" in run(
        "sample", tmp_path / "vae", tmp_path / "out", tmp_path / "dry", "--classes", "0", "--each", 5,
        "--batch-size", 4, "--device", "cpu", "--dry-run",
    )  # fmt: skip
    assert not (tmp_path / "dry").exists()
    calls, real = [], DCAEDiTPipeline.__call__

    def counted(self, labels, **more):
        calls.append(labels)
        return real(self, labels, **more)

    monkeypatch.setattr(DCAEDiTPipeline, "__call__", counted)
    _, parts = sample("1,0", "parts", "--batch-size", 4)
    assert calls == [[1, 1, 1, 0], [0, 0]]
    assert max(np.abs(one - other).max() for one, other in zip(whole, parts, strict=True)) <= 1
    for classes, message in (
        ("cow", "classes: got 'cow', known are cat, dog"),
        ("0,cat", "wanted each once"),
        ("2", "labels"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(classes, "none")
    with pytest.raises(ValueError, match="scaling_factor: got nan"):
        sample("0", "none", "--scaling-factor", "nan")
    run("train", described, photos, tmp_path / "other", "--phase", 1, "--resolution", 16, *SHORT)
    for training in (tmp_path / "other", tmp_path / "nothing"):
        with pytest.raises(
            ValueError, match=r"training: got .*, wanted a folder that `pronghorn dcae train-diffusion`"
        ):
            sample("0", "none", training=training)
    assert not (tmp_path / "none").exists()


def _few(self, steps, device=None):
    """DiT's 250 steps are too many for a test."""
    _SET(self, min(steps, 4), device=device)


_SET = __import__("diffusers").DDPMScheduler.set_timesteps


def test_sizes_of_diffusion_models():
    with torch.device("meta"):
        assert new_model("usit", (32, 16, 16), 1000, size="S").num_parameters() == 44_788_768
        assert new_model("dit", (32, 16, 16), 1000, size="XL").num_parameters() == DiT2DModel().num_parameters()
    tiny = new_model("dit", (8, 4, 4), 3, size="S", depth=2, hidden_size=16, num_attention_heads=2)
    assert (tiny.config.num_layers, tiny.config.attention_head_dim, tiny.num_classes) == (2, 8, 3)
    for given, message in (
        ({"method": "unet"}, "method: got 'unet'"), ({"size": "XL"}, "size: got 'XL', accepted for usit are S, H, 2B"),
        ({"size": None}, "depth: got None, wanted a positive number, or size"), ({"shape": (8, 4, 6)}, "got 4 x 6"),
        ({"method": "dit", "num_attention_heads": 5}, "num_attention_heads: got 5, wanted a divisor of 384"),
        ({"patch_size": 3}, "patch_size: got 3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            new_model(**{"method": "usit", "shape": (8, 4, 4), "num_classes": 3, "size": "S", **given})
