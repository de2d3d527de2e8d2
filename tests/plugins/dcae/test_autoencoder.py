"""The autoencoder: loaded and saved in both formats, adaptive channels, and what is refused."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from pronghorn.cli.check import check
from pronghorn.dcae import CONFIGURATIONS, AutoencoderDC, DCAEConfig, to_diffusers, to_efficientvit
from pronghorn.dcae.diffusers import loading
from pronghorn.dcae.diffusers.loading import load_autoencoder, load_dcae
from pronghorn.dcae.diffusers.plain_config import unmarked
from pronghorn.dcae.report import _usage
from pronghorn.files.sealed import seal

SMALL = {
    "attention_head_dim": 8, "latent_channels": 8, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (16, 16),
    "decoder_block_out_channels": (16, 16), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
    "decoder_norm_types": ("batch_norm", "rms_norm"), "decoder_act_fns": ("relu", "silu"),
}  # fmt: skip
ADAPTIVE = {**SMALL, "encoder_out_shortcut": False, "decoder_in_shortcut": False, "latent_channels_list": (2, 4, 8)}


def small(**changes):
    torch.manual_seed(0)
    return AutoencoderDC(**DCAEConfig(**{**SMALL, **changes}).to_dict()).eval()


@pytest.fixture
def image():
    return torch.rand(2, 3, 12, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_diffusers_loads_what_we_save_and_we_what_it_saves(tmp_path, image):
    ours = small()
    ours.save_pretrained(tmp_path / "ours")
    stock = diffusers.AutoencoderDC.from_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    again = AutoencoderDC.from_pretrained(tmp_path / "stock")
    wanted = ours.decode(ours.encode(image).latent).sample
    for model in (stock, again):
        assert torch.equal(model.eval()(image).sample, wanted)
    assert again.architecture == ours.architecture
    assert AutoencoderDC.from_pretrained(tmp_path / "ours").config.latent_channels_list == []


@pytest.mark.parametrize("changes", [{}, {"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
                                     {"encoder_layers_per_block": (0, 1)}, ADAPTIVE])  # fmt: skip
def test_official_names_and_back(changes):
    model = small(**changes)
    state = model.state_dict()
    official = to_efficientvit(state, model.architecture)
    back = to_diffusers(official)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert not any("blocks" in name for name in official)


@pytest.mark.fault(2)
@torch.no_grad()
def test_official_folders_and_files(tmp_path, image, monkeypatch):
    model = small(**ADAPTIVE)
    monkeypatch.setitem(CONFIGURATIONS, "tiny", model.architecture)
    model.save_efficientvit(tmp_path / "folder", model_name="tiny")
    assert json.loads((tmp_path / "folder" / "config.json").read_text()) == {"model_name": "tiny"}
    state = to_efficientvit(model.state_dict(), model.architecture)
    save_file(state, tmp_path / "weights.safetensors")
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    for path, config in (("folder", None), ("weights.safetensors", "tiny"), ("weights.pt", model.architecture)):
        again = AutoencoderDC.from_efficientvit(tmp_path / path, config=config).eval()
        assert torch.equal(again.encode(image).latent, model.encode(image).latent)
    with pytest.raises(ValueError, match="config: got None"):
        AutoencoderDC.from_efficientvit(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="accepted are a folder"):
        AutoencoderDC.from_efficientvit(tmp_path / "weights.npz", config="tiny")
    other = DCAEConfig(**{**ADAPTIVE, "latent_channels": 4, "latent_channels_list": ()})
    with pytest.raises(ValueError, match=r"0 are missing .* 3 of another shape"):
        AutoencoderDC.from_efficientvit(tmp_path / "weights.pt", config=other)
    del state["decoder.project_out.op_list.0.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"1 are missing \(\['decoder.norm_out.weight'\]\)"):
        AutoencoderDC.from_efficientvit(tmp_path / "cut.safetensors", config="tiny")
    with pytest.raises(ValueError, match="no weight of a deep compression autoencoder"):
        to_diffusers({"encoder.something": torch.zeros(1)})


@torch.no_grad()
def test_fewer_channels_are_the_first_ones(image):
    model = small(**ADAPTIVE)
    latent = model.encode(image).latent
    few = model.encode(image, latent_channels=4).latent
    assert torch.equal(few, latent[:, :4])
    masked = latent.clone()
    masked[:, 4:] = 0
    torch.testing.assert_close(model.decode(few).sample, model.decode(masked).sample)
    with pytest.raises(ValueError, match="latent_channels: got 9"):
        model.encode(image, latent_channels=9)
    with pytest.raises(ValueError, match="accepted are 8"):
        small().decode(few)


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_changes_nothing_but_memory(image, training, synchronized, no_process_group):
    found = []
    for checkpointed in (False, True):
        model = small().train(training)
        if synchronized:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if checkpointed:
            model.enable_gradient_checkpointing()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = model(image).sample.square().mean()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append((sum(kept), [loss.detach(), *gradients, *model.buffers()]))
    (plain, wanted), (few, ours) = found
    assert few < plain / 2
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_bad_shapes_are_named(image):
    model = small()
    for wrong in (image[:, :2], image[:, :, :11], image[0]):
        with pytest.raises(ValueError, match=r"x: got .* multiples of 2"):
            model.encode(wrong)
    with pytest.raises(ValueError, match="z: got 3 latent channels"):
        model.decode(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="z: got"):
        model.decode(torch.zeros(8, 2, 2))


@torch.no_grad()
@pytest.mark.fault(6)
def test_an_image_with_nan_harms_no_other(image):
    """Nothing looks for it here: a GPU would have to wait."""
    model, broken = small(), image.clone()
    broken[0, 0, 0, 0] = torch.nan
    found = model.encode(broken).latent
    assert found[0].isnan().any()
    assert torch.equal(found[1], model.encode(image).latent[1])


def test_where_autocast_is_on_it_decides(image):
    model = small()
    with pytest.raises(ValueError, match=r"x: got torch.bfloat16, wanted the autoencoder's torch.float32"):
        model.encode(image.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decode(model.encode(image.bfloat16()).latent.bfloat16()).sample.isfinite().all()


@torch.no_grad()
@pytest.mark.fault(19)
def test_without_stage_shortcuts_it_loads_here_alone(tmp_path, image):
    """diffusers knows no such setting: the weights would fit, and another model would run."""
    model = small(stage_shortcuts=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stage_shortcuts=False"):
        diffusers.AutoencoderDC.from_pretrained(tmp_path)
    for again in (AutoencoderDC.from_pretrained(tmp_path), load_autoencoder(tmp_path),
                  diffusers.AutoModel.from_pretrained(str(tmp_path))):  # fmt: skip
        assert again.architecture == model.architecture
        assert torch.equal(again.eval()(image).sample, model(image).sample)
        again.save_pretrained(tmp_path / "again")
    assert AutoencoderDC.from_pretrained(tmp_path / "again").architecture == model.architecture
    assert "from pronghorn.dcae import" in _usage(model, "diffusers")
    assert "from diffusers import" in _usage(small(), "diffusers")
    states = {one.state for one in check(tmp_path, "diffusers", source=str(tmp_path))}
    assert states == {"ok"}
    path = tmp_path / "config.json"  # as it was written before
    path.write_text(json.dumps({**unmarked(json.loads(path.read_text())), "_class_name": "AutoencoderDC"}))
    seal(tmp_path)
    assert torch.equal(AutoencoderDC.from_pretrained(tmp_path).eval()(image).sample, model(image).sample)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with a model in the official layout, and no way to the hub itself."""
    model = small()
    monkeypatch.setitem(CONFIGURATIONS, "tiny", model.architecture)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, save in (("official", lambda folder: model.save_efficientvit(folder, model_name="tiny")),
                       ("diffusers", model.save_pretrained)):  # fmt: skip
        folder, commit = tmp_path / f"models--someone--{name}", "a" * 40
        save(folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    return model


@torch.no_grad()
@pytest.mark.parametrize("load", [load_dcae, load_autoencoder])
def test_hub_names_of_both_layouts(load, hub, image):
    assert torch.equal(load("someone/official").encode(image).latent, hub.encode(image).latent)
    if load is load_dcae:
        with pytest.raises(FileNotFoundError, match="no such folder or file: someone/else; nor does the hub give one"):
            load("someone/else")


@pytest.mark.fault(1)
@pytest.mark.parametrize("name", ["/nowhere/vae", "./vae", "../vae", "~/vae", "phase-1/some/model"])
def test_a_mistyped_path_is_no_hub_name(name, monkeypatch):
    monkeypatch.setattr(loading, "hf_hub_download", lambda *more: pytest.fail("asked the hub"))
    for load in (load_dcae, load_autoencoder):
        with pytest.raises(FileNotFoundError, match=f"no such folder or file: {name}$"):
            load(name)


@torch.no_grad()
def test_a_single_file_of_an_official_model(tmp_path, image, monkeypatch):
    """Such as Lite's, flat where an image goes in and shuffled where it comes out: diffusers cannot read it."""
    model = small(downsample_block_type="conv", encoder_layers_per_block=(1, 1), decoder_layers_per_block=(0, 1))
    monkeypatch.setitem(CONFIGURATIONS, "tiny", model.architecture)
    model.save_efficientvit(tmp_path / "official", model_name="tiny")
    model.save_pretrained(tmp_path / "described")
    file = tmp_path / "official" / "model.safetensors"
    for config in ("tiny", model.architecture, tmp_path / "described"):
        again = AutoencoderDC.from_single_file(str(file), config=config).eval()
        assert torch.equal(again(image).sample, model(image).sample)
    half = AutoencoderDC.from_single_file(str(file), config="tiny", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    theirs = tmp_path / "described/diffusion_pytorch_model.safetensors"  # in diffusers' names it is as for diffusers
    again = AutoencoderDC.from_single_file(str(theirs), config=str(tmp_path / "described"), local_files_only=True)
    assert torch.equal(again.eval()(image).sample, model(image).sample)
    with pytest.raises(ValueError, match=r"AutoencoderDC\.from_efficientvit does, with config"):
        AutoencoderDC.from_single_file(str(file), local_files_only=True)
