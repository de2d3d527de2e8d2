"""What DC-AE says of checkpoints to `pronghorn check`, and the report beside what `convert` writes."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.plugins.dcae.test_autoencoder import small
from tests.plugins.dcae.test_pipelines import ALL, made
from typer.testing import CliRunner

from pronghorn.cli.check import check
from pronghorn.dcae import CONFIGURATIONS
from pronghorn.dcae.cli import app
from pronghorn.files.sealed import INDEX as SEAL

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    small(scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def found(folder, **options):
    return {one.name: one for one in check(folder, "diffusers", **options)}


def spoil(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_autoencoder_passes(folder):
    findings = found(folder, source=str(folder))
    assert {one.state for one in findings.values()} == {"ok"}
    assert "relative error 0.000000" in findings["as the source"].detail


@pytest.mark.fault(2)
@pytest.mark.parametrize(
    ("name", "inject"),
    [
        ("DC-AE weights", lambda f: spoil(f, lambda t: t.pop("encoder.conv_in.weight"))),
        ("DC-AE weights", lambda f: spoil(f, lambda t: t.update(extra=torch.ones(1)))),
        ("DC-AE weights", lambda f: configure(f, latent_channels=16)),
        ("dcae", lambda f: configure(f, encoder_qkv_multiscales=[[2], [2]])),
        ("DC-AE layout", lambda f: (f / "config.json").write_text('{"model_name": "dc-ae-f32c32-in-1.0"}')),
    ],
)
def test_weights_that_are_not_the_architectures(folder, name, inject):
    assert {one.state for one in found(folder).values()} == {"ok"}
    inject(folder)
    assert found(folder)["digests"].state == "failed"
    (folder / SEAL).unlink()  # as in checkpoints from elsewhere
    findings = found(folder)
    assert findings[name].state == "failed", findings
    assert "loading in diffusers" in findings


def test_another_autoencoder_than_the_source(folder, tmp_path):
    torch.manual_seed(5)
    other = small(scaling_factor=0.5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.3)
    other.save_pretrained(tmp_path / "other")
    assert found(folder, source=str(tmp_path / "other"))["as the source"].state == "failed"


def test_a_source_by_its_hub_name(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.append(name) or str(folder))
    assert found(folder, source="org/base")["as the source"].state == "ok"
    assert asked == ["org/base"]


@pytest.mark.parametrize("kind", ALL)
def test_pipelines_make_a_picture(kind, tmp_path):
    made(kind).save_pretrained(tmp_path / "pipe")
    findings = found(tmp_path / "pipe")
    assert {one.state for one in findings.values()} == {"ok"}, findings
    assert findings["class"].detail == kind.__name__


@pytest.mark.fault(3)
def test_a_pipeline_that_names_a_module_from_elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "pipe"
    made(ALL[0]).save_pretrained(folder)
    (tmp_path / "canary_module.py").write_text("import pathlib; pathlib.Path('canary').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["canary_module", "Vae"]}))
    assert "canary_module.Vae" in found(folder)["components"].detail
    assert not (tmp_path / "canary").exists()
    import canary_module  # noqa: F401 - had it been imported, this would be there

    assert (tmp_path / "canary").exists()


@pytest.mark.fault(2)
def test_a_pipeline_with_a_key_too_few(tmp_path):
    made(ALL[0]).save_pretrained(tmp_path / "pipe")
    assert {one.state for one in found(tmp_path / "pipe").values()} == {"ok"}
    spoil(tmp_path / "pipe" / "vae", lambda t: t.pop("encoder.conv_in.weight"))
    (tmp_path / "pipe" / "vae" / SEAL).unlink()
    assert "failed" in {one.state for one in found(tmp_path / "pipe").values()}


def test_what_convert_wrote_has_a_card(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "tiny", small(scaling_factor=0.5).architecture)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\nhello\n")
    for to, more in (("efficientvit", ["--name", "tiny"]), ("diffusers", [])):
        done = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / to), "--to", to, *more])
        assert done.exit_code == 0, done.output
        assert "pictures at most 0 apart" in done.output
        report = json.loads((tmp_path / to / "quality.json").read_text())
        count = len(load_file(folder / WEIGHTS))
        assert report["figures"] == {
            "tensors": count, "tensors equal bit for bit": count, "largest difference of a picture": 0.0
        }  # fmt: skip
        assert "license: mit" in (tmp_path / to / "README.md").read_text()
    assert {one.state for one in found(tmp_path / "diffusers").values()} == {"ok"}
    shutil.rmtree(tmp_path / "diffusers")
    done = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "diffusers"), "--no-report"])
    assert not (tmp_path / "diffusers" / "README.md").exists()
