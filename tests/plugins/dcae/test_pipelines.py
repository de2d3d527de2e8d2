"""Images of classes: what goes into the models, what comes out, saved and loaded."""

import diffusers
import pytest
import torch
from tests.plugins.dcae.test_autoencoder import ADAPTIVE, small
from tests.plugins.dcae.test_dit import tiny as tiny_dit

from pronghorn.dcae import DCAEDiTPipeline, FlowODEScheduler, USiTPipeline, UViT2DModel, UViTPipeline
from pronghorn.dcae.diffusers import guided, register

ALL = (UViTPipeline, USiTPipeline, DCAEDiTPipeline)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def uvit(channels=8):
    torch.manual_seed(0)
    return UViT2DModel(sample_size=4, patch_size=2, in_channels=channels, hidden_size=16, depth=4,
                       num_attention_heads=2, num_classes=5).eval()  # fmt: skip


def made(kind, scheduler=None, *, vae=None, transformer=None, **settings):
    transformer = transformer or (tiny_dit() if kind is DCAEDiTPipeline else uvit())
    pipe = kind(vae or small(scaling_factor=0.5), transformer, scheduler, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, labels=(1, 4), **settings):
    return pipe(
        list(labels), **{"num_inference_steps": 4, "generator": seeded(), "output_type": "pt", **settings}
    ).images


@pytest.fixture
def asked(monkeypatch):
    """Times and labels of every call of a UViT."""
    calls, forward = [], UViT2DModel.forward

    def noted(self, sample, timestep, class_labels, *more, **settings):
        calls.append((timestep.tolist(), class_labels.tolist()))
        return forward(self, sample, timestep, class_labels, *more, **settings)

    monkeypatch.setattr(UViT2DModel, "forward", noted)
    return calls


@pytest.mark.parametrize("kind", ALL)
def test_saved_and_loaded(kind, tmp_path):
    pipe = made(kind, latents_mean=[0.1] * 8, latents_std=[2.0] * 8)
    pipe.save_pretrained(tmp_path)
    wanted = run(pipe)
    assert wanted.shape == (2, 3, 8, 8)
    for loader in (kind, diffusers.DiffusionPipeline):
        again = loader.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert type(again) is kind
        assert again.scheduler.to_json_string() == pipe.scheduler.to_json_string()
        assert torch.equal(run(again), wanted)
    assert not torch.equal(run(made(kind)), wanted)


def test_registering_leaves_what_is_not_ours(monkeypatch, caplog):
    register()
    assert diffusers.UViTPipeline is UViTPipeline
    monkeypatch.setattr(diffusers, "USiTPipeline", object, raising=False)
    register()
    assert diffusers.USiTPipeline is object
    assert "another USiTPipeline" in caplog.text


@pytest.mark.parametrize("scheduler", [None, diffusers.DDIMScheduler(timestep_spacing="linspace")])
def test_uvit_counts_steps_from_one(scheduler, asked):
    run(made(UViTPipeline, scheduler), guidance_scale=1.5)
    times = [times for times, _ in asked]
    assert len(times) == 4
    assert times[0] == [1000] * 4
    assert asked[0][1] == [1, 4, 5, 5]
    if scheduler is not None:
        assert times[-1] == [1] * 4


def test_without_guidance_half_the_work(asked):
    pipe = made(UViTPipeline)
    alone = run(pipe, guidance_scale=1.0)
    assert {len(labels) for _, labels in asked} == {2}
    torch.testing.assert_close(run(pipe, guidance_scale=1 + 1e-6), alone, rtol=0, atol=1e-4)
    assert not torch.allclose(run(pipe, guidance_scale=3.0), alone, atol=1e-4)


@pytest.mark.parametrize(
    "name", [None, "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler", "DDPMScheduler"]
)
def test_known_data_by_any_scheduler(name, monkeypatch):
    """The model knows the noise of data around the label, so that is what comes out."""
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)

    def forward(sample, timestep, class_labels):
        share = kept[timestep.round().long() - 1][:, None, None, None]
        apart = sample - share.sqrt() * class_labels[:, None, None, None]
        found = (1 - share).sqrt() * apart / (share * 0.25 + 1 - share)  # of a deviation of 0.5
        return diffusers.models.modeling_outputs.Transformer2DModelOutput(found)

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    settings |= {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    pipe = made(UViTPipeline, name and getattr(diffusers, name)(**settings))
    monkeypatch.setattr(pipe.transformer, "forward", forward)
    first, again = (
        run(pipe, [1, 3] * 8, num_inference_steps=60, guidance_scale=1.0, output_type="latent") for _ in range(2)
    )
    assert torch.equal(first, again)
    for label, found in ((1, first[::2]), (3, first[1::2])):
        assert found.mean() == pytest.approx(label, abs=0.15)
        assert found.std() == pytest.approx(0.5, abs=0.1)


@torch.no_grad()
def test_usit_follows_its_velocity(asked):
    pipe = made(USiTPipeline, FlowODEScheduler(method="euler"))
    found = run(pipe, num_inference_steps=3, guidance_scale=1.2, output_type="latent")
    assert [times[0] for times, _ in asked] == pytest.approx([0, 1 / 3, 2 / 3])
    labels = torch.tensor([1, 4])
    x = torch.randn(2, 8, 4, 4, generator=seeded())
    for step in range(3):
        x = x + guided(pipe.transformer, x, step / 3, labels, 1.2) / 3
    torch.testing.assert_close(found, x)
    assert run(made(USiTPipeline), output_type="latent").isfinite().all()


def test_dit_takes_the_variances_of_the_class(monkeypatch):
    pipe = made(DCAEDiTPipeline)
    noise, variance = 0.3, {1: 1.0, 5: -1.0}

    def forward(sample, timestep, class_labels):
        parts = [torch.full_like(sample, noise), torch.ones_like(sample)]
        parts[1] *= torch.tensor([variance[int(label)] for label in class_labels])[:, None, None, None]
        return diffusers.models.modeling_outputs.Transformer2DModelOutput(torch.cat(parts, dim=1))

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    found = run(pipe, [1], num_inference_steps=2, output_type="latent")
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    generator = seeded()
    x = torch.randn(1, 8, 4, 4, generator=generator)
    beta = 1 - kept[999] / kept[0]  # of the step from the last to the first
    clean = (x - (1 - kept[999]).sqrt() * noise) / kept[999].sqrt()
    x = (kept[0].sqrt() * beta * clean + (1 - beta).sqrt() * (1 - kept[0]) * x) / (1 - kept[999])
    x = x + beta.sqrt() * torch.randn(1, 8, 4, 4, generator=generator)  # the class says: the largest
    x = (x - (1 - kept[0]).sqrt() * noise) / kept[0].sqrt()
    torch.testing.assert_close(found, x.float(), rtol=1e-3, atol=1e-3)


def test_dit_with_and_without_variances():
    solver = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    assert run(made(DCAEDiTPipeline, diffusers.DPMSolverMultistepScheduler(**solver))).shape == (2, 3, 8, 8)
    derived = diffusers.DPMSolverMultistepScheduler.from_config(made(DCAEDiTPipeline).scheduler.config)
    with pytest.raises(ValueError, match="scheduler: got DPMSolverMultistepScheduler with variance_type"):
        run(made(DCAEDiTPipeline, derived))
    with pytest.raises(ValueError, match="scheduler: got DDPMScheduler with variance_type 'learned_range'"):
        run(made(UViTPipeline, diffusers.DDPMScheduler(variance_type="learned_range")))


@torch.no_grad()
def test_latents_are_decoded_as_they_were_scaled():
    def picture(vae, z):
        return (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)

    pipe = made(UViTPipeline)
    latents = run(pipe, output_type="latent")
    torch.testing.assert_close(run(pipe), picture(pipe.vae, latents / 0.5))
    mean, std = torch.arange(8.0) / 8, torch.arange(1.0, 9.0) / 4
    pipe = made(UViTPipeline, vae=small(), latents_mean=mean.tolist(), latents_std=std.tolist())
    wanted = picture(pipe.vae, latents * std[:, None, None] + mean[:, None, None])
    torch.testing.assert_close(run(pipe), wanted)


@torch.no_grad()
def test_first_channels_of_an_adaptive_autoencoder():
    vae = small(**ADAPTIVE, scaling_factor=0.5)
    pipe = made(UViTPipeline, vae=vae, transformer=uvit(2))
    latents = run(pipe, output_type="latent")
    assert latents.shape == (2, 2, 4, 4)
    wanted = (vae.decode(torch.nn.functional.pad(latents, (0, 0, 0, 0, 0, 6)) / 0.5).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(run(pipe), wanted)
    with pytest.raises(ValueError, match="transformer: got 2 channels, wanted the autoencoder's 8"):
        made(UViTPipeline, transformer=uvit(2))
    with pytest.raises(ValueError, match="transformer: got 9 channels, wanted at most 8"):
        made(UViTPipeline, vae=vae, transformer=uvit(9))


def test_outputs_and_callback():
    pipe = made(UViTPipeline)
    tensors = run(pipe)
    arrays = run(pipe, output_type="np")
    assert (arrays == tensors.permute(0, 2, 3, 1).numpy()).all()
    assert [image.size for image in run(pipe, output_type="pil")] == [(8, 8)] * 2
    assert torch.equal(pipe([1, 4], 1.5, 4, seeded(), "pt", return_dict=False)[0], tensors)
    assert run(pipe, generator=[seeded(0), seeded(7)]).shape == (2, 3, 8, 8)
    assert torch.equal(run(pipe, torch.tensor([1, 4])), tensors)
    assert pipe(3, num_inference_steps=1, output_type="pt").images.shape == (1, 3, 8, 8)
    seen = []

    def stopped(given, number, timestep, tensors):
        seen.append((given is pipe, number, float(timestep)))
        return {"latents": tensors["latents"] * 0}

    found = run(pipe, callback_on_step_end=stopped, output_type="latent")
    assert seen == [(True, number, time) for number, time in enumerate(pipe.scheduler.timesteps.tolist())]
    assert found.abs().max() == 0


def test_half_precision():
    pipe = made(UViTPipeline)
    wanted = run(pipe, output_type="latent")
    found = run(pipe.to(torch.bfloat16), output_type="latent")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.1)
    assert run(pipe).isfinite().all()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.fault(28)
def test_bad_input_is_named(kind):
    pipe = made(kind)
    for labels in ([5], [-1], [], [[1]], [0.5]):
        with pytest.raises(ValueError, match=r"class_labels: got .* from 0 to 4"):
            run(pipe, labels)
    with pytest.raises(ValueError, match="output_type: got 'jpg'"):
        run(pipe, output_type="jpg")
    unscaled = made(kind, vae=small())
    with pytest.raises(ValueError, match="scaling_factor: the autoencoder has 1"):
        run(unscaled)
    assert run(unscaled, output_type="latent").shape == (2, 8, 4, 4)
    with pytest.raises(ValueError, match="latents_std: got 3"):
        made(kind, latents_mean=[0.0] * 8, latents_std=[1.0] * 3)
    with pytest.raises(ValueError, match="got one, wanted both or none"):
        made(kind, latents_std=[1.0] * 8)
    with pytest.raises(TypeError, match="scheduler: got"):
        made(kind, diffusers.DDIMScheduler() if kind is USiTPipeline else FlowODEScheduler())
    for vae in (diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4), None):
        with pytest.raises(TypeError, match=f"vae: got {type(vae).__name__}, wanted an AutoencoderDC"):
            kind(vae, uvit(3))
