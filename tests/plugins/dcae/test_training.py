"""The three phases: what they train, that they go on as if nothing had happened, and that they make images better."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import diffusers
import pytest
import torch
from tests.plugins.dcae.test_crops import picture

from pronghorn.dcae import AutoencoderDC, DCAEConfig
from pronghorn.dcae.diffusers.training import AutoencoderTrainer
from pronghorn.dcae.diffusers.training import autoencoder as room
from pronghorn.dcae.diffusers.training import loop as loop_room
from pronghorn.dcae.phases import PhaseConfig
from pronghorn.files.sealed import seal

SMALL = {
    "attention_head_dim": 8, "latent_channels": 8, "encoder_block_out_channels": (8, 16, 16),
    "decoder_block_out_channels": (8, 16, 16), "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "encoder_layers_per_block": (0, 1, 1),
    "decoder_layers_per_block": (0, 2, 1), "encoder_qkv_multiscales": ((),) * 3,
    "decoder_qkv_multiscales": ((),) * 3, "decoder_norm_types": ("batch_norm",) * 2 + ("rms_norm",),
    "decoder_act_fns": ("relu",) * 2 + ("silu",),
}  # fmt: skip
IMAGES = [picture(seed=seed) for seed in range(3)]


def model(**changed):
    torch.manual_seed(0)
    return AutoencoderDC(**DCAEConfig(**{**SMALL, **changed}).to_dict())


def config(phase=1, **changed):
    values = {
        "steps": 4, "batch_size": 2, "resolution": 32 if phase == 3 else 16, "learning_rate": 1e-3,
        "evaluate_every": 0, "save_every": 2, **changed,
    }  # fmt: skip
    return PhaseConfig(phase=phase, **values)


def weights(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


def assert_moved_alike(one, other, start):
    """Adam's first steps go by signs, which roundings decide where a gradient is about 0: weights as a whole count."""
    joined = [torch.cat([state[name].flatten() for name in start]) for state in (one, other, start)]
    assert (joined[0] - joined[1]).norm() < 0.05 * (joined[0] - joined[2]).norm()


def train(vae, phase_config, output, **more):
    trainer = AutoencoderTrainer(vae, phase_config, IMAGES, output=output, **more)
    return trainer.fit()


@pytest.mark.parametrize(
    ("phase", "changed", "trained"),
    [
        (1, {}, ("",)),
        (2, {}, ("encoder.conv_out", "decoder.conv_in")),
        (2, {"middle_blocks": 2}, ("encoder.conv_out", "decoder.conv_in", "encoder.down_blocks.2.0",
                                   "encoder.down_blocks.1.1", "decoder.up_blocks.2.0", "decoder.up_blocks.1.0")),
        (3, {}, ("decoder.norm_out", "decoder.conv_out")),
        (3, {"head_blocks": 1, "adaptive": False}, ("decoder.norm_out", "decoder.conv_out", "decoder.up_blocks.1.2")),
    ],
)  # fmt: skip
def test_a_phase_trains_its_part_and_leaves_all_else_bit_for_bit(tmp_path, phase, changed, trained):
    vae = model()
    before = weights(vae)
    train(vae, config(phase, **changed), tmp_path)
    after = weights(vae)
    for name in before:
        inside = name.startswith(trained)
        assert torch.equal(before[name], after[name]) != inside or not before[name].is_floating_point(), name
    if phase != 1:
        assert any("running_mean" in name for name in before if not name.startswith(trained))
    loaded = AutoencoderDC.from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in after.items())
    assert not vae.training
    assert all(parameter.requires_grad for parameter in vae.parameters())


def test_a_process_group_that_others_made_is_left(tmp_path):
    others = torch.distributed.is_initialized()  # an engine of vLLM in this process
    if not others:
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        train(model(), config(1), tmp_path / "run")
        assert torch.distributed.is_initialized()
    finally:
        if not others:
            torch.distributed.destroy_process_group()


def test_phase_3_leaves_latents_as_they_are(tmp_path):
    vae, x = model().eval(), torch.rand(1, 3, 16, 16)
    before = vae.encode(x).latent
    train(vae, config(3), tmp_path)
    assert torch.equal(vae.encode(x).latent, before)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all({"discriminator", "adversarial_weight", "l1"} <= set(line) for line in lines)


def test_the_discriminator_waits(tmp_path):
    train(model(), config(3, discriminator_start=2), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ["discriminator" in line for line in lines] == [False, False, True, True]


def test_training_makes_images_better_and_shows_them(tmp_path):
    smooth = [picture(4, 4, seed).resize((40, 40)) for seed in range(4)]
    vae = model(latent_channels=16)
    trainer = AutoencoderTrainer(
        vae, config(steps=60, batch_size=4, learning_rate=4e-3, evaluate_every=20, ema_decay=0.9, save_every=0),
        smooth, output=tmp_path, held_out=smooth[:2], features=lambda x: x.mean(dim=(2, 3)),
    )  # fmt: skip
    found = trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    seen = [line["held_out_psnr"] for line in lines if "held_out_psnr" in line]
    assert len(seen) == 3
    assert seen[0] + 2 < seen[2] == pytest.approx(found.psnr)
    assert found.frechet is not None
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["00000020.png", "00000040.png",
                                                                              "00000060.png"]  # fmt: skip


class BrokenOffError(Exception):
    pass


@pytest.mark.parametrize("phase", [1, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.fault(8)
def test_a_broken_off_training_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, phase, accumulation):
    settings = config(phase, steps=5, gradient_accumulation_steps=accumulation)
    whole = model()
    train(whole, settings, tmp_path / "whole")
    first = model()
    real, left = room.AutoencoderTrainer._step, iter(range(4 * accumulation - 1))

    def step(self, *given):
        if next(left, None) is None:
            raise BrokenOffError
        return real(self, *given)

    monkeypatch.setattr(room.AutoencoderTrainer, "_step", step)
    with pytest.raises(BrokenOffError):
        train(first, settings, tmp_path / "parts")
    monkeypatch.setattr(room.AutoencoderTrainer, "_step", real)
    second = model()
    train(second, settings, tmp_path / "parts")
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.fault(8)
def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path, monkeypatch):
    settings, whole, second = config(steps=4), model(), model()
    train(whole, settings, tmp_path / "whole")
    real = loop_room.Loop._save

    def save(self, step):
        if step == 4:
            (self.output / "checkpoints" / ".00000004.a_kill").mkdir()
            raise BrokenOffError
        real(self, step)

    monkeypatch.setattr(loop_room.Loop, "_save", save)
    with pytest.raises(BrokenOffError):
        train(model(), settings, tmp_path / "parts")
    monkeypatch.setattr(loop_room.Loop, "_save", real)
    train(second, settings, tmp_path / "parts")
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()) == ["00000002", "00000004"]


@pytest.mark.fault(3)
def test_nothing_in_a_checkpoint_is_unpickled(tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    train(model(), config(steps=4), tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/00000004"
    for path in [*checkpoint.glob("*.bin"), *checkpoint.glob("*.pkl"), checkpoint / "custom_checkpoint_0.pkl"]:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "run"
            shutil.copytree(tmp_path / "run", copy)
            inside = copy / path.relative_to(tmp_path / "run")
            torch.save(Evil(), inside)
            seal(inside.parent, ("**/*",))  # whoever writes a folder can seal it
            with suppress(Exception):
                train(model(), config(steps=6), copy)
        assert not canary.exists(), path.name
    torch.load(io.BytesIO(saved(Evil())), weights_only=False)
    assert canary.exists(), "it would have worked"


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.fault(9)
def test_a_checkpoint_without_the_mean_of_weights_is_of_an_earlier_pronghorn(tmp_path):
    train(model(), config(steps=4), tmp_path)
    folder = tmp_path / "checkpoints/00000004"
    (folder / "mean.safetensors").unlink()
    seal(folder, ("**/*",))
    with pytest.raises(ValueError, match="an earlier Pronghorn made it; begin in another folder"):
        train(model(), config(steps=6), tmp_path)


@pytest.mark.fault(9)
def test_another_training_in_the_folder_is_refused(tmp_path):
    train(model(), config(), tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate was 0.001 and is 0.002"):
        train(model(), config(learning_rate=2e-3), tmp_path)
    train(model(), config(steps=6), tmp_path)  # longer is no other
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


def test_accumulation_is_as_a_larger_batch(tmp_path):
    plain = {"decoder_norm_types": ("rms_norm",) * 3}  # batch norms see each batch apart
    one, many = model(**plain), model(**plain)
    train(one, config(batch_size=4), tmp_path / "one")
    train(many, config(batch_size=2, gradient_accumulation_steps=2), tmp_path / "many")
    assert_moved_alike(weights(one), weights(many), weights(model(**plain)))


def test_batch_norms_that_several_gpus_shared_are_plain_again(tmp_path, monkeypatch, no_process_group):
    """In one process they do not talk to others, and train as plain ones do."""
    plain, shared = model(), model()
    train(plain, config(), tmp_path / "plain")
    monkeypatch.setattr(room, "_several_gpus", lambda accelerator: True)
    trainer = AutoencoderTrainer(shared, config(), IMAGES, output=tmp_path / "shared")
    assert torch.nn.SyncBatchNorm in {type(module) for module in shared.modules()}
    trainer.fit()
    kinds = {type(module) for module in shared.modules()}
    assert torch.nn.BatchNorm2d in kinds
    assert torch.nn.SyncBatchNorm not in kinds
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value)
    assert [name for name, _ in shared.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    one, other = model(), model()
    train(one, config(), tmp_path / "one")
    train(other, config(gradient_checkpointing=True), tmp_path / "other")
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-5)


ADAPTIVE = {"encoder_out_shortcut": False, "decoder_in_shortcut": False, "latent_channels_list": (2, 4, 8)}


@pytest.fixture
def seen(monkeypatch):
    """The numbers of channels that each step reconstructs from."""
    found = []
    real = room._Reconstruct.forward
    monkeypatch.setattr(
        room._Reconstruct, "forward", lambda self, x, counts: found.append(counts) or real(self, x, counts)
    )
    return found


def test_channels_are_drawn_and_all_are_always_among_them(tmp_path, seen):
    train(model(**ADAPTIVE), config(steps=12, channel_samples=2), tmp_path)
    assert all(counts[0] is None and len(counts) == 3 for counts in seen)
    assert {count for counts in seen for count in counts[1:]} == {2, 4, 8}
    train(model(**ADAPTIVE), config(channel_samples=0), tmp_path / "none")
    assert seen[-1] == (None,)


def test_the_fewest_channels_may_always_be_among_them_too(tmp_path, seen):
    train(model(**ADAPTIVE), config(steps=12, channel_samples=2), tmp_path / "max")
    drawn = [counts[1:] for counts in seen]
    seen.clear()
    train(model(**ADAPTIVE), config(steps=12, channel_samples=2, always_channels="min_max"), tmp_path / "both")
    assert seen == [(None, 2, *counts) for counts in drawn]  # what is drawn does not depend on what is always there
    train(model(**ADAPTIVE), config(channel_samples=0, always_channels="min_max"), tmp_path / "alone")
    assert seen[-1] == (None, 2)
    with pytest.raises(ValueError, match="always_channels: got 'min_max', and the model has no latent_channels_list"):
        train(model(), config(always_channels="min_max"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("rate", [None, 2e-4])
def test_a_discriminator_may_learn_at_a_rate_of_its_own(tmp_path, rate):
    trainer = AutoencoderTrainer(model(), config(3, discriminator_learning_rate=rate), IMAGES, output=tmp_path)
    rates = [one.param_groups[0]["lr"] for one in (trainer._optimizer, trainer._critic)]
    assert rates == [1e-3, 1e-3 if rate is None else rate]
    trainer.fit()


@pytest.mark.fault(6)
def test_a_loss_that_is_no_number_is_told_and_harms_nothing(tmp_path):
    vae = model()
    with pytest.raises(FloatingPointError, match="loss: got nan in step 1"):
        train(vae, config(), tmp_path, perceptual=lambda x, y: (x - y).mean() * torch.nan)
    assert all(value.isfinite().all() for value in vae.state_dict().values())


def test_two_processes_train_as_one(tmp_path):
    script = """
import sys
from tests.plugins.dcae.test_training import config, model, train
vae = model(decoder_norm_types=("rms_norm",) * 3)
train(vae, config(batch_size=int(sys.argv[1])), sys.argv[2])
"""
    (tmp_path / "train.py").write_text(script)
    root = str(Path(__file__).parents[3])
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run([*launch, str(tmp_path / "train.py"), "2", str(tmp_path / "two")], env=env, cwd=root,
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    plain = {"decoder_norm_types": ("rms_norm",) * 3}
    one = model(**plain)
    train(one, config(batch_size=4), tmp_path / "one")
    two = AutoencoderDC.from_pretrained(tmp_path / "two" / "model")
    assert_moved_alike(weights(one), weights(two), weights(model(**plain)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"phase": 4}, "phase: got 4"), ({"steps": 0}, "steps"), ({"betas": (0.9,)}, "betas"),
        ({"ema_decay": 1.0}, "ema_decay"), ({"mixed_precision": "fp8"}, "accepted are no, bf16, fp16"),
        ({"head_blocks": 1}, "belongs to phase 3"), ({"phase": 3, "middle_blocks": 1}, "belongs to phase 2"),
        ({"learning_rate": float("nan")}, "learning_rate"), ({"zoom": 0.5}, "zoom"),
        ({"always_channels": "min"}, "always_channels: got 'min', accepted are max and min_max"),
        ({"adversarial_weight": 0.1}, "adversarial_weight: got 0.1, it belongs to phase 3"),
        ({"phase": 2, "adaptive": False}, "adaptive: got False, it belongs to phase 3"),
        ({"discriminator_start": 5}, "discriminator_start: got 5, it belongs to phase 3"),
        ({"phase": 3, "discriminator_learning_rate": -1.0}, "discriminator_learning_rate: got -1.0"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        config(**changed)


def test_settings_go_through_json_and_have_the_papers_values():
    found = PhaseConfig.from_dict(json.loads(json.dumps(config(2, middle_blocks=1).to_dict())))
    assert found == config(2, middle_blocks=1)
    published = PhaseConfig(phase=3, steps=1)
    assert (published.resolution, published.learning_rate, published.betas) == (256, 5.4e-5, (0.5, 0.9))
    with pytest.raises(ValueError, match="speed: no setting of PhaseConfig"):
        PhaseConfig.from_dict({"phase": 1, "steps": 1, "speed": 2})


def test_what_does_not_fit_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resolution: got 18, wanted a multiple of 4"):
        train(model(), config(resolution=18), tmp_path)
    with pytest.raises(ValueError, match="head_blocks: got 9"):
        train(model(), config(3, head_blocks=9), tmp_path)


def test_another_autoencoder_is_refused(tmp_path):
    values = model().architecture.to_dict()
    del values["latent_channels_list"], values["stage_shortcuts"]
    with pytest.raises(TypeError, match=r"got diffusers.*wanted pronghorn.dcae.AutoencoderDC"):
        train(diffusers.AutoencoderDC(**values), config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_the_scaling_factor_goes_with_the_latents(tmp_path, phase, caplog):
    vae = model(scaling_factor=0.5)
    train(vae, config(phase, steps=1), tmp_path)
    wanted = 0.5 if phase == 3 else 1.0
    loaded = AutoencoderDC.from_pretrained(tmp_path / "model")
    for made in (vae, loaded):
        assert made.config.scaling_factor == made.architecture.scaling_factor == wanted
    assert ("dcae stats" in caplog.text) == (phase != 3)
