"""Latents of a data set: how large they are, and all of them as files, for training diffusion on them."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pronghorn.dcae.dump_record import NAME, check_dump, check_scaling_factor, dump_record, write_dump_record
from pronghorn.dcae.folders import linked, targets
from pronghorn.dcae.images import find_images, load_image
from pronghorn.dcae.metrics import compression_ratio, encoded
from pronghorn.estimate import Estimate, StepClock, folder_bytes, peak_bytes
from pronghorn.files.json_files import damaged

MARK = b"sha256"  # after the array, before its digest
DIGEST_BYTES = len(MARK) + 32


@dataclass(frozen=True)
class LatentStatistics:
    """How latents are distributed.

    Attributes:
        scaling_factor: 1 / the root of their mean square, less the shift, what diffusion multiplies them with.
        mean: of each channel.
        std: of each channel; (z - mean) / std is another way to scale.
        count: numbers of a channel that were seen.
        shift_factor: what is taken off before; 0 for most.
    """

    scaling_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int
    shift_factor: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def latent_statistics(latents: Iterable[Tensor], *, shift_factor: float = 0.0) -> LatentStatistics:
    """Statistics of latents, summed up in float64.

    Args:
        latents: [batch, channels, height, width] each.
        shift_factor: what is taken off before they are scaled.

    Raises:
        ValueError: there are none, channels differ, or a number is not finite.
    """
    total = square = None
    count = 0
    for latent in latents:
        values = latent.detach().double().movedim(1, 0).flatten(1)
        if not values.isfinite().all():
            raise ValueError("latents: some numbers are not finite")
        if total is not None and len(values) != len(total):
            raise ValueError(f"latents: got {len(values)} channels, the ones before had {len(total)}")
        sums, squares = values.sum(dim=1), values.square().sum(dim=1)
        total, square = (sums, squares) if total is None or square is None else (total + sums, square + squares)
        count += values.shape[1]
    if total is None or square is None or not count:
        raise ValueError("latents: there are none")
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    scale = float((std.square() + (mean - shift_factor).square()).mean().rsqrt())
    return LatentStatistics(scale, tuple(mean.tolist()), tuple(std.tolist()), count, shift_factor)


@torch.no_grad()
def statistics_of_images(
    vae: Any, paths: Sequence[Path], *, size: int, batch_size: int = 8, on_batch: Callable[[], None] | None = None
) -> LatentStatistics:
    """`latent_statistics` of what an autoencoder makes of images, with its own shift.

    Args:
        vae: any autoencoder of diffusers, in evaluation mode.
        paths: of the images.
        size: to which each is cut, pixels.
        batch_size: images at a time.
        on_batch: called after each batch.

    Raises:
        ValueError: there are no images, or a latent holds NaN or Inf.
    """

    def latents() -> Iterator[Tensor]:
        for start in range(0, len(paths), batch_size):
            batch = torch.stack([load_image(path, size=size) for path in paths[start : start + batch_size]])
            yield encoded(vae, batch.to(vae.device))
            if on_batch is not None:
                on_batch()

    return latent_statistics(latents(), shift_factor=_shift(vae))


def rehearse_statistics(vae: Any, paths: Sequence[Path], *, size: int, batch_size: int = 8) -> Estimate:
    """What `statistics_of_images` takes, from three batches, or all images if there are fewer; arguments likewise."""
    tried, clock = paths[: 3 * batch_size], StepClock(vae.device)
    statistics_of_images(vae, tried, size=size, batch_size=batch_size, on_batch=clock)
    return Estimate(
        peak_bytes(vae.device), 0, clock.over(-(-len(paths) // batch_size)), f"{len(tried)} of {len(paths)} images"
    )


def read_latent(path: Path) -> Tensor:
    """A latent that `dump_latents` wrote, or any other `.npy` file; ours end with a digest, which NumPy passes over.

    Returns:
        [channels, height, width], as it was stored.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    content = path.read_bytes()
    array, mark, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES : -DIGEST_BYTES + len(MARK)], content[-32:]
    if mark == MARK and hashlib.sha256(array).digest() != digest:
        raise ValueError(damaged(path))
    try:
        latent = torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
    except (ValueError, TypeError, OSError, EOFError, SyntaxError, MemoryError, OverflowError) as error:
        raise ValueError(f"{path}: no latent that NumPy can read: {error}") from error
    if latent.dim() != 3 or not latent.is_floating_point() or not bool(latent.isfinite().all()):
        raise ValueError(f"{path}: is {tuple(latent.shape)}, wanted finite [channels, height, width]")
    return latent


@torch.no_grad()
def dump_latents(
    vae: Any, images: str | Path, folder: str | Path, *, size: int, scaling_factor: float | None = None,
    batch_size: int = 8, verbose: bool = True,
) -> int:  # fmt: skip
    """Write each image's latent, times the scaling factor, as `.npy` in the same folders as the images.

    What is there already is passed over, and files appear whole: a run that was broken off goes on where it was, if
    `latents.json` says that the same encoder made what is there, at the same size, factor and classes.

    Args:
        vae: any autoencoder of diffusers in evaluation mode; its `shift_factor`, if it has one, is taken off first.
        images: a folder of images, in folders by class, say.
        folder: where latents go: [channels, size / ratio, size / ratio], float32.
        size: edge of the square that is cut from each image's middle.
        scaling_factor: what latents are multiplied with; by default the autoencoder's own.
        batch_size: images at a time.
        verbose: show progress.

    Returns:
        How many were written.

    Raises:
        ValueError: there are no images, one cannot be read or has no finite latent, the autoencoder's ratio does not
            divide the size, it has no scaling factor and none is given, or the folder's latents were made otherwise.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, wanted at least 1")
    ratio = compression_ratio(vae)
    if size < 1 or size % ratio:
        raise ValueError(f"size: got {size}, wanted a multiple of {ratio}")
    images, folder = Path(images), Path(folder)
    scale = vae.config.get("scaling_factor", 1) if scaling_factor is None else scaling_factor
    shift = _shift(vae)
    if scaling_factor is None and scale == 1:
        raise ValueError(
            "scaling_factor: got None, and the autoencoder has none; `pronghorn dcae stats MODEL IMAGES --write` "
            "estimates it and writes it there"
        )
    check_scaling_factor(scale)
    first = next(vae.parameters())
    files = targets(find_images(images), images, folder, suffix=".npy", flat=False)
    todo = [path for path, target in files.items() if not target.exists()]
    record = dump_record(vae, images, list(files), size, scale, shift)
    check_dump(folder, record, begun=len(todo) < len(files))
    for start in tqdm(range(0, len(todo), batch_size), desc="latents", disable=not verbose):
        paths = todo[start : start + batch_size]
        batch = torch.stack([load_image(path, size=size) for path in paths]).to(first.device, first.dtype)
        for path, latent in zip(paths, (encoded(vae, batch).float() - shift) * scale, strict=True):
            if not latent.isfinite().all():
                raise ValueError(
                    f"{path}: its latent holds NaN or Inf; are the autoencoder's weights finite? Try bfloat16"
                )
            write_dump_record(folder, record)  # not before there is a latent: a first run may fail of its settings
            _write(files[path], latent.cpu().numpy())
    return len(todo)


def rehearse_dump(vae: Any, images: str | Path, *, batch_size: int = 8, **options: Any) -> Estimate:
    """What `dump_latents` takes, from the latents of three batches, or of all images if there are fewer.

    Args:
        vae: as for `dump_latents`, as all others are.
        images: likewise.
        batch_size: likewise.
        **options: likewise.
    """
    paths = find_images(images)
    tried = paths[: 3 * batch_size]
    with tempfile.TemporaryDirectory() as name:
        chosen, latents = Path(name) / "images", Path(name) / "latents"
        times = []
        for turn, batch in enumerate((tried[:batch_size], tried[batch_size:])):
            linked(batch, chosen, first=turn * batch_size)
            started = time.perf_counter()
            dump_latents(vae, chosen, latents, batch_size=batch_size, verbose=False, **options)
            times.append(time.perf_counter() - started)
        written = folder_bytes(latents) - (latents / NAME).stat().st_size
    clock = StepClock(next(vae.parameters()).device, 0.0, [times[0]])
    later = len(tried) - batch_size
    if later > 0:
        clock.ended.append(times[0] + times[1] * batch_size / later)
    return Estimate(
        peak_bytes(clock.device), written * len(paths) // len(tried), clock.over(len(paths) / batch_size),
        f"{len(tried)} of {len(paths)} images",
    )  # fmt: skip


def _shift(vae: Any) -> float:
    """What of latents an autoencoder's configuration wants taken off, as FLUX's does."""
    return float(vae.config.get("shift_factor") or 0)


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    np.save(file, values)
    content = file.getvalue()
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_bytes(content + MARK + hashlib.sha256(content).digest())
    partial.replace(path)
