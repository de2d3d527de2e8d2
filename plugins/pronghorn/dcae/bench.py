"""How fast an autoencoder encodes and decodes, and in how much memory: as it is, accelerated, and compiled."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.dcae.diffusers import accelerate_dcae
from pronghorn.estimate import Estimate, now, peak_bytes, times_tried

# As diffusers has it, and that compiled; both with a pixel's channels side by side; ours, and ours as CUDA graphs.
OURS: dict[str, dict[str, bool]] = {
    "accelerated": {}, "accelerated_graphs": {"cuda_graphs": True},
}  # fmt: skip
FORMS = ("stock", "compiled", "channels_last", "compiled_channels_last", *OURS)
WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """Of a call.

    Attributes:
        seconds: quantiles over calls, with the device's work: "p20", "p50", "p80".
        peak_bytes: most memory that PyTorch held meanwhile, weights and recordings included; None where the device does
            not tell.
    """

    seconds: dict[str, float]
    peak_bytes: int | None


@dataclass(frozen=True)
class Speed:
    """Of an autoencoder.

    Attributes:
        form: of `FORMS`.
        what: "encode" or "decode".
        size: edge of an image in pixels.
        batch_size: images at a time.
        timing: None where memory did not suffice.
    """

    form: str
    what: str
    size: int
    batch_size: int
    timing: Timing | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def bench(
    vae: Any, *, sizes: Sequence[int], batch_sizes: Sequence[int], forms: Sequence[str] = ("stock", "accelerated"),
    repeats: int = 10,
) -> Iterator[Speed]:  # fmt: skip
    """Measure an autoencoder on random images and latents, in its device and dtype.

    Args:
        vae: an `AutoencoderDC` in evaluation mode; afterwards its weights are contiguous.
        sizes: edges of images in pixels.
        batch_sizes: numbers of images.
        forms: of `FORMS`, in this order; what compiles does so anew for each size.
        repeats: timed calls.

    Yields:
        What was measured, encoding before decoding.

    Raises:
        ValueError: the ratio does not divide a size, a number is not positive, or a form is unknown.
    """
    ratio = int(vae.spatial_compression_ratio)
    for name, values in (("sizes", sizes), ("batch_sizes", batch_sizes), ("repeats", (repeats,))):
        if not values or min(values) < 1:
            raise ValueError(f"{name}: got {values}, wanted positive numbers")
    for size in sizes:
        if size % ratio:
            raise ValueError(f"sizes: got {size}, wanted multiples of {ratio}")
    _check_forms(*forms)
    for size in sizes:
        for batch_size in batch_sizes:
            given = inputs(vae, size, batch_size)
            for form in forms:
                with in_form(vae, form) as sides:
                    for what, run in sides.items():
                        yield Speed(form, what, size, batch_size, _fitting(run, given[what], repeats))


def rehearse(vae: Any, *, repeats: int, **how: Any) -> Estimate:
    """What all of `bench` takes, from one repeat of each measurement, warm and compiled as the others are.

    Args:
        vae: as for `bench`, as all others are.
        repeats: likewise.
        **how: likewise.
    """
    device = next(vae.parameters()).device
    for _ in range(times_tried(device)):
        started = now(device)
        timings = [one.timing for one in bench(vae, repeats=1, **how) if one.timing is not None]
        seconds = now(device) - started
    seconds += (repeats - 1) * sum(timing.seconds["p50"] for timing in timings)
    # On a GPU each measurement begins its peak anew.
    peak = max([peak_bytes(device), *(timing.peak_bytes or 0 for timing in timings)])
    return Estimate(peak, 0, seconds, f"one of {repeats} repeats")


def inputs(vae: Any, size: int, batch_size: int) -> dict[str, Tensor]:
    """Random images to "encode" and latents to "decode", in the autoencoder's device and dtype."""
    first = next(vae.parameters())
    grid = size // int(vae.spatial_compression_ratio)
    generator = torch.Generator(first.device).manual_seed(0)
    like: dict[str, Any] = {"generator": generator, "device": first.device, "dtype": first.dtype}
    images = torch.rand(batch_size, vae.config.in_channels, size, size, **like) * 2 - 1
    return {"encode": images, "decode": torch.randn(batch_size, vae.config.latent_channels, grid, grid, **like)}


@contextmanager
def in_form(vae: Any, form: str) -> Iterator[dict[str, Callable[[Tensor], Tensor]]]:
    """An autoencoder's encoder and decoder ("encode", "decode") in one of `FORMS`, until the end of the block.

    Raises:
        ValueError: the form is unknown.
    """
    _check_forms(form)
    of: AbstractContextManager[Any] = _laid_out(vae, form.endswith("channels_last"))
    if form in OURS:
        of = accelerate_dcae(vae, **OURS[form])
    with of:
        sides: dict[str, Callable[[Tensor], Tensor]] = {"encode": vae.encoder, "decode": vae.decoder}
        if form.startswith("compiled"):
            torch.compiler.reset()  # after a few shapes it would fall back to eager, and not say so
            sides = {what: torch.compile(side, dynamic=False) for what, side in sides.items()}
        yield sides


def timed(run: Callable[[], Any], device: torch.device, *, repeats: int = 10) -> Timing:
    """Time of a call from its start until the device has done its work, and the memory that it takes.

    Raises:
        OutOfMemoryError: torch's, where memory does not suffice.
    """
    on_gpu = device.type == "cuda"
    for _ in range(WARM_UP):
        run()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats):
        start = now(device)
        run()
        times.append(now(device) - start)
    ordered = sorted(times)
    seconds = {name: ordered[round(q * (repeats - 1))] for name, q in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8))}
    return Timing(seconds, torch.cuda.max_memory_reserved(device) if on_gpu else None)


def free() -> None:
    """Give back a GPU's memory of what is gone."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _fitting(run: Callable[[Tensor], Tensor], x: Tensor, repeats: int) -> Timing | None:
    try:
        return timed(lambda: run(x), x.device, repeats=repeats)
    except torch.OutOfMemoryError:
        return None  # is told in the result
    finally:
        free()


@contextmanager
def _laid_out(vae: Any, channels_last: bool) -> Iterator[None]:
    vae.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    try:
        yield
    finally:
        vae.to(memory_format=torch.contiguous_format)


def _check_forms(*forms: str) -> None:
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise ValueError(f"forms: got {unknown or 'none'}, accepted are {', '.join(FORMS)}")
