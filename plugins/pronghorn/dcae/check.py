"""What only DC-AE can say of a checkpoint before it is shipped: architecture, weights, and the size of latents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pronghorn.checkpoint import Checkpoint, Finding, failed, ok
from pronghorn.dcae.config import DCAEConfig

CLASS = "AutoencoderDC"
REMEDY = "save it again with save_pretrained, or convert it again: `pronghorn dcae convert`"


def check_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A deep compression autoencoder, or a pipeline with one of our diffusion models; nothing for others."""
    if checkpoint.ecosystem != "diffusers":
        return
    config = checkpoint.config
    if "model_name" in config and "_class_name" not in config:
        yield failed("DC-AE layout", f"official, of {config['model_name']}; diffusers reads its own layout",
                     "`pronghorn dcae convert` writes it for diffusers, bit for bit")  # fmt: skip
        return
    if (checkpoint.folder / "model_index.json").is_file():
        import pronghorn.dcae.diffusers  # noqa: F401 - diffusers then knows our pipelines

        return
    if "_class_name" not in config:
        return
    from pronghorn.dcae.diffusers.plain_config import CLASS as PLAIN

    if config["_class_name"] not in (CLASS, PLAIN):
        return
    import torch

    from pronghorn.checkpoint.weights import tensors_of
    from pronghorn.dcae.diffusers.autoencoder import AutoencoderDC

    with torch.device("meta"):
        model: Any = AutoencoderDC.from_config({name: value for name, value in config.items() if name[0] != "_"})
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {
        name: tensor.shape
        for path in checkpoint.folder.glob("*.safetensors")
        for name, tensor in tensors_of(path).items()
    }
    wrong = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
    if wrong:
        detail = f"{wrong[0]}: stored {stored.get(wrong[0])}, the architecture means {wanted.get(wrong[0])}"
        yield failed("DC-AE weights", f"{detail}; {len(wrong)} such", REMEDY)
        return
    yield ok("DC-AE weights", f"{len(stored)} tensors of f{model.spatial_compression_ratio}c{_channels(model)}")


def check_loaded(checkpoint: Checkpoint, loaded: Any) -> Iterator[Finding]:
    """That a latent has the size that the architecture means."""
    import torch

    vae = getattr(loaded, "vae", loaded)
    if type(vae).__name__ != CLASS:
        return
    config = DCAEConfig.from_dict({name: vae.config[name] for name in DCAEConfig().to_dict() if name in vae.config})
    edge = 2 * config.spatial_compression_ratio
    with torch.no_grad():
        latent = vae.encode(torch.zeros(1, config.in_channels, edge, edge, device=vae.device, dtype=vae.dtype)).latent
    if tuple(latent.shape) != (1, config.latent_channels, 2, 2):
        yield failed("DC-AE latent", f"{tuple(latent.shape)} of {edge} pixels", REMEDY)
        return
    yield ok("DC-AE latent", f"{edge} pixels make {tuple(latent.shape[1:])}")


def _channels(model: Any) -> int:
    return int(model.architecture.latent_channels)
