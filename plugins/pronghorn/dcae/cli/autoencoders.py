"""Commands for autoencoders: convert, reconstruct, stats, dump, compare and bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pronghorn.dcae.cli.options import BaseModel, Config, Device, NoReport, Rfid, features_of, numbers, on

app = typer.Typer()

Model = Annotated[str, typer.Argument(help="Folder in diffusers' or the official layout, official file, or hub name.")]
AnyModel = Annotated[str, typer.Argument(help="As of other commands, or another class of diffusers.")]
Images = Annotated[Path, typer.Argument(help="Folder of images.")]
Size = Annotated[int, typer.Option(help="Edge of the square that is cut from each image's middle.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Tile = Annotated[int, typer.Option(help="Edge of a tile of large images; 0 takes them whole.")]
TRIED = 256  # pixels on the edge of the images that features are tried on, where images keep their own sizes
DryRun = Annotated[bool, typer.Option("--dry-run", help="Try some images, print peak memory, time and disk, and stop.")]


@app.command()
def convert(
    model: Model, output: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="diffusers or efficientvit.")] = "diffusers", config: Config = None,
    name: Annotated[str | None, typer.Option(help="Model name to write; by default the published one.")] = None,
    no_report: NoReport = False, base_model: BaseModel = None,
) -> None:  # fmt: skip
    """Write weights in diffusers' or the official layout, bit for bit; a checkpoint that is there is replaced."""
    from pronghorn.dcae.conversion import LAYOUTS, check_replaceable, convert_autoencoder

    if to not in LAYOUTS:
        raise ValueError(f"to: got {to!r}, accepted are {' and '.join(LAYOUTS)}")
    check_replaceable(output, model)
    vae = _load(model, config)
    said = convert_autoencoder(
        vae, output, to, source=model, model_name=name, base_model=base_model, with_report=not no_report
    )
    typer.echo(f"{output}: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters in {to}'s layout")
    if said is not None:
        typer.echo(f"{output}: {said}")


@app.command()
def reconstruct(
    model: Model, images: Images, output: Annotated[Path, typer.Argument(help="Folder for the pictures.")],
    config: Config = None, tile: Tile = 0, rfid: Rfid = None, device: Device = None, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Encode and decode images; each picture has the image on the left, cut to what the ratio divides.

    With --rfid, it sees images one by one in their own sizes, and mean PSNR, SSIM and rFID are told in the end.
    """
    from pronghorn.dcae.diffusers import accelerate_dcae
    from pronghorn.dcae.folders import targets
    from pronghorn.dcae.images import find_images
    from pronghorn.dcae.metrics import Reconstruction
    from pronghorn.dcae.reconstruct import reconstruct, rehearse_reconstruction

    pictures = targets(find_images(images), images, output, suffix=".png", flat=True)
    vae = on(_load(model, config), device)
    features = features_of(rfid, images=len(pictures), size=TRIED, device=vae.device)
    metrics = None if features is None else Reconstruction(features=features)
    with accelerate_dcae(vae):
        if dry_run:
            typer.echo(rehearse_reconstruction(vae, list(pictures), tile=tile, metrics=metrics))
            return
        output.mkdir(parents=True, exist_ok=True)
        for path, target in pictures.items():
            found = reconstruct(vae, path, target, tile=tile, metrics=metrics)
            typer.echo(f"{path.name}: {found.latent}, PSNR {found.psnr:.2f} dB -> {target}")
    if metrics is not None:
        of = metrics.compute()
        typer.echo(f"{of.images} images: PSNR {of.psnr:.2f} dB, SSIM {of.ssim:.4f}, rFID {of.frechet:.4g} by {rfid}")


@app.command()
def stats(
    model: AnyModel, images: Images, size: Size = 256, config: Config = None, batch_size: BatchSize = 8,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None, device: Device = None,
    dry_run: DryRun = False,
    write: Annotated[bool, typer.Option("--write", help="Set the scaling factor in MODEL's own config.json.")] = False,
) -> None:  # fmt: skip
    """Estimate the scaling factor of latents, and each channel's mean and deviation."""
    from pronghorn.dcae.diffusers.loading import load_autoencoder
    from pronghorn.dcae.diffusers.scaling import scalable_folder, write_scaling_factor
    from pronghorn.dcae.images import find_images
    from pronghorn.dcae.latents import rehearse_statistics, statistics_of_images

    folder = scalable_folder(model) if write else None
    vae, paths = on(load_autoencoder(model, config=config), device), find_images(images)
    if dry_run:
        typer.echo(rehearse_statistics(vae, paths, size=size, batch_size=batch_size))
        return
    found = statistics_of_images(vae, paths, size=size, batch_size=batch_size)
    if output is not None:
        output.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    if folder is not None:
        write_scaling_factor(folder, found.scaling_factor)
    typer.echo(
        f"scaling_factor {found.scaling_factor:.5f} from {len(paths)} images{'' if folder is None else f' -> {folder}'}"
    )


@app.command()
def dump(
    model: AnyModel, images: Images, output: Annotated[Path, typer.Argument(help="Folder for the latents.")],
    size: Size = 512, scaling_factor: Annotated[float | None, typer.Option(help="By default the model's.")] = None,
    config: Config = None, batch_size: BatchSize = 8, device: Device = None,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Write every image's latent as .npy; run it again to go on."""
    from pronghorn.dcae.diffusers.loading import load_autoencoder
    from pronghorn.dcae.latents import dump_latents, rehearse_dump

    vae = on(load_autoencoder(model, config=config), device)
    if dry_run:
        typer.echo(rehearse_dump(vae, images, size=size, scaling_factor=scaling_factor, batch_size=batch_size))
        return
    written = dump_latents(vae, images, output, size=size, scaling_factor=scaling_factor, batch_size=batch_size)
    typer.echo(f"{written} latents written to {output}")


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Several, as of other commands, or other classes of diffusers.")],
    images: Images, output: Annotated[Path, typer.Argument(help="Folder for pictures and metrics.json.")],
    size: Size = 512, tokens: Annotated[int | None, typer.Option(help="Of an image, for the diffusion model.")] = None,
    batch_size: BatchSize = 4, rfid: Rfid = None, device: Device = None, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Reconstruct images with several autoencoders, each with the patch size that gives as many tokens as the others.

    A picture for each image, and PSNR, SSIM and a Fréchet distance: of textures, which is no FID, or rFID with --rfid.
    """
    from rich.console import Console
    from rich.table import Table

    from pronghorn.dcae.compare import compare, rehearse_comparison
    from pronghorn.dcae.diffusers.loading import load_autoencoder
    from pronghorn.dcae.images import find_images
    from pronghorn.dcae.texture import texture_statistics

    if len(set(models)) < len(models):
        raise ValueError(f"models: got {', '.join(models)}, wanted each once")
    names = [Path(model).name for model in models]
    names = [name if names.count(name) == 1 else model for name, model in zip(names, models, strict=True)]
    vaes = {name: on(load_autoencoder(model), device) for name, model in zip(names, models, strict=True)}
    count, where = len(find_images(images)), next(next(iter(vaes.values())).parameters()).device
    features = features_of(rfid, images=count, size=size, device=where)
    if rfid is None and count > 1:  # of one image there is no spread
        features = texture_statistics
    how: dict[str, Any] = {"size": size, "tokens": tokens, "batch_size": batch_size, "features": features}
    if dry_run:
        typer.echo(rehearse_comparison(vaes, images, **how))
        return
    found = compare(vaes, images, output, **how)
    table = Table(
        "model", "latent", "patch", "tokens", "numbers", "a token", "PSNR dB", "SSIM", "rFID" if rfid else "texture"
    )
    for one in found:
        of, metrics = one.budget, one.metrics
        counts = (of.patch_size, of.tokens, of.numbers, of.numbers_per_token)
        frechet = "" if metrics.frechet is None else f"{metrics.frechet:.3g}"
        about = (one.name, f"f{of.ratio}c{of.latent_channels}", *map(str, counts))
        table.add_row(*about, f"{metrics.psnr:.2f}", f"{metrics.ssim:.4f}", frechet)
    Console().print(table)
    typer.echo(f"{found[0].metrics.images} images -> {output}")


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Folder, official file, or a published name, with random weights.")],
    sizes: Annotated[str, typer.Option(help="Edges of images, with commas.")] = "512,1024",
    batch_sizes: Annotated[str, typer.Option(help="Images at a time, with commas.")] = "1,8",
    forms: Annotated[
        str,
        typer.Option(
            help="Of stock, compiled, channels_last, compiled_channels_last, accelerated, accelerated_graphs."
        ),
    ] = "stock,accelerated",
    repeats: Annotated[int, typer.Option(help="Timed calls.")] = 10,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; on a GPU the first.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    device: Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure once, print peak memory and time of all, and stop.")
    ] = False,
) -> None:
    """Time and memory of encoding and decoding, as diffusers has it and accelerated; also compiled."""
    from rich.console import Console
    from rich.table import Column, Table

    from pronghorn.dcae.bench import bench, rehearse
    from pronghorn.files.outputs import check_output

    check_output("json", out)
    how: dict[str, Any] = {
        "sizes": numbers(sizes), "batch_sizes": numbers(batch_sizes), "forms": forms.split(","), "repeats": repeats
    }  # fmt: skip
    vae = _benched(model, dtype, device)
    if dry_run:
        typer.echo(rehearse(vae, **how))
        return
    found, stock = [], {}
    table = Table("", "size", "batch", Column("form", no_wrap=True), "ms", "images/s", "peak GiB", "speed-up")
    for speed in bench(vae, **how):
        found.append(speed.to_dict())
        about = (speed.what, str(speed.size), str(speed.batch_size))
        if speed.timing is None:
            table.add_row(*about, speed.form, "out of memory", "", "", "")
            continue
        median, peak = speed.timing.seconds["p50"], speed.timing.peak_bytes
        stock.update({about: median} if speed.form == "stock" else {})
        ratio = f"{stock[about] / median:.2f}x" if about in stock else ""
        memory = "" if peak is None else f"{peak / 2**30:.2f}"
        table.add_row(*about, speed.form, f"{median * 1e3:.2f}", f"{speed.batch_size / median:.2f}", memory, ratio)
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


def _benched(model: str, dtype: str | None, device: str | None) -> Any:
    import torch

    from pronghorn.dcae.diffusers import AutoencoderDC

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype: got {name!r}, accepted are bfloat16, float16 and float32")
    if Path(model).exists():
        vae = _load(model, None)
    else:
        with where:
            vae = AutoencoderDC.from_published(model).eval()
    return vae.to(where, getattr(torch, name))


def _load(model: str, config: str | None) -> Any:
    from pronghorn.dcae.diffusers.loading import load_dcae

    return load_dcae(model, config=config)
