"""Losses of an autoencoder's training against what they are by definition."""

import pytest
import torch
from torch.nn import functional

from pronghorn.dcae.discriminator import PatchDiscriminator
from pronghorn.dcae.losses import adaptive_weight, hinge_of_discriminator, hinge_of_generator, pyramid_distance


def test_the_pyramid_distance_is_one():
    x, y, z = torch.rand(3, 2, 3, 20, 27) * 2 - 1
    assert pyramid_distance(x, x) == 0
    assert pyramid_distance(x, y) == pyramid_distance(y, x) > 0
    assert pyramid_distance(x, z) <= pyramid_distance(x, y) + pyramid_distance(y, z) + 1e-6
    assert torch.isclose(pyramid_distance(x, x + 0.3), torch.tensor(0.3))  # a constant is in the coarsest band alone


def test_detail_counts_more_than_by_l1():
    x = torch.zeros(1, 1, 32, 32)
    fine = torch.tensor([0.1, -0.1]).repeat(16).expand(1, 1, 32, 32)
    assert pyramid_distance(x, fine) > 2 * pyramid_distance(x, x + 0.1)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="y: got"):
        pyramid_distance(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))


def test_hinges():
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert hinge_of_discriminator(real, made) == (0.25 + 0.75) / 2
    assert hinge_of_generator(made) == 1.25


def test_the_adaptive_weight_makes_both_gradients_as_large():
    layer = torch.randn(5, requires_grad=True)
    reconstruction, adversarial = (layer * torch.arange(5)).sum(), (100 * layer).square().sum()
    weight = adaptive_weight(reconstruction, adversarial, layer)
    of_each = [torch.autograd.grad(loss, layer)[0].norm() for loss in (reconstruction, weight * adversarial)]
    assert torch.isclose(*of_each, rtol=1e-4)
    assert not weight.requires_grad


def test_the_discriminator_scores_patches():
    model = PatchDiscriminator()
    assert sum(p.numel() for p in model.parameters()) == 2_765_633  # by hand, layer by layer
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    model.eval()
    model(x + torch.randn(1, 3, 128, 128))[0, 0, 7, 7].backward()
    seen = x.grad.abs().sum(dim=1)[0].nonzero()
    assert (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist() == [70, 70]


def test_it_learns_what_is_real():
    torch.manual_seed(0)
    model = PatchDiscriminator(3, 8, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(20):
        real, made = torch.rand(8, 3, 32, 32) - 0.2, functional.avg_pool2d(torch.rand(8, 3, 32, 32), 3, 1, 1) - 0.2
        loss = hinge_of_discriminator(model(real), model(made))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def test_the_smallest_image():
    model = PatchDiscriminator(3, 8, 3)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 2, 2)
    with pytest.raises(ValueError, match="at least 32"):
        model(torch.zeros(2, 3, 31, 40))


@pytest.mark.parametrize("name", ["in_channels", "channels", "layers"])
def test_bad_sizes_are_refused(name):
    with pytest.raises(ValueError, match=name):
        PatchDiscriminator(**{name: 0})
