"""A training goes on with what it was started with, and with nothing else."""

import json
import shutil

import numpy as np
import pytest
import torch
from tests.plugins.dcae.test_crops import picture
from tests.plugins.dcae.test_diffusion_training import SHAPE, dumped, logged, uvit
from tests.plugins.dcae.test_diffusion_training import config as diffusion_config
from tests.plugins.dcae.test_diffusion_training import train as train_diffusion
from tests.plugins.dcae.test_training import config, model

from pronghorn.dcae import AutoencoderTrainer
from pronghorn.dcae.diffusers.training import Latents


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        picture(40, 36, number).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path, photos):
    """A folder with four steps of a training."""
    fit(photos, tmp_path / "run")
    return tmp_path / "run"


def fit(images, output, vae=None, **changed):
    AutoencoderTrainer(vae or model(), config(**changed), images, output=output).fit()


def other_weights():
    vae = model()
    with torch.no_grad():
        vae.encoder.conv_out.bias[0] += 1
    return vae


@pytest.mark.fault(9)
@pytest.mark.parametrize(
    ("vae", "message"),
    [(other_weights, r"weights was '\w+' and is '\w+'\. To go on nevertheless, take it out of 'made_from' in .*config"),
     (lambda: model(latent_channels=16), "architecture.latent_channels was 8 and is 16")],
)  # fmt: skip
def test_other_weights_are_refused(run, photos, vae, message):
    with pytest.raises(ValueError, match=message):
        fit(photos, run, vae(), steps=6)
    assert len(logged(run)) == 4


@pytest.mark.fault(9)
def test_other_images_are_refused_until_the_user_says_so(run, photos, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    fit(moved, run, steps=5)  # the same, somewhere else
    picture(40, 36, 9).save(photos / "more.png")
    with pytest.raises(ValueError, match="data was"):
        fit(photos, run, steps=6)
    record = json.loads((run / "config.json").read_text())
    del record["made_from"]["data"]
    (run / "config.json").write_text(json.dumps(record))
    fit(photos, run, steps=6)
    assert [line["step"] for line in logged(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("part", ["torch", "diffusers", "accelerate", "pronghorn", "code"])
@pytest.mark.fault(9)
def test_other_versions_and_code_are_refused_until_the_user_says_so(run, photos, part):
    record = json.loads((run / "config.json").read_text())
    record["made_from"][part] = "0.0"
    (run / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"other settings: {part} was '0\.0' and is .* take it out of 'made_from' in"):
        fit(photos, run, steps=6)
    del record["made_from"][part]
    (run / "config.json").write_text(json.dumps(record))
    fit(photos, run, steps=5)


@pytest.mark.fault(9)
def test_fewer_steps_than_are_done_are_refused(run, photos):
    with pytest.raises(ValueError, match=r"steps: got 3, the training in .*run has done 4"):
        fit(photos, run, steps=3)


@pytest.mark.fault(19)
def test_older_folders_go_on(run, photos):
    """They have no `made_from`, and logs with steps that were done twice."""
    record = json.loads((run / "config.json").read_text())
    del record["made_from"]
    (run / "config.json").write_text(json.dumps(record))
    lines = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join([*lines[:3], *lines[2:], '{"step": 5, "l']))
    with pytest.raises(ValueError, match="00000004: is a checkpoint of another architecture"):
        fit(photos, run, model(latent_channels=16), steps=6)
    fit(photos, run, steps=6)
    assert [line["step"] for line in logged(run)] == [1, 2, 3, 4, 5, 6]
    assert "made_from" not in json.loads((run / "config.json").read_text())


@pytest.mark.fault(19)
def test_a_setting_that_came_later_had_its_default(run, photos):
    record = json.loads((run / "config.json").read_text())
    del record["always_channels"], record["discriminator_learning_rate"], record["l1_weight"]
    (run / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"l1_weight was 1\.0 and is 2\.0"):
        fit(photos, run, steps=6, l1_weight=2.0)
    fit(photos, run, steps=6)
    assert len(logged(run)) == 6


@pytest.mark.fault(9)
def test_a_start_that_fails_leaves_no_settings_behind(photos, tmp_path):
    vae = model()
    torch.nn.init.constant_(vae.encoder.conv_out.bias, float("nan"))
    with pytest.raises(FloatingPointError):
        fit(photos, tmp_path / "run", vae)
    assert not (tmp_path / "run" / "config.json").exists()
    fit(photos, tmp_path / "run", learning_rate=5e-4)


@pytest.mark.fault(9)
def test_classes_that_changed_their_names_are_refused(tmp_path):
    latents = dumped(tmp_path / "latents")
    train_diffusion(uvit(), diffusion_config(), latents, tmp_path / "out")
    (latents / "cat").rename(latents / "yak")
    with pytest.raises(ValueError, match=r"classes was \['cat', 'dog'\] and is \['dog', 'yak'\]; data was"):
        train_diffusion(uvit(), diffusion_config(steps=6), latents, tmp_path / "out")
    (latents / "dog").rename(latents / "cat")
    (latents / "yak").rename(latents / "dog")  # names and sizes of all files are as they were
    with pytest.raises(ValueError, match="settings: data was"):
        train_diffusion(uvit(), diffusion_config(steps=6), latents, tmp_path / "out")


@pytest.mark.fault(7)
def test_a_latent_beside_the_classes_is_refused(tmp_path):
    latents = dumped(tmp_path / "latents")
    np.save(latents / "stray.npy", np.zeros(SHAPE, np.float32))
    with pytest.raises(ValueError, match=r"stray\.npy lies beside the folders of classes"):
        Latents(latents)
