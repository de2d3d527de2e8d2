"""Training on latents: what they are read as, that it learns, and that it goes on as if nothing had happened."""

import json

import numpy as np
import pytest
import torch

from pronghorn.dcae import DiffusionConfig, DiffusionTrainer, DiT2DModel, FlowODEScheduler, UViT2DModel
from pronghorn.dcae.diffusers import guided
from pronghorn.dcae.diffusers.training import Latents
from pronghorn.dcae.diffusers.training import latents as room
from pronghorn.dcae.diffusers.training import loop as loop_room
from pronghorn.dcae.objectives import FlowObjective, LearnedVarianceObjective, NoiseObjective

SHAPE = (8, 4, 4)


class BrokenOffError(Exception):
    pass


def dumped(folder, *, each=4, shape=SHAPE, classes=("cat", "dog"), noise=0.0):
    """Latents of classes, which are -1 and 1 everywhere, save for noise."""
    drawn = np.random.default_rng(0)
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            values = np.full(shape, 2.0 * place - 1) + noise * drawn.standard_normal(shape)
            np.save(folder / name / f"{number}.npy", values.astype(np.float32))
    return folder


def uvit(**changed):
    torch.manual_seed(0)
    values = {"sample_size": 4, "in_channels": 8, "hidden_size": 16, "depth": 2, "num_attention_heads": 2,
              "num_classes": 2, **changed}  # fmt: skip
    return UViT2DModel(**values)


def dit():
    torch.manual_seed(0)
    return DiT2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=8, num_layers=2, sample_size=4,
                      num_embeds_ada_norm=2)  # fmt: skip


def config(method="usit", **changed):
    return DiffusionConfig(method=method, **{"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "save_every": 2,
                                             **changed})  # fmt: skip


def train(model, settings, latents, output):
    DiffusionTrainer(model, settings, latents, output=output).fit()
    return model


def logged(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_folders_are_classes_in_order(tmp_path):
    dumped(tmp_path / "latents", classes=("cat", "dog", "yak"), each=2)
    (tmp_path / "latents" / "cat" / "young").mkdir()
    np.save(tmp_path / "latents" / "cat" / "young" / "0.npy", np.full(SHAPE, -1, np.float32))
    data = Latents(tmp_path / "latents")
    assert data.classes == ["cat", "dog", "yak"]
    seen = [data[place] for place in range(7)]
    assert sorted(label for _, label in seen) == [0, 0, 0, 1, 1, 2, 2]
    assert all((latent == 2.0 * label - 1).all() for latent, label in seen)
    assert all(latent.shape == SHAPE and latent.dtype == torch.float32 for latent, _ in seen)


def test_every_latent_is_read_once_a_turn_in_another_order(tmp_path):
    for number in range(20):
        np.save(tmp_path / f"{number:02d}.npy", np.full(SHAPE, number, np.float32))
    turns = [[int(Latents(tmp_path, seed=seed)[turn * 20 + place][0][0, 0, 0]) for place in range(20)]
             for seed, turn in ((0, 0), (0, 1), (0, 1), (1, 0))]  # fmt: skip
    assert all(sorted(turn) == list(range(20)) for turn in turns)
    assert turns[1] == turns[2]
    assert len({tuple(turn) for turn in turns}) == 3
    assert Latents(tmp_path).classes == [""]


@pytest.mark.parametrize(("method", "make"), [("uvit", uvit), ("usit", uvit), ("dit", dit)])
def test_the_loss_falls(tmp_path, method, make):
    latents = dumped(tmp_path / "latents")
    train(make(), config(method, steps=150, batch_size=16, learning_rate=4e-3, save_every=0), latents, tmp_path / "out")
    losses = [line["loss"] for line in logged(tmp_path / "out")]
    assert len(losses) == 150
    assert np.mean(losses[-20:]) < 0.75 * np.mean(losses[:20])
    kind = DiT2DModel if method == "dit" else UViT2DModel
    assert kind.from_pretrained(tmp_path / "out" / "model").num_classes == 2


def test_a_label_leads_to_its_class(tmp_path):
    latents = dumped(tmp_path / "latents", noise=0.1)
    settings = config(steps=250, batch_size=16, learning_rate=4e-3, ema_decay=0.9, save_every=0)
    model = train(uvit(), settings, latents, tmp_path / "out")
    assert not model.training
    labels, noise = torch.tensor([0, 1, 0, 1]), torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = FlowODEScheduler(method="heun2").integrate(
            lambda x, time: guided(model, x, time, labels, 1.5), noise, 10
        )
    means = found.mean(dim=(1, 2, 3))
    assert (means[labels == 0] < -0.5).all()
    assert (means[labels == 1] > 0.5).all()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("method", "make"), [("usit", uvit), ("dit", dit)])
@pytest.mark.fault(8)
def test_a_broken_off_training_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, method, make, accumulation):
    latents = dumped(tmp_path / "latents", noise=0.5)
    settings = config(method, steps=5, gradient_accumulation_steps=accumulation)
    whole = train(make(), settings, latents, tmp_path / "whole")
    real, left = loop_room.Loop.update, iter(range(4 * accumulation - 1))

    def update(self, *given):
        if next(left, None) is None:
            raise BrokenOffError
        real(self, *given)

    monkeypatch.setattr(loop_room.Loop, "update", update)
    with pytest.raises(BrokenOffError):
        train(make(), settings, latents, tmp_path / "parts")
    monkeypatch.setattr(loop_room.Loop, "update", real)
    second = train(make(), settings, latents, tmp_path / "parts")
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_gradient_checkpointing_changes_nothing(tmp_path):
    latents = dumped(tmp_path / "latents")
    one = train(uvit(), config(), latents, tmp_path / "one")
    other = train(uvit(), config(gradient_checkpointing=True), latents, tmp_path / "other")
    assert not other.is_gradient_checkpointing
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_channels_of_an_adaptive_autoencoder(tmp_path, monkeypatch):
    latents, seen = dumped(tmp_path / "latents"), set()
    real = room.DiffusionConfig.objective

    def objective(self, classes):
        made = real(self, classes)

        def asked(model, latents, labels):
            def noted(x, *more):
                seen.add(int((x != 0).any(dim=(0, 2, 3)).sum()))
                return model(x, *more)

            return made(noted, latents, labels)

        return asked

    settings = config(steps=12, channels=(2, 4, 8))
    monkeypatch.setattr(room.DiffusionConfig, "objective", objective)
    train(uvit(), settings, latents, tmp_path / "out")
    assert seen == {2, 4, 8}


@pytest.mark.fault(9)
def test_another_training_in_the_folder_is_refused(tmp_path):
    latents = dumped(tmp_path / "latents")
    train(uvit(), config(), latents, tmp_path / "out")
    with pytest.raises(ValueError, match=r"label_dropout was 0.1 and is 0.2"):
        train(uvit(), config(label_dropout=0.2), latents, tmp_path / "out")


@pytest.mark.fault(7)
def test_bad_latents_are_named(tmp_path):
    latents = dumped(tmp_path / "latents")
    (tmp_path / "empty").mkdir()
    for name, message in (("nothing", "is not there; wanted a folder"), ("empty", r"no latents; wanted \.npy files")):
        with pytest.raises(ValueError, match=message):
            Latents(tmp_path / name)
    for model, message in (
        (uvit(num_classes=1), "latents: got 2 classes, the model knows 1"),
        (uvit(sample_size=8), r"latents: got \(8, 4, 4\), wanted \(8, 8, 8\)"),
        (uvit(in_channels=4), r"latents: got \(8, 4, 4\), wanted \(4, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffusionTrainer(model, config(), latents, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [(np.full(SHAPE, np.nan), r"0\.npy: .*wanted finite"), (np.zeros((8, 16)), r"0\.npy: is \(8, 16\), wanted")],
)
@pytest.mark.fault(6)
def test_a_latent_that_is_none_is_named(tmp_path, values, message):
    latents = dumped(tmp_path / "latents", classes=("cat",), each=1)
    np.save(latents / "cat" / "0.npy", values.astype(np.float32))
    with pytest.raises(ValueError, match=message):
        train(uvit(), config(), latents, tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "unet"}, "method: got 'unet', accepted are uvit, usit, dit"), ({"steps": 0}, "steps"),
        ({"label_dropout": 1.0}, "label_dropout"), ({"channels": (0, 2)}, "channels"), ({"betas": (1.0, 0.9)}, "betas"),
        ({"learning_rate": -1}, "learning_rate"), ({"warmup_steps": 0.5}, "warmup_steps"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        config(**changed)


def test_settings_go_through_json():
    settings = config("dit", channels=(4, 8), betas=(0.5, 0.9))
    assert DiffusionConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ValueError, match="phase: no setting of DiffusionConfig"):
        DiffusionConfig.from_dict({"steps": 1, "phase": 2})


@pytest.mark.parametrize(
    ("method", "rate", "decay", "betas", "objective"),
    [
        ("uvit", 2e-4, 0.03, (0.99, 0.99), NoiseObjective), ("usit", 1e-4, 0.0, (0.99, 0.99), FlowObjective),
        ("dit", 1e-4, 0.0, (0.9, 0.999), LearnedVarianceObjective),
    ],
)  # fmt: skip
def test_published_values(method, rate, decay, betas, objective):
    found = DiffusionConfig(method=method, steps=1)
    assert (found.learning_rate, found.weight_decay, found.betas, found.ema_decay) == (rate, decay, betas, 0.9999)
    assert found.objective(7) == objective(num_classes=7, label_dropout=0.1)
