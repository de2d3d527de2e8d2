"""Handwritten digits, made by a tiny USiT on the latents of a tiny DC-AE, and whether a classifier recognises them.

The digits are scikit-learn's, 8 by 8 pixels, as pictures of 32 by 32; a quarter is held out. A support vector machine,
which has seen the others as pictures and nothing of what is made here, says what it takes samples for. `make demo`
runs it: four minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import median, picture_folder, row, write
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional

from pronghorn.dcae import (
    AutoencoderDC,
    AutoencoderTrainer,
    DCAEConfig,
    DiffusionConfig,
    DiffusionTrainer,
    FlowODEScheduler,
    PhaseConfig,
    USiTPipeline,
    UViT2DModel,
)
from pronghorn.dcae.images import to_image, to_tensor
from pronghorn.dcae.latents import dump_latents, latent_statistics
from pronghorn.dcae.metrics import reconstructed

CLASSES = 10
SIZE, SMALL = 32, 8  # pixels of a picture's edge, and of a digit's as scikit-learn has it
LARGEST = 16  # value of a pixel there
STAGES = 4
# An 8 times smaller edge, 4 channels: 4 by 4 tokens, as many numbers as scikit-learn's digits have.
CONFIG = DCAEConfig(
    latent_channels=4,
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",),
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",),
    encoder_block_out_channels=(16, 32, 64, 64),
    decoder_block_out_channels=(16, 32, 64, 64),
    encoder_layers_per_block=(0, 1, 1, 1),
    decoder_layers_per_block=(0, 1, 1, 1),
    encoder_qkv_multiscales=((),) * STAGES,
    decoder_qkv_multiscales=((),) * STAGES,
    decoder_norm_types=("rms_norm",) * STAGES,
    decoder_act_fns=("silu",) * STAGES,
    decoder_conv_act_fn="silu",
)
GUIDANCE = 2.0
LEAST = 0.7  # of the samples have to be recognised; by chance it is a tenth


@dataclass(frozen=True)
class Digits:
    """Digits as pictures.

    Attributes:
        pictures: float32 [digits, 3, SIZE, SIZE] from -1 to 1.
        labels: int64 [digits].
    """

    pictures: Tensor
    labels: Tensor


def digits() -> tuple[Digits, Digits]:
    """Those to train on, and a quarter that is held out."""
    found = load_digits()
    levels = (found.images * (255 / LARGEST)).round().astype(np.uint8)
    images = [Image.fromarray(level).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB") for level in levels]
    sides = train_test_split(np.arange(len(images)), test_size=0.25, random_state=0, stratify=found.target)
    labels = torch.from_numpy(found.target).long()
    seen, held_out = (
        Digits(torch.stack([to_tensor(images[place]) for place in side]), labels[torch.from_numpy(side)])
        for side in sides
    )
    return seen, held_out


def write_pictures(given: Digits, folder: Path) -> None:
    """As PNG files, in a folder for each class."""
    for number, (picture, label) in enumerate(zip(given.pictures, given.labels.tolist(), strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_image(picture).save(path)


def autoencoder(images: Path, output: Path, steps: int) -> AutoencoderDC:
    """Trained on pictures, with the scaling factor of their latents."""
    torch.manual_seed(0)
    vae = AutoencoderDC(**CONFIG.to_dict())
    config = PhaseConfig(
        phase=1, steps=steps, batch_size=32, resolution=SIZE, learning_rate=3e-3, weight_decay=0.01,
        warmup_steps=min(20, steps), ema_decay=0.98, zoom=1.0, evaluate_every=0, save_every=0,
    )  # fmt: skip
    AutoencoderTrainer(vae, config, images, output=output).fit()
    return vae


def scaled(vae: AutoencoderDC, seen: Digits) -> AutoencoderDC:
    """The autoencoder with the scaling factor of its latents in its configuration."""
    with torch.no_grad():
        found = latent_statistics(vae.encode(part).latent for part in seen.pictures.split(256))
    vae.register_to_config(scaling_factor=found.scaling_factor)
    return vae


def diffusion(vae: AutoencoderDC, latents: Path, output: Path, steps: int, *, hidden_size: int = 96) -> USiTPipeline:
    """A USiT, trained on latents, with what it is sampled by."""
    torch.manual_seed(0)
    size = SIZE // vae.spatial_compression_ratio
    model = UViT2DModel(
        sample_size=size, in_channels=vae.config.latent_channels, hidden_size=hidden_size, depth=4,
        num_attention_heads=4, num_classes=CLASSES,
    )  # fmt: skip
    config = DiffusionConfig(
        method="usit", steps=steps, batch_size=64, learning_rate=2e-3, warmup_steps=min(50, steps), ema_decay=0.995,
        save_every=0,
    )  # fmt: skip
    DiffusionTrainer(model, config, latents, output=output).fit()
    return USiTPipeline(vae, model, FlowODEScheduler(method="heun2"))


def sampled(pipe: USiTPipeline, each: int, steps: int = 25) -> Digits:
    """So many pictures of each class."""
    labels = torch.arange(CLASSES).repeat_interleave(each)
    drawn = torch.Generator().manual_seed(0)
    images = pipe(labels, GUIDANCE, num_inference_steps=steps, generator=drawn, output_type="pt").images
    return Digits(images * 2 - 1, labels)


def small(pictures: Tensor) -> np.ndarray:
    """Pictures as scikit-learn has digits, [digits, SMALL * SMALL] from 0 to LARGEST."""
    gray = functional.avg_pool2d(pictures.clamp(-1, 1).mean(dim=1, keepdim=True), SIZE // SMALL)
    return ((gray + 1) * (LARGEST / 2)).flatten(1).numpy()


def spread(given: Digits) -> float:
    """Mean distance of a digit from the mean of its class: 0 if all of a class are the same."""
    values = torch.from_numpy(small(given.pictures))
    apart = [values[given.labels == label] for label in range(CLASSES)]
    return torch.cat([(of - of.mean(dim=0)).norm(dim=1) for of in apart]).mean().item()


def nearest(given: Digits, seen: Digits) -> float:
    """Mean distance of a digit from the most alike one of the training: 0 if they are copies."""
    values, known = (torch.from_numpy(small(one.pictures)) for one in (given, seen))
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(values, known, compute_mode=exact).amin(dim=1).mean().item()


def score(seen: Digits, held_out: Digits, vae: AutoencoderDC, samples: Digits, note: str) -> list[dict[str, Any]]:
    """Rows of results: what the classifier recognises, and how samples lie among digits."""
    judge = SVC(gamma=0.001, C=10).fit(small(seen.pictures), seen.labels.numpy())
    with torch.no_grad():
        again = replace(held_out, pictures=reconstructed(vae.eval(), held_out.pictures))
    right = {
        name: float(judge.score(small(of.pictures), of.labels.numpy()))
        for name, of in (("digits", held_out), ("reconstructions", again), ("samples", samples))
    }
    shape, held = f"{len(samples.labels)} samples, guidance {GUIDANCE}", f"{len(held_out.labels)} held-out digits"
    real = median([right["digits"]])
    return [
        row("recognised, reconstructions", "the digits themselves", held, median([right["reconstructions"]]), real,
            unit="accuracy", higher_is_better=True),
        row("recognised, samples", "held-out digits", shape, median([right["samples"]]), real, unit="accuracy",
            higher_is_better=True, note=note),
        row("spread within a class, samples", "held-out digits", shape, median([spread(samples)]),
            median([spread(held_out)]), unit="gray levels", higher_is_better=True),
        row("distance to the nearest training digit, samples", "held-out digits", shape,
            median([nearest(samples, seen)]), median([nearest(held_out, seen)]), unit="gray levels"),
    ]  # fmt: skip


def draw(samples: Digits, path: Path, columns: int = 12) -> None:
    """A row of samples for each class, its name before it."""
    margin, pitch = 24, SIZE + 4
    sheet = Image.new("L", (margin + columns * pitch, CLASSES * pitch), 255)
    for label in range(CLASSES):
        ImageDraw.Draw(sheet).text((8, label * pitch + 8), str(label), fill=0, font_size=14)
        for column, picture in enumerate(samples.pictures[samples.labels == label][:columns]):
            sheet.paste(to_image(-picture).convert("L"), (margin + column * pitch, label * pitch))  # ink on paper
    sheet.save(path, optimize=True)


def main() -> None:
    """Train both, sample, judge, write and draw; fails where too few samples are recognised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder-steps", type=int, default=200)
    parser.add_argument("--diffusion-steps", type=int, default=2000)
    parser.add_argument("--each", type=int, default=20, help="samples of a class")
    arguments = parser.parse_args()
    seen, held_out = digits()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pictures(seen, folder / "images")
        vae = scaled(autoencoder(folder / "images", folder / "autoencoder", arguments.autoencoder_steps), seen)
        first = time.perf_counter()
        dump_latents(vae, folder / "images", folder / "latents", size=SIZE, batch_size=64)
        pipe = diffusion(vae, folder / "latents", folder / "diffusion", arguments.diffusion_steps)
    second = time.perf_counter()
    samples = sampled(pipe, arguments.each)
    note = (f"{arguments.autoencoder_steps} steps of the autoencoder in {(first - start) / 60:.1f} minutes, "
            f"{arguments.diffusion_steps} of the USiT in {(second - first) / 60:.1f}")  # fmt: skip
    rows = score(seen, held_out, vae, samples, note)
    write("dcae_digits", rows)
    draw(samples, picture_folder() / "dcae_digits.png")
    print(f"{note}; all of it took {(time.perf_counter() - start) / 60:.1f}")
    (recognised,) = (found["ours"]["p50"] for found in rows if found["what"] == "recognised, samples")
    if recognised < LEAST:
        sys.exit(f"too few samples are recognised: {recognised:.2f}, wanted {LEAST}")


if __name__ == "__main__":
    main()
