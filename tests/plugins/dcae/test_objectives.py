"""Training losses: against what is known without them, in float64."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pronghorn.dcae import FlowObjective, LearnedVarianceObjective, NoiseObjective, UViT2DModel

KINDS = (NoiseObjective, FlowObjective, LearnedVarianceObjective)
UVIT_KEPT = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
DIT_KEPT = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def batch(count=64, channels=2, size=2):
    return torch.randn(count, channels, size, size, generator=seeded(5)), torch.arange(count) % 7


def share(table, steps):
    return table[steps][:, None, None, None]


class Seen:
    """Answers by a function and remembers what it was asked."""

    def __init__(self, answer):
        self.answer, self.samples, self.times, self.labels = answer, [], [], []

    def __call__(self, sample, timestep, class_labels):
        self.samples.append(sample)
        self.times.append(timestep)
        self.labels.append(class_labels)
        return self.answer(sample, timestep)


def test_noise_of_steps_counted_from_one():
    latents, labels = batch(5000, 1, 1)

    def noise(x, n, off=0.0):
        kept = share(UVIT_KEPT, n - 1)
        return ((x - kept.sqrt() * latents) / (1 - kept).sqrt() + off).float()

    seen = Seen(noise)
    assert NoiseObjective()(seen, latents, labels, seeded()) < 1e-8
    steps = seen.times[0]
    assert (steps.min(), steps.max()) == (1, 1000)
    assert abs(steps.double().mean() - 500.5) < 15
    assert abs(noise(seen.samples[0], steps).std() - 1) < 0.05
    off = NoiseObjective()(lambda x, n, _: noise(x, n, 0.5), latents, labels, seeded())
    assert off == pytest.approx(0.25, abs=1e-3)


def test_velocity_of_straight_ways():
    latents, labels = batch(2000, 1, 1)
    seen = Seen(lambda x, t: (latents - x) / (1 - t[:, None, None, None]))
    assert FlowObjective()(seen, latents, labels, seeded()) < 1e-5
    times = seen.times[0]
    assert 0 <= times.min() < 0.01 < 0.99 < times.max() < 1
    late = times > 0.9
    assert (seen.samples[0][late] - latents[late]).abs().mean() < 0.15


def variance_loss(latents, x, steps, noise, variance):
    """The bound in bits, from both Gaussians themselves."""
    kept = share(DIT_KEPT, steps)
    before = share(torch.cat([torch.ones(1, dtype=torch.float64), DIT_KEPT[:-1]]), steps)
    beta = 1 - kept / before
    first = (steps == 0)[:, None, None, None]

    def mean(clean):
        return (before.sqrt() * beta * clean + (1 - before) * (1 - beta).sqrt() * x) / (1 - kept)

    second = (1 - DIT_KEPT[1] / DIT_KEPT[0]) * (1 - DIT_KEPT[0]) / (1 - DIT_KEPT[1])
    least = torch.where(first, second, beta * (1 - before) / (1 - kept))
    deviation = (beta.log() * (variance + 1) / 2 + least.log() * (1 - variance) / 2).exp().sqrt()
    ours = Normal(mean((x - (1 - kept).sqrt() * noise) / kept.sqrt()), deviation)
    divergence = kl_divergence(Normal(mean(latents), least.sqrt()), ours)
    above, below = ours.cdf(latents + 1 / 255), ours.cdf(latents - 1 / 255)
    pixel = torch.where(latents < -0.999, above, torch.where(latents > 0.999, 1 - below, above - below))
    return torch.where(first, -pixel.clamp_min(1e-12).log(), divergence).mean() / math.log(2)


@pytest.mark.parametrize(("steps", "off"), [(None, 0.02), (0, 0.02), (1, 0.02), (500, 0.5), (999, 1.0)])
def test_bound_of_variances(steps, off, monkeypatch):
    latents, labels = batch(1000, 2, 2)
    if steps is not None:
        drawn = torch.full((len(latents),), steps)
        monkeypatch.setattr(torch, "randint", lambda *_, **__: drawn)
    answer = torch.randn(len(latents), 4, 2, 2, generator=seeded(1))
    answer[:, :2] *= off  # from the right noise
    answer[:, 2:] = answer[:, 2:].tanh()
    kept = []

    def model(x, t, _):
        noise = (x - share(DIT_KEPT, t).sqrt() * latents) / (1 - share(DIT_KEPT, t)).sqrt()
        kept.extend((x.double(), t, noise))
        return torch.cat([noise.float() + answer[:, :2], answer[:, 2:]], dim=1)

    found = LearnedVarianceObjective()(model, latents, labels, seeded())
    x, t, noise = kept
    bound = variance_loss(latents.double(), x, t, noise + answer[:, :2].double(), answer[:, 2:].double())
    assert float(found) - float(answer[:, :2].square().mean()) == pytest.approx(float(bound), rel=5e-3, abs=1e-6)
    assert bound > 1e-3


def test_the_bound_does_not_touch_the_noise():
    latents, labels = batch()
    answer = torch.randn(64, 4, 2, 2, generator=seeded(1)).requires_grad_()
    noises = []

    def model(x, t, _):
        kept = share(DIT_KEPT, t)
        noises.append(((x - kept.sqrt() * latents) / (1 - kept).sqrt()).float())
        return answer

    LearnedVarianceObjective()(model, latents, labels, seeded()).backward()
    by_error_alone = 2 * (answer[:, :2].detach() - noises[0]) / noises[0].numel()
    torch.testing.assert_close(answer.grad[:, :2], by_error_alone, rtol=1e-3, atol=1e-6)
    assert answer.grad[:, 2:].abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_dropped(kind):
    latents, labels = batch(4000, 1, 1)
    seen = Seen(lambda x, _: x.repeat(1, 2 if kind is LearnedVarianceObjective else 1, 1, 1))
    kind(num_classes=7)(seen, latents, labels, seeded())
    dropped = seen.labels[0] == 7
    assert abs(dropped.double().mean() - 0.1) < 0.02
    assert torch.equal(seen.labels[0][~dropped], labels[~dropped])
    kind(num_classes=7, label_dropout=0.0)(seen, latents, labels, seeded())
    assert torch.equal(seen.labels[1], labels)


@pytest.mark.parametrize("kind", KINDS)
def test_first_channels_alone(kind):
    latents, labels = batch(8, 6, 2)
    answers = 2 if kind is LearnedVarianceObjective else 1
    seen = Seen(lambda x, _: torch.ones(8, 6 * answers, 2, 2))
    objective = kind(channels=(1, 4, 6), channel_draws=20)
    objective(seen, latents, labels, seeded())
    counts = [int((x != 0).any(dim=0).flatten(1).any(dim=1).sum()) for x in seen.samples]
    assert len(counts) == 20
    assert set(counts) == {1, 4, 6}
    for x, count in zip(seen.samples, counts, strict=True):
        assert x.shape == (8, 6, 2, 2)
        assert (x[:, :count] != 0).all()

    def other_in_the_rest(x, *_):
        y = torch.ones(8, answers, 6, 2, 2)
        y[:, :, 4:] = 1e6
        return y.flatten(1, 2)

    same = [kind(channels=(4,))(model, latents, labels, seeded()) for model in (seen, other_in_the_rest)]
    assert same[0] == same[1]
    assert same[0] != kind(channels=(6,))(seen, latents, labels, seeded())


def test_zeros_are_as_a_narrower_model():
    torch.manual_seed(0)
    sizes = {"sample_size": 2, "hidden_size": 8, "depth": 2, "num_attention_heads": 2, "num_classes": 7}
    wide, narrow = UViT2DModel(in_channels=6, **sizes), UViT2DModel(in_channels=2, **sizes)
    state = wide.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :2]
    state |= {name: state[name][:2] for name in ("decoder_pred.weight", "decoder_pred.bias")}
    narrow.load_state_dict(state)
    latents, labels = batch(8, 6, 2)
    objective = NoiseObjective(num_classes=7, channels=(2,))
    found = objective(wide, latents, labels, seeded())
    torch.testing.assert_close(found, objective(narrow, latents[:, :2], labels, seeded()))
    found.backward()
    assert wide.patch_embed.proj.weight.grad[:, 2:].abs().max() == 0
    assert wide.patch_embed.proj.weight.grad[:, :2].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_draws_everything(kind):
    latents, labels = batch(8, 2, 2)
    objective = kind(channels=(1, 2))

    def model(x, *_):
        return x.repeat(1, 2 if kind is LearnedVarianceObjective else 1, 1, 1)

    first = objective(model, latents, labels, seeded(3))
    torch.manual_seed(99)
    assert objective(model, latents, labels, seeded(3)) == first
    assert objective(model, latents, labels, seeded(4)) != first
    assert objective(model, latents.bfloat16(), labels, seeded(3)).dtype == torch.float32


def test_bad_input_is_named():
    for values, match in (({"num_classes": 0}, "num_classes: got 0"), ({"label_dropout": 1.0}, "label_dropout: got"),
                          ({"channels": (0,)}, "channels: got"), ({"channel_draws": 2}, "channel_draws: got 2"),
                          ({"channel_draws": 0, "channels": (1,)}, "channel_draws: got 0")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            FlowObjective(**values)
    latents, labels = batch(4)
    with pytest.raises(ValueError, match="latents, labels: got"):
        FlowObjective()(None, latents, labels[:2])
    with pytest.raises(ValueError, match="wanted at most the latents' 2"):
        FlowObjective(channels=(4,))(None, latents, labels)
    with pytest.raises(ValueError, match=r"model: got an answer \(4, 2, 2, 2\), wanted \(4, 4, 2, 2\)"):
        LearnedVarianceObjective()(lambda x, *_: x, latents, labels)
