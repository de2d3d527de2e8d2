"""An accelerated autoencoder computes what the stock one does, keeps its weights' names, and comes back as it was."""

import json
import os
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from tests.plugins.dcae.test_autoencoder import SMALL, small
from torch.utils._python_dispatch import TorchDispatchMode

from pronghorn.dcae import AutoencoderTrainer, DCAEConfig, PhaseConfig, to_diffusers
from pronghorn.dcae.diffusers import accelerate_dcae, acceleration
from pronghorn.dcae.options import from_options

ROOT = Path(os.environ.get("PRONGHORN_GOLDEN") or Path(__file__).parents[2] / "golden" / "data")
FOLDER = ROOT / "dcae" if (ROOT / "dcae").is_dir() else ROOT
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lively(model):
    """Batch norms with statistics of their own, norms that scale."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "norm" in name and value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model


def stock(**changes):
    values = DCAEConfig(**{**SMALL, **changes}).to_dict()
    del values["latent_channels_list"], values["stage_shortcuts"]
    torch.manual_seed(0)
    return lively(diffusers.AutoencoderDC(**values)).eval()


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(12, 8), (2, 6), (10, 14)])
@pytest.mark.parametrize("make", [stock, lambda: lively(small())])
def test_computes_the_same(make, size, channels_last):
    model = make().to(DEVICE)
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    latent = model.encode(image).latent
    wanted = model.decode(latent).sample
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with accelerate_dcae(model, channels_last=channels_last):
        torch.testing.assert_close(model.encode(image).latent, latent, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(model.decode(latent).sample, wanted, rtol=1e-4, atol=2e-5)
        kinds = {type(module).__name__ for module in model.modules()}
        assert {"FastResBlock", "FastEfficientViTBlock", "FastDownBlock", "FastUpBlock"} <= kinds
        assert not {"ResBlock", "EfficientViTBlock", "DCDownBlock2d", "DCUpBlock2d"} & kinds
        assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.encode(image).latent, latent)
    assert model.decoder.conv_in.weight.is_contiguous()


@torch.no_grad()
def test_synchronized_batch_norms_are_folded_likewise():
    """A training on several GPUs had them; they are no subclass of `BatchNorm2d`."""
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(stock())
    image = torch.rand(1, 3, 12, 8, generator=torch.Generator().manual_seed(2))
    wanted = model(image).sample
    with accelerate_dcae(model):
        torch.testing.assert_close(model(image).sample, wanted, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_another_norm_stays_what_it_is():
    model = stock()
    for block in (*model.encoder.down_blocks[0], *model.decoder.up_blocks[0]):
        if hasattr(block, "norm"):
            block.norm = torch.nn.GroupNorm(4, 16)
    image = torch.rand(1, 3, 12, 8, generator=torch.Generator().manual_seed(2))
    for block in model.encoder.down_blocks[0]:
        if hasattr(block, "norm_type"):
            block.norm_type = "group_norm"
    wanted = model(image).sample
    with accelerate_dcae(model):
        torch.testing.assert_close(model(image).sample, wanted, rtol=1e-4, atol=2e-5)


class Seen(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("down", "up"), [("pixel_unshuffle", "pixel_shuffle"), ("conv", "interpolate")])
def test_grids_change_in_one_operation(down, up, channels_last):
    """After a convolution that halves or doubles there is one operation, with its shuffle, shortcut and sum."""
    model = stock(downsample_block_type=down, upsample_block_type=up).to(DEVICE)
    image = torch.rand(2, 3, 10, 14, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    latent = model.encode(image).latent
    wanted = model.decode(latent).sample
    with accelerate_dcae(model, channels_last=channels_last):
        with Seen() as encoding:
            found = model.encode(image).latent
        with Seen() as decoding:
            sample = model.decode(latent).sample
    torch.testing.assert_close(found, latent, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample, wanted, rtol=1e-5, atol=1e-5)
    for seen in (encoding.names, decoding.names):
        assert seen.count("shuffle_shortcut") == 1
        assert not {"pixel_shuffle", "pixel_unshuffle"} & set(seen)


@torch.no_grad()
@pytest.mark.parametrize("path", sorted(FOLDER.glob("tiny_*.safetensors")), ids=lambda path: path.stem)
def test_gives_what_the_official_code_gave(path):
    golden = load_file(path)
    config = from_options(json.loads(path.with_suffix(".json").read_text())["config"])
    values = config.to_dict()
    del values["latent_channels_list"], values["stage_shortcuts"]
    model = diffusers.AutoencoderDC(**values).eval()
    model.load_state_dict(to_diffusers({name[2:]: value for name, value in golden.items() if name.startswith("w.")}))
    with accelerate_dcae(model):
        assert (model.encode(golden["x"]).latent - golden["latent"]).abs().max() <= 2e-5
        assert (model.decode(golden["latent"]).sample - golden["decoded"]).abs().max() <= 2e-5


@torch.no_grad()
def test_compiles_as_one_graph(monkeypatch):
    monkeypatch.setenv("PRONGHORN_KERNELS", "reference")
    model, image = stock(), torch.rand(1, 3, 8, 8)
    torch.compiler.reset()
    with accelerate_dcae(model):
        wanted = model.encoder(image)
        found = torch.compile(model.encoder, backend="aot_eager", fullgraph=True)(image)
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_it_is_saved_as_it_is(tmp_path):
    model = stock()
    image = torch.rand(1, 3, 8, 8)
    wanted = model(image).sample
    accelerate_dcae(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(diffusers.AutoencoderDC.from_pretrained(tmp_path).eval()(image).sample, wanted)


@torch.no_grad()
def test_bfloat16_stays_near():
    model = stock()
    image = torch.rand(1, 3, 16, 16)
    wanted = model(image).sample
    with accelerate_dcae(model.to(torch.bfloat16)):
        found = model(image.bfloat16()).sample.float()
    assert (found - wanted).abs().max() <= 0.05 * wanted.abs().max()


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="wanted an AutoencoderDC"):
        accelerate_dcae(torch.nn.Linear(1, 1))
    model = stock()
    with pytest.raises(ValueError, match="training mode"):
        accelerate_dcae(model.train())
    accelerate_dcae(model.eval())
    with pytest.raises(ValueError, match="fast form already"):
        accelerate_dcae(model)


@torch.no_grad()
def test_as_cuda_graphs_it_computes_the_same():
    """On a CPU there are none, and it computes as without."""
    model = stock().to(DEVICE)
    images = [
        torch.rand(batch, 3, 12, 8, generator=torch.Generator().manual_seed(batch)).to(DEVICE) for batch in (1, 2)
    ]
    wanted = [model.encode(image).latent for image in images]
    with accelerate_dcae(model, cuda_graphs=True):
        for _ in range(2):
            found = [model.encode(image).latent for image in images]  # results outlive the next call
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
        recordings = model.encoder.forward._recorded._recordings
        assert len(recordings) == (2 if DEVICE.type == "cuda" else 0)
    assert "forward" not in vars(model.encoder)
    assert torch.equal(model.encode(images[0]).latent, wanted[0])


def look(model):
    """All that acceleration may change."""
    weights = {name: (value.stride(), value.requires_grad) for name, value in model.named_parameters()}
    return [type(module) for module in model.modules()], weights, model.tiled_encode, model.encoder.forward


@pytest.mark.fault(11)
@pytest.mark.parametrize("where", ["FastUpBlock", "_NormOut", "GraphedForward"])
def test_memory_that_runs_out_midway_changes_nothing(where, monkeypatch):
    model, image = stock(), torch.rand(1, 3, 12, 8)
    before, wanted = look(model), model(image).sample
    fired = []

    def fail(*more):
        fired.append(where)
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patched:
        patched.setattr(acceleration, where, fail)
        with pytest.raises(torch.OutOfMemoryError):
            accelerate_dcae(model, cuda_graphs=True)
    assert fired == [where]
    assert look(model) == before
    assert torch.equal(model(image).sample, wanted)
    accelerate_dcae(model).restore()
    assert look(model) == before


@pytest.mark.parametrize("channels_last", [False, True])
def test_weights_lie_as_they_lay(channels_last):
    model = stock().to(memory_format=torch.channels_last)
    model.decoder.conv_in.requires_grad_(False).to(memory_format=torch.contiguous_format)
    before = look(model)
    assert len({stride for stride, _ in before[1].values()}) > 2
    with accelerate_dcae(model, channels_last=channels_last):
        assert look(model) != before
    assert look(model) == before


@torch.no_grad()
@pytest.mark.fault(4)
def test_offloaded_weights_are_refused_and_nothing_is_changed():
    model, image = stock(), torch.rand(1, 3, 12, 8)
    wanted = model(image).sample
    cpu_offload(model, execution_device=torch.device("cpu"))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"on the meta device \(encoder.*enable_model_cpu_offload"):
        accelerate_dcae(model)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(image).sample, wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["casting", "group"])
def test_hooks_on_layers_are_refused(kind):
    """The fast form reads weights past a layer's hooks."""
    model = stock()
    if kind == "casting":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    else:
        cpu = torch.device("cpu")
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with pytest.raises(ValueError, match="group offloading and layerwise casting"):
        accelerate_dcae(model)
    assert model(torch.rand(1, 3, 12, 8)).sample.isfinite().all()


def test_what_is_fast_does_not_train(tmp_path):
    model, image = stock(), torch.rand(1, 3, 12, 8, requires_grad=True)
    wanted = model(image).sample
    with accelerate_dcae(model):
        model(image).sample.sum().backward()  # what goes in may want a gradient
        assert image.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in model.parameters())
        with pytest.raises(ValueError, match=r"is to train, but .* `restore\(\)`"):
            model.train()
        model.eval().requires_grad_(True)
        with pytest.raises(ValueError, match=r"parameters want gradients, but .* `restore\(\)`"):
            model(image)
        torch.testing.assert_close(model.requires_grad_(False)(image).sample, wanted, rtol=1e-4, atol=2e-5)
    assert torch.equal(model.train().eval()(image).sample, wanted)
    assert all(parameter.requires_grad for parameter in model.parameters())
    ours, config = small(), PhaseConfig(phase=1, steps=1, resolution=8)
    with accelerate_dcae(ours), pytest.raises(ValueError, match=r"`restore\(\)`"):
        AutoencoderTrainer(ours, config, [image[0].detach()], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
