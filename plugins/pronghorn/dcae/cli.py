"""`pronghorn dcae …`: convert, reconstruct, stats and dump."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="DC-AE: autoencoders with 32 to 128 times fewer pixels on an edge.")

Model = Annotated[str, typer.Argument(help="Folder in diffusers' or the official layout, official file, or hub name.")]
Config = Annotated[str | None, typer.Option(help="Published name of the architecture, for a file without it.")]
Images = Annotated[Path, typer.Argument(help="Folder of images.")]
Size = Annotated[int, typer.Option(help="Edge of the square that is cut from each image's middle.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu …; the GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(help="Images at a time.")]
Tile = Annotated[int, typer.Option(help="Edge of a tile of large images; 0 takes them whole.")]


@app.command()
def convert(
    model: Model, output: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="diffusers or efficientvit.")] = "diffusers", config: Config = None,
    name: Annotated[str | None, typer.Option(help="Model name to write in the official layout.")] = None,
) -> None:  # fmt: skip
    """Write weights in diffusers' or the official layout, bit for bit."""
    if to not in ("diffusers", "efficientvit"):
        raise ValueError(f"to: got {to!r}, accepted are diffusers and efficientvit")
    vae = _load(model, config)
    if to == "diffusers":
        vae.save_pretrained(output)
    else:
        vae.save_efficientvit(output, model_name=name or config or Path(model).name)
    typer.echo(f"{output}: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters in {to}'s layout")


@app.command()
def reconstruct(
    model: Model, images: Images, output: Annotated[Path, typer.Argument(help="Folder for the pictures.")],
    config: Config = None, tile: Tile = 0, device: Device = None,
) -> None:  # fmt: skip
    """Encode and decode images; each picture has the image on the left, cut to what the ratio divides."""
    import torch

    from pronghorn.dcae.diffusers import accelerate_dcae, tiled_decode, tiled_encode
    from pronghorn.dcae.images import find_images, load_image, to_image

    vae = _on(_load(model, config), device)
    output.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), accelerate_dcae(vae):
        for path in find_images(images):
            x = load_image(path, multiple=vae.spatial_compression_ratio)[None].to(vae.device)
            z = tiled_encode(vae, x, tile=tile) if tile else vae.encode(x).latent
            y = tiled_decode(vae, z, tile=tile) if tile else vae.decode(z).sample
            error = (y.clamp(-1, 1) - x).square().mean() / 4
            target = output / "-".join(path.relative_to(images).with_suffix(".png").parts)
            to_image(torch.cat([x[0], y[0]], dim=2)).save(target)
            typer.echo(f"{path.name}: {tuple(z.shape[1:])}, PSNR {-10 * error.log10().item():.2f} dB -> {target}")


@app.command()
def stats(
    model: Model, images: Images, size: Size = 256, config: Config = None, batch_size: BatchSize = 8,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None, device: Device = None,
) -> None:  # fmt: skip
    """Estimate the scaling factor of latents, and each channel's mean and deviation."""
    import torch

    from pronghorn.dcae.images import find_images, load_image
    from pronghorn.dcae.latents import latent_statistics

    vae, paths = _on(_load(model, config), device), find_images(images)

    def latents() -> Any:
        for start in range(0, len(paths), batch_size):
            batch = torch.stack([load_image(path, size=size) for path in paths[start : start + batch_size]])
            yield vae.encode(batch.to(vae.device)).latent

    with torch.no_grad():
        found = latent_statistics(latents())
    if output is not None:
        output.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    typer.echo(f"scaling_factor {found.scaling_factor:.5f} from {len(paths)} images")


@app.command()
def dump(
    model: Model, images: Images, output: Annotated[Path, typer.Argument(help="Folder for the latents.")],
    size: Size = 512, scaling_factor: Annotated[float | None, typer.Option(help="By default the model's.")] = None,
    config: Config = None, batch_size: BatchSize = 8, device: Device = None,
) -> None:  # fmt: skip
    """Write every image's latent as .npy; run it again to go on."""
    from pronghorn.dcae.latents import dump_latents

    vae = _on(_load(model, config), device)
    written = dump_latents(vae, images, output, size=size, scaling_factor=scaling_factor, batch_size=batch_size)
    typer.echo(f"{written} latents written to {output}")


def _load(model: str, config: str | None) -> Any:
    from pronghorn.dcae.diffusers import AutoencoderDC

    path = Path(model)
    described = path / "config.json"
    official = path.is_file() or (described.is_file() and "model_name" in json.loads(described.read_text()))
    loaded = AutoencoderDC.from_efficientvit(path, config=config) if official else AutoencoderDC.from_pretrained(model)
    return loaded.eval()


def _on(vae: Any, device: str | None) -> Any:
    import torch

    return vae.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
