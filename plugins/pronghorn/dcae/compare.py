"""Autoencoders side by side, told apart by what a diffusion model pays for them: as many tokens for each."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from pronghorn.dcae.folders import linked, targets
from pronghorn.dcae.images import find_images, load_image, to_image
from pronghorn.dcae.metrics import Features, Reconstruction, ReconstructionMetrics, encoded, reconstructed
from pronghorn.estimate import Estimate, StepClock, folder_bytes, peak_bytes

FONT_SIZE, MARGIN = 13, 4


@dataclass(frozen=True)
class Budget:
    """What a diffusion model sees of an autoencoder's latents.

    Attributes:
        ratio: pixels of the image's edge for one place of the latent's.
        latent_channels: of the latent.
        patch_size: places of the latent's edge for one token's: what makes tokens as many as the other models'.
        tokens: of an image.
        numbers: of an image's latent.
        numbers_per_token: that the diffusion model is to predict at once.
    """

    ratio: int
    latent_channels: int
    patch_size: int
    tokens: int
    numbers: int
    numbers_per_token: int


@dataclass(frozen=True)
class Compared:
    """One autoencoder among others.

    Attributes:
        name: of the autoencoder.
        budget: see there.
        metrics: of its reconstructions.
    """

    name: str
    budget: Budget
    metrics: ReconstructionMetrics

    def to_dict(self) -> dict[str, Any]:
        """For JSON, flat."""
        return {"name": self.name, **asdict(self.budget), **self.metrics.to_dict()}


def budgets(shapes: dict[str, tuple[int, int]], size: int, tokens: int | None = None) -> dict[str, Budget]:
    """The patch sizes with which diffusion models on several latents see the same number of tokens.

    Compared at the same patch size, a model that compresses 32 times and one that compresses 8 times are 16 times apart
    in tokens, and the second one's better pictures are paid for by the diffusion model.

    Args:
        shapes: ratio and channels of each latent, by name.
        size: edge of a square image in pixels.
        tokens: for an image; by default as many as the model of the largest ratio has places (patches of one place), or
            the most that fit all ratios.

    Raises:
        ValueError: a ratio does not divide the size, or so many tokens cannot be had from patches of whole places.
    """
    for name, (ratio, _) in shapes.items():
        if size < 1 or size % ratio:
            raise ValueError(f"size: got {size}, wanted a multiple of {ratio} for {name}")
    least = math.lcm(*(ratio for ratio, _ in shapes.values()))
    edges = [edge for edge in range(least, size + 1, least) if size % edge == 0]  # pixels of a token's edge
    counts = [(size // edge) ** 2 for edge in edges]
    if tokens is not None and tokens not in counts:
        ratios = ", ".join(str(ratio) for ratio, _ in shapes.values())
        raise ValueError(
            f"tokens: got {tokens}, accepted for ratios {ratios} at {size} pixels are {', '.join(map(str, counts))}"
        )
    count = counts[0] if tokens is None else tokens
    edge = edges[counts.index(count)]
    return {
        name: Budget(
            ratio, channels, edge // ratio, count, channels * (size // ratio) ** 2, channels * (edge // ratio) ** 2
        )
        for name, (ratio, channels) in shapes.items()
    }


@torch.no_grad()
def compare(
    vaes: dict[str, Any], images: str | Path, output: str | Path, *, size: int, tokens: int | None = None,
    batch_size: int = 4, features: Features | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None, verbose: bool = True,
    on_batch: Callable[[], object] | None = None,
) -> list[Compared]:  # fmt: skip
    """Reconstruct images with several autoencoders: a picture for each image, and metrics of all.

    Args:
        vaes: autoencoders of diffusers in evaluation mode, by the names that they are shown under.
        images: folder of images.
        output: folder for the pictures (the image, then each reconstruction, all in full) and `metrics.json`, which
            also names the features.
        size: edge of the square that is cut from each image's middle.
        tokens: see `budgets`.
        batch_size: images at a time.
        features: see `Reconstruction`.
        perceptual: see there.
        verbose: show progress.
        on_batch: called after every batch.

    Raises:
        ValueError: see `budgets` and `Reconstruction`; there are no images, two would have the same picture, or
            a picture would replace an image.
    """
    paths, images, output = find_images(images), Path(images), Path(output)
    pictures = targets(paths, images, output, suffix=".png", flat=True)
    shapes = {name: _latent_shape(name, vae, size) for name, vae in vaes.items()}
    allowed = budgets(shapes, size, tokens)
    found = {name: Reconstruction(features=features, perceptual=perceptual) for name in vaes}
    output.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(paths), batch_size), desc="images", disable=not verbose):
        part = paths[start : start + batch_size]
        x = torch.stack([load_image(path, size=size) for path in part])
        shown = [[("image", f"{size} x {size}", picture)] for picture in x]
        for name, vae in vaes.items():
            on = x.to(next(vae.parameters()).device)
            y = reconstructed(vae, on)
            for row, decibels, picture in zip(shown, found[name].update(on, y).tolist(), y, strict=True):
                row.append((name, f"{_called(allowed[name])}, {decibels:.2f} dB", picture))
        for path, row in zip(part, shown, strict=True):
            _side_by_side(row).save(pictures[path])
        if on_batch is not None:
            on_batch()
    compared = [Compared(name, allowed[name], found[name].compute()) for name in vaes]
    told = {"size": size, "features": _name_of(features), "models": [one.to_dict() for one in compared]}
    partial = output / "metrics.json.part"
    partial.write_text(json.dumps(told, indent=1) + "\n")
    partial.replace(output / "metrics.json")
    return compared


def rehearse_comparison(vaes: dict[str, Any], images: str | Path, *, batch_size: int = 4, **options: Any) -> Estimate:
    """What `compare` takes, from three batches, or all images if there are fewer; arguments likewise."""
    paths = find_images(images)
    device = next(next(iter(vaes.values())).parameters()).device
    tried, clock = paths[: 3 * batch_size], StepClock(device)
    with tempfile.TemporaryDirectory() as name:
        chosen, pictures = Path(name) / "images", Path(name) / "pictures"
        linked(tried, chosen)
        compare(vaes, chosen, pictures, batch_size=batch_size, verbose=False, on_batch=clock, **options)
        written = folder_bytes(pictures)
    seconds = clock.over(-(-len(paths) // batch_size))
    return Estimate(
        peak_bytes(device), written * len(paths) // len(tried), seconds, f"{len(tried)} of {len(paths)} images"
    )


def _latent_shape(name: str, vae: Any, size: int) -> tuple[int, int]:
    """Ratio and channels, from a latent: autoencoders tell them in many ways."""
    latent = encoded(vae, torch.zeros(1, 3, size, size, device=next(vae.parameters()).device))
    if latent.dim() != 4 or size % latent.shape[3] or latent.shape[2] != latent.shape[3]:
        raise ValueError(f"size: {name} makes a latent {tuple(latent.shape)} of {size} pixels, wanted another size")
    return size // latent.shape[3], latent.shape[1]


def _name_of(features: Features | None) -> str | None:
    """What a Fréchet distance is of, for those who read it later."""
    if features is None:
        return None
    of: Any = features if hasattr(features, "__qualname__") else type(features)
    return f"{of.__module__}:{of.__qualname__}"


def _called(budget: Budget) -> str:
    """As the field calls it: compression, channels, patch size."""
    return f"f{budget.ratio}c{budget.latent_channels}p{budget.patch_size}"


def _side_by_side(row: list[tuple[str, str, Tensor]]) -> Image.Image:
    """Pictures [3, height, width] with two lines of text over each."""
    font = ImageFont.load_default(FONT_SIZE)
    texts = [f"{first}\n{second}" for first, second, _ in row]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [pen.multiline_textbbox((0, 0), text, font=font) for text in texts]
    pictures = [to_image(picture) for *_, picture in row]
    head = math.ceil(max(box[3] for box in boxes)) + 2 * MARGIN
    widths = [max(picture.width, math.ceil(box[2])) + MARGIN for picture, box in zip(pictures, boxes, strict=True)]
    sheet = Image.new("RGB", (sum(widths) - MARGIN, head + max(picture.height for picture in pictures)), "white")
    pen, left = ImageDraw.Draw(sheet), 0
    for text, picture, width in zip(texts, pictures, widths, strict=True):
        pen.multiline_text((left, MARGIN), text, fill="black", font=font)
        sheet.paste(picture, (left, head))
        left += width
    return sheet
