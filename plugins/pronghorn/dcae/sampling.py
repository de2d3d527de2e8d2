"""Pictures of classes by a diffusion model, written in batches; the same ones whatever the batch size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pronghorn.estimate import Estimate, StepClock, folder_bytes, peak_bytes

TRIED = 2  # batches: the first is slower, as it starts things


def write_samples(
    pipe: Any, wanted: Sequence[tuple[int, int]], output: Path, *, batch_size: int = 8, seed: int = 0,
    on_batch: Callable[[], object] | None = None, **options: Any,
) -> None:  # fmt: skip
    """Draw pictures and write them under the number of their class and their own.

    Args:
        pipe: a pipeline of this method.
        wanted: class and number of each picture.
        output: folder of the pictures.
        batch_size: pictures at a time.
        seed: of the noise; each picture has its own.
        on_batch: called after each batch.
        **options: of the pipeline.

    Raises:
        ValueError: see the pipeline.
    """
    seeds = torch.randint(2**63 - 1, (len(wanted),), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        noise = [torch.Generator().manual_seed(one) for one in seeds[start : start + batch_size]]
        images = pipe([number for number, _ in part], generator=noise, **options).images
        output.mkdir(parents=True, exist_ok=True)
        for (number, place), image in zip(part, images, strict=True):
            image.save(output / f"{number:04d}-{place:03d}.png")
        if on_batch is not None:
            on_batch()


def rehearse_samples(pipe: Any, wanted: Sequence[tuple[int, int]], *, batch_size: int = 8, **options: Any) -> Estimate:
    """What `write_samples` takes, from two batches, or all pictures if there are fewer; arguments likewise."""
    tried, clock = wanted[: TRIED * batch_size], StepClock(pipe.device)
    with tempfile.TemporaryDirectory() as name:
        write_samples(pipe, tried, Path(name), batch_size=batch_size, on_batch=clock, **options)
        written = folder_bytes(Path(name))
    batches = len(clock.ended) + (len(wanted) - len(tried)) / batch_size  # the last one may have fewer pictures
    return Estimate(
        peak_bytes(pipe.device), written * len(wanted) // len(tried), clock.over(batches),
        f"{len(tried)} of {len(wanted)} pictures",
    )  # fmt: skip
