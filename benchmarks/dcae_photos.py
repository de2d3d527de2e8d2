"""A small DC-AE, trained on photographs through all three phases, and the same one without residual autoencoding.

Photographs come from Debian's lomiri-wallpapers and from scikit-image; whole ones are held out. `make demo` runs it:
13 minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import median, picture_folder, row, write
from PIL import Image, ImageDraw
from torch import Tensor

from pronghorn.dcae import AutoencoderDC, AutoencoderTrainer, DCAEConfig, PhaseConfig
from pronghorn.dcae.images import open_image, to_image, to_tensor
from pronghorn.dcae.metrics import ReconstructionMetrics, evaluate, reconstructed

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pronghorn" / "assets" / "photos"
PACKAGES = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04")
DRAWINGS = ("Fossa", "Infinite-Sea", "Painting-Colors", "analogpattern", "umang")
FROM_SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
                "retina.jpg", "rocket.jpg")  # fmt: skip
HELD_OUT = ("Picture_0B", "chelsea", "friends", "picosdeeuropa")
CREDITS = "Photographs: Freespace, Stefan van der Walt, Aitzol Berasategi (CC BY 4.0, CC0)"
EDGE = 320  # pixels of a photograph's shorter edge, as it is kept
SIZE = 256  # of the squares that are scored
STAGES = 6
# A 32 times smaller edge, 64 channels: 48 numbers of the image for each of the latent.
CONFIG = DCAEConfig(
    latent_channels=64,
    encoder_block_types=("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
    decoder_block_types=("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
    encoder_block_out_channels=(16, 32, 64, 64, 128, 128),
    decoder_block_out_channels=(16, 32, 64, 64, 128, 128),
    encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
    decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
    encoder_qkv_multiscales=((),) * STAGES,
    decoder_qkv_multiscales=((),) * STAGES,
    decoder_norm_types=("rms_norm",) * STAGES,
    decoder_act_fns=("silu",) * STAGES,
    decoder_conv_act_fn="silu",
)
PLAIN = replace(CONFIG, encoder_out_shortcut=False, decoder_in_shortcut=False, stage_shortcuts=False)
LEAST_GAIN = 1.0  # dB that residual autoencoding has to be worth


def phases(scale: float = 1.0) -> list[PhaseConfig]:
    """The three, so short that two cores run them in minutes: learning rates are ten times the paper's and more."""
    shared: dict[str, Any] = {"evaluate_every": 0, "save_every": 0, "zoom": 2.5}
    return [
        PhaseConfig(phase=1, steps=round(400 * scale), batch_size=16, resolution=128, learning_rate=2e-3,
                    weight_decay=0.01, ema_decay=0.98, warmup_steps=20, **shared),
        PhaseConfig(phase=2, steps=round(60 * scale), batch_size=4, resolution=256, learning_rate=5e-4, ema_decay=0.95,
                    **shared),
        PhaseConfig(phase=3, steps=round(80 * scale), batch_size=16, resolution=128, learning_rate=5e-4, head_blocks=1,
                    adversarial_weight=0.05, ema_decay=0.95, **shared),
    ]  # fmt: skip


def photographs() -> tuple[list[Image.Image], list[Image.Image]]:
    """Those to train on, and those held out; without Debian's packages, which is said, fewer."""
    import skimage

    data = Path(skimage.__file__).parent / "data"
    paths = [data / name for name in FROM_SKIMAGE]
    try:
        paths += [path for path in fetched() if not path.name.startswith(DRAWINGS)]
    except (OSError, subprocess.SubprocessError) as error:
        print(f"Debian's wallpapers are left out, as they cannot be had: {error}")
    sides: tuple[list[Image.Image], list[Image.Image]] = ([], [])
    for path in paths:
        image = open_image(path)
        image.thumbnail([EDGE * length / min(image.size) + 1 for length in image.size], Image.Resampling.BICUBIC)
        sides[path.name.startswith(HELD_OUT)].append(image)
    return sides


def fetched() -> list[Path]:
    """Pictures of Debian's packages, downloaded on the first call."""
    if not CACHE.is_dir():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as temporary:
            subprocess.run([program("apt-get"), "download", "-q", *PACKAGES], cwd=temporary, check=True, timeout=300)
            for package in Path(temporary).glob("*.deb"):
                subprocess.run([program("dpkg"), "-x", package, f"{temporary}/content"], check=True, timeout=60)
            (Path(temporary) / "content").rename(CACHE)
    return sorted(CACHE.rglob("*.jpg"))


def program(name: str) -> str:
    """Where a program is."""
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not there")
    return found


def scored(vae: Any, squares: Tensor) -> ReconstructionMetrics:
    """Of the held-out squares."""
    return evaluate(vae.eval(), [squares])


def train(vae: Any, phase: PhaseConfig, photos: list[Image.Image]) -> float:
    """Minutes that a phase took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderTrainer(vae, phase, photos, output=folder).fit()
    return (time.perf_counter() - start) / 60


def run(photos: list[Image.Image], squares: Tensor, scale: float) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Rows of results, and pictures by what made them."""
    rows, pictures = [], {"photograph": squares}
    torch.manual_seed(0)
    vae = AutoencoderDC(**CONFIG.to_dict())
    torch.manual_seed(0)
    plain = AutoencoderDC(**PLAIN.to_dict())
    shape = f"{len(squares)} photographs, {SIZE} px, f32c{CONFIG.latent_channels}"
    before, total = scored(vae, squares), 0.0
    for phase in phases(scale):
        minutes = train(vae, phase, photos)
        total += minutes
        after = scored(vae, squares)
        rows.append(row(f"PSNR after phase {phase.phase}", "before it", shape, median([after.psnr]),
                        median([before.psnr]), unit="dB", higher_is_better=True,
                        note=f"{phase.steps} steps, {minutes:.1f} minutes; SSIM {after.ssim:.3f}"))  # fmt: skip
        before = after
        pictures[f"after phase {phase.phase}"] = shown(vae, squares)
        if phase.phase == 1:
            train(plain, phase, photos)
            without = scored(plain, squares)
            rows.append(row("PSNR after phase 1", "without residual autoencoding", shape, median([after.psnr]),
                            median([without.psnr]), unit="dB", higher_is_better=True,
                            note=f"SSIM {after.ssim:.3f} against {without.ssim:.3f}"))  # fmt: skip
            pictures["without shortcuts"] = shown(plain, squares)
    print(f"the three phases took {total:.1f} minutes")
    return rows, pictures


@torch.no_grad()
def shown(vae: Any, squares: Tensor) -> Tensor:
    """Reconstructions."""
    return reconstructed(vae, squares)


def draw(pictures: dict[str, Tensor], path: Path) -> None:
    """Rows of pictures beneath what made them."""
    columns = list(pictures)
    sheet = Image.new("RGB", (len(columns) * SIZE, 20 + SIZE * len(pictures["photograph"])), "white")
    for column, name in enumerate(columns):
        ImageDraw.Draw(sheet).text((column * SIZE + 6, 4), name, fill="black", font_size=13)
        for place, picture in enumerate(pictures[name]):
            sheet.paste(to_image(picture), (column * SIZE, 20 + place * SIZE))
    sheet.save(path, quality=85)


def main() -> None:
    """Train, score, write and draw; fails where a phase does not help, or residual autoencoding is worth little."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="how much longer to train")
    scale = parser.parse_args().scale
    photos, held_out = photographs()
    squares = torch.stack([to_tensor(image, size=SIZE) for image in held_out])
    print(f"{len(photos)} photographs to train on, {len(held_out)} held out. {CREDITS}")
    rows, pictures = run(photos, squares, scale)
    write("dcae_photos", rows)
    draw(pictures, picture_folder() / "dcae_photos.jpg")
    gains = {f"{found['what']}, {found['against']}": found["ours"]["p50"] - found["theirs"]["p50"] for found in rows}
    low = [name for name, gain in gains.items() if gain <= (LEAST_GAIN if "without" in name else 0)]
    if low:
        sys.exit(f"too little was gained: {', '.join(f'{name}: {gains[name]:.2f} dB' for name in low)}")


if __name__ == "__main__":
    main()
