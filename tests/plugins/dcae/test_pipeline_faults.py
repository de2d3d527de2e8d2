"""Pipelines that are interrupted, used again and again, or asked for the least."""

import gc

import pytest
import torch
from tests.faults.fail_at_call import FailAtCall
from tests.kernels.harness import DEVICE
from tests.plugins.dcae.test_pipelines import ALL, made, run, seeded

from pronghorn.dcae import USiTPipeline, UViTPipeline
from pronghorn.dcae.diffusers import guided

STEPPING = tuple(kind for kind in ALL if kind is not USiTPipeline)  # those with a callback


@pytest.mark.fault(28, 21)
@pytest.mark.parametrize("kind", ALL)
def test_one_seed_gives_the_same_bits(kind):
    pipe, again = made(kind).to(DEVICE), made(kind).to(DEVICE)
    first, second = run(pipe), run(pipe)
    assert torch.equal(first, second)
    assert torch.equal(first, run(again))
    assert not torch.equal(first, run(pipe, generator=seeded(1)))
    # A generator that is used again goes on.
    generator = seeded()
    assert torch.equal(first, run(pipe, generator=generator))
    assert not torch.equal(first, run(pipe, generator=generator))


@pytest.mark.fault(28)
@pytest.mark.parametrize("kind", ALL)
def test_one_step_and_no_guidance(kind):
    pipe = made(kind).to(DEVICE)
    for settings in (
        {"num_inference_steps": 1},
        {"guidance_scale": 0.0},
        {"num_inference_steps": 1, "guidance_scale": 0},
    ):
        images = run(pipe, **settings)
        assert images.shape == (2, 3, 8, 8)
        assert images.isfinite().all()


@pytest.mark.fault(28)
@torch.no_grad()
def test_a_guidance_of_zero_is_the_model_without_a_class():
    model = made(UViTPipeline).transformer.to(DEVICE)
    x = torch.randn(2, 8, 4, 4, generator=seeded()).to(DEVICE)
    nothing = torch.full((2,), model.num_classes, device=DEVICE)
    found = guided(model, x, torch.tensor(0.5), torch.tensor([1, 4], device=DEVICE), 0.0)
    torch.testing.assert_close(found, guided(model, x, torch.tensor(0.5), nothing, 1.0), rtol=1e-5, atol=1e-6)


@pytest.mark.fault(28)
@pytest.mark.parametrize("error", [ValueError("the user's own"), KeyboardInterrupt()], ids=["raises", "interrupts"])
@pytest.mark.parametrize("kind", STEPPING)
def test_after_a_callback_that_ends_it_a_pipeline_works_as_before(kind, error):
    pipe = made(kind).to(DEVICE)
    wanted = run(pipe)
    callback = FailAtCall(lambda pipe, number, timestep, tensors: tensors, 2, error)
    with pytest.raises(type(error)):
        run(pipe, callback_on_step_end=callback)
    assert callback.fired
    assert torch.equal(run(pipe), wanted)


@pytest.mark.fault(28)
@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("kind", ALL)
def test_after_a_part_that_fails_a_pipeline_works_as_before(kind, part, monkeypatch):
    pipe = made(kind).to(DEVICE)
    wanted = run(pipe)
    owner, name = (pipe.transformer, "forward") if part == "transformer" else (pipe.vae, "decode")
    failing = FailAtCall(getattr(owner, name), 2 if part == "transformer" else 1, torch.OutOfMemoryError("full"))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            run(pipe)
    assert failing.fired
    assert torch.equal(run(pipe), wanted)


def living():
    """How many objects of Python there are, how many tensors, and their bytes."""
    gc.collect()
    objects = gc.get_objects()
    # Other tests leave sparse ones, which have no bytes of their own.
    tensors = [value for value in objects if type(value) is torch.Tensor and value.layout is torch.strided]
    return len(objects), len(tensors), sum(tensor.nbytes for tensor in tensors)


@pytest.mark.fault(28)
@pytest.mark.slow
def test_memory_is_flat_over_fifty_images(figure):
    pipe = made(UViTPipeline).to(DEVICE)
    wanted = run(pipe)
    before = living()
    kept = run(pipe)
    assert living()[1:] == (before[1] + 1, before[2] + kept.nbytes)  # one that is kept is noticed
    del kept
    counts = []
    for number in range(50):
        assert torch.equal(run(pipe), wanted)
        if number in (9, 49):
            counts.append(living())
    assert counts[1][1:] == before[1:]
    grown = counts[1][0] - counts[0][0]
    assert grown < 40  # less than one an image
    figure("images", 50)
    figure("tensors left over", counts[1][1] - before[1])
    figure("objects left over by the last 40", grown)
