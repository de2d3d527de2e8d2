"""DC-AE at its published sizes with random weights, in bf16: autoencoders, large images, and diffusion on latents.

- autoencoder: encoding and decoding, as CUDA graphs and without, against diffusers' own class as it is loaded.
- compiled, compiled_sana: the same against `torch.compile` of that, as it is loaded and with channels last (a graph for
  every shape, default mode).
- convolutions: those of residual blocks with what follows them, against PyTorch's (cuDNN) with the kernels of this
  library for what follows.
- memory: decoding 8192 x 8192 pixels in tiles, and what tiles change at 4096 x 4096.
- uvit: UViT-H for images of 512 x 512 pixels, on latents of f64c128 in patches of 1, against latents as Stable
  Diffusion's in patches of 2: training steps, sampling (30 times one evaluation of the network), and sampling with the
  decoders (ours accelerated; Stable Diffusion's with channels last). Each side at its best batch; as called, and with
  `compile_repeated_blocks`.

Calls are timed one by one from the host until the GPU is done, as a user waits for them. Words on the command line name
parts, each of which then has a results file of its own; without any, all go to one. dc-ae-f32c32-sana-1.0 and 1.1 have
one architecture.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import diffusers
import torch
from harness import device, median, row, write
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pronghorn.dcae.bench import Timing, bench, free, in_form, inputs, timed
from pronghorn.dcae.config import EVIT, RES, DCAEConfig, published
from pronghorn.dcae.diffusers import SIZES, UViT2DModel, accelerate_dcae, stream_decode, tiled_decode
from pronghorn.kernels.bias_activation import bias_activation
from pronghorn.kernels.channel_rms_norm import channel_rms_norm
from pronghorn.kernels.fused_convolution import fused_convolution

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
TINY = DCAEConfig(
    latent_channels=8, attention_head_dim=8, encoder_block_types=(RES, RES, EVIT), decoder_block_types=(RES, RES, EVIT),
    encoder_block_out_channels=(8, 16, 16), decoder_block_out_channels=(8, 16, 16), encoder_layers_per_block=(0, 1, 1),
    decoder_layers_per_block=(0, 1, 1), encoder_qkv_multiscales=((),) * 3, decoder_qkv_multiscales=((),) * 3,
    decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"), decoder_act_fns=("relu", "relu", "silu"),
)  # fmt: skip
NAMES = ["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.1", "dc-ae-f64c128-in-1.0"]
MODELS = {name: published(name) for name in NAMES} if GPU else {"tiny": TINY}
# Edge in pixels and images at a time.
SHAPES = [(512, 1), (512, 16), (1024, 1), (1024, 8), (4096, 1)] if GPU else [(16, 1), (32, 2)]
# Where peers are compiled: a graph takes many seconds.
COMPILED = {"dc-ae-f32c32-in-1.0": (1024, 8), "dc-ae-f64c128-in-1.0": (512, 16)} if GPU else {"tiny": (16, 1)}
COMPILED_SANA = {"dc-ae-f32c32-sana-1.1": (1024, 8)} if GPU else COMPILED
# Images, channels and edge, as in the shapes above.
CONVOLUTIONS = [(8, 256, 512), (8, 512, 256), (16, 256, 256), (16, 512, 128)] if GPU else [(1, 4, 8)]
OURS = {"accelerated_graphs": "", "accelerated": ", without CUDA graphs"}
REPEATS = 10 if GPU else 2
FEWER_PIXELS = 2 << 20  # beyond, a call is long enough for half the repeats
EAGER_REACH, COMPILED_REACH = 1.8, 1.2

HUGE, WHOLE, TILE = (8192, 4096, 1024) if GPU else (128, 64, 32)
MOST_BYTES, MOST_SEAM, LEAST_SEAM = 16e9, 1e-3, 2**-24  # the last is float32's rounding

NETWORK, (DEPTH, HIDDEN_SIZE, HEADS) = ("UViT-H", SIZES["H"]) if GPU else ("tiny UViT", (2, 64, 4))
IMAGE_SIZE, EVALUATIONS = 512 if GPU else 128, 30
# Ratio, channels and patch size of the latents.
DEEP, SHALLOW = (64, 128, 1), (8, 4, 2)
FIRST_BATCH, LAST_BATCH = (16, 1 << 16) if GPU else (1, 2)
SAMPLING_REACH, TRAINING_REACH = 19.1, 17.9
HOW = {False: "", True: ", blocks compiled"}
DECODED_BATCH = 16 if GPU else 1

Rows = list[dict[str, Any]]


def stock(config: DCAEConfig, dtype: torch.dtype = DTYPE, where: torch.device | None = None) -> Any:
    """diffusers' own class."""
    known = inspect.signature(diffusers.AutoencoderDC.__init__).parameters
    values = {name: value for name, value in config.to_dict().items() if name in known}
    torch.manual_seed(0)
    with where or device():
        return diffusers.AutoencoderDC(**values).eval().to(dtype)


def autoencoder_rows() -> Iterator[Rows]:
    """Against diffusers' own, not compiled."""
    peers: dict[str, tuple[str, float | None]] = {"stock": ("diffusers eager", EAGER_REACH)}
    for name, config in MODELS.items():
        vae = stock(config)
        rounding = {what: f"from float32 by {ours:.1%} (diffusers {theirs:.1%}) at {SHAPES[0][0]} px"
                    for what, (ours, theirs) in off_from_float32(vae, *SHAPES[0]).items()}  # fmt: skip
        for shape in SHAPES:
            yield from going_on(partial(speed_rows, name, vae, shape, OURS, peers, rounding))


def compiled_rows(shapes: dict[str, tuple[int, int]]) -> Iterator[Rows]:
    """Against it compiled."""
    peers: dict[str, tuple[str, float | None]] = {
        "compiled": ("diffusers, torch.compile", COMPILED_REACH),
        "compiled_channels_last": ("diffusers with channels last, torch.compile", COMPILED_REACH),
    }
    for name, shape in shapes.items():
        yield from going_on(partial(speed_rows, name, stock(MODELS[name]), shape, OURS, peers, None))


@torch.no_grad()
def convolution_rows() -> Iterator[Rows]:
    """Convolutions of residual blocks, each with what follows it."""
    for batch, channels, size in CONVOLUTIONS:
        yield from going_on(partial(one_convolution, batch, channels, size))


def one_convolution(batch: int, channels: int, size: int) -> Rows:
    """With an activation, and with a norm and a sum."""
    torch.manual_seed(0)
    like: dict[str, Any] = {"device": device(), "dtype": DTYPE}
    x, residual = (torch.randn(batch, channels, size, size, **like).to(memory_format=torch.channels_last)
                   for _ in range(2))  # fmt: skip
    weight = torch.randn(channels, channels, 3, 3, **like).div(3 * channels**0.5)
    weight = weight.to(memory_format=torch.channels_last)
    bias, scale, shift = torch.randn(3, channels, **like)
    shape, operations = f"{batch} x {channels} x {size} x {size}", 2 * 9 * batch * size**2 * channels**2
    ways: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "SiLU": (
            lambda: fused_convolution(x, weight, bias, activation="silu"),
            lambda: bias_activation(torch.conv2d(x, weight, padding=1), bias, activation="silu"),
        ),
        "norm and sum": (
            lambda: fused_convolution(x, weight, norm_weight=scale, norm_bias=shift, residual=residual),
            lambda: channel_rms_norm(torch.conv2d(x, weight, padding=1), scale, shift, residual=residual),
        ),
    }
    rows = []
    for what, runs in ways.items():
        ours, theirs = (timed(run, device(), repeats=REPEATS).seconds for run in runs)
        rows.append(row(f"fused_convolution, {what}", "cuDNN, and our kernel for the rest", shape, ours, theirs,
                        note=f"{operations / ours['p50'] / 1e12:.0f} TFLOP/s"))  # fmt: skip
    return rows


def going_on(measure: Callable[[], Rows]) -> Iterator[Rows]:
    """Rows, or on standard output why there are none."""
    try:
        yield measure()
    except Exception as error:  # noqa: BLE001 - one shape that fails is said so, and others are measured
        sys.stdout.write(f"{measure}: {type(error).__name__}: {str(error)[:500]}\n")
    free()


@torch.no_grad()
def speed_rows(
    name: str, vae: Any, shape: tuple[int, int], ours: dict[str, str], peers: dict[str, tuple[str, float | None]],
    rounding: dict[str, str] | None,
) -> Rows:  # fmt: skip
    """One model at one shape, in all forms; with `rounding`, results are also compared."""
    size, batch = shape
    repeats = REPEATS if batch * size**2 < FEWER_PIXELS else REPEATS // 2
    speeds = list(bench(vae, sizes=[size], batch_sizes=[batch], forms=[*peers, *ours], repeats=repeats))
    timings = {(speed.form, speed.what): speed.timing for speed in speeds}
    operations, rows = flops(MODELS[name], size, batch), []
    same = {} if rounding is None else {what: f"differs from diffusers by {apart:.1%}, {rounding[what]}"
                                        for what, apart in difference(vae, size, batch).items()}  # fmt: skip
    for speed in speeds:
        for peer, (against, reach) in peers.items() if speed.form in ours else ():
            what, mine, theirs = speed.what, speed.timing, timings[peer, speed.what]
            if mine is None or theirs is None:
                sys.stdout.write(f"{what} {name} {shape}: out of memory, {speed.form} or {peer}\n")
                continue
            notes = [f"{operations[what] / mine.seconds['p50'] / 1e12:.0f} TFLOP/s",
                     f"{gigabytes(mine)} against {gigabytes(theirs)}", *([same[what]] if same else [])]  # fmt: skip
            rows.append(row(f"{what}, {name}{ours[speed.form]}", against, f"{size} px, batch {batch}", mine.seconds,
                            theirs.seconds, reach=reach, note="; ".join(notes)))  # fmt: skip
    return rows


def gigabytes(timing: Timing) -> str:
    """Peak memory, for a note."""
    return "memory unknown" if timing.peak_bytes is None else f"{timing.peak_bytes / 1e9:.1f} GB"


def flops(config: DCAEConfig, size: int, batch: int) -> dict[str, float]:
    """Of diffusers' own code: convolutions, for the most part."""
    vae, found = stock(config, where=torch.device("meta")), {}
    grid = size // config.spatial_compression_ratio
    shapes = {"encode": (batch, 3, size, size), "decode": (batch, config.latent_channels, grid, grid)}
    for what, run in (("encode", vae.encoder), ("decode", vae.decoder)):
        with FlopCounterMode(display=False) as counter:
            run(torch.empty(shapes[what], device="meta", dtype=DTYPE))
        found[what] = float(counter.get_total_flops())
    return found


def difference(vae: Any, size: int, batch: int) -> dict[str, float]:
    """How far accelerated results are from stock ones, relative to these; NaN where memory does not suffice."""
    found = {}
    for what, x in inputs(vae, size, batch).items():
        try:
            found[what] = relative(*(one(vae, form, what, x) for form in ("accelerated", "stock")))
        except torch.OutOfMemoryError:
            found[what] = float("nan")
    return found


@torch.no_grad()
def off_from_float32(vae: Any, size: int, batch: int) -> dict[str, tuple[float, float]]:
    """How far accelerated and stock results are from the stock ones in float32."""
    given = inputs(vae, size, batch)
    rounded = {what: [one(vae, form, what, x) for form in ("accelerated", "stock")] for what, x in given.items()}
    vae.float()
    exact = {what: one(vae, "stock", what, x.float()) for what, x in given.items()}
    vae.to(DTYPE)
    return {what: (relative(rounded[what][0], y), relative(rounded[what][1], y)) for what, y in exact.items()}


def one(vae: Any, form: str, what: str, x: Tensor) -> Tensor:
    """One result in one form."""
    with in_form(vae, form) as sides:
        return sides[what](x)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Distance relative to the size of what is wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@torch.no_grad()
def memory_rows() -> Iterator[Rows]:
    """A huge image's memory, and what tiles change."""
    for name, config in list(MODELS.items())[:2]:
        yield from going_on(partial(huge_rows, name, config))
        yield from going_on(partial(seam_rows, name, config))


def huge_rows(name: str, config: DCAEConfig) -> Rows:
    """Peak memory of tiled decoding."""
    vae, rows = stock(config), []
    z = inputs(vae, HUGE, 1)["decode"]

    def streamed() -> None:
        for _ in stream_decode(vae, z, tile=TILE):
            pass

    for what, run in (("streamed", streamed), ("tiled", lambda: tiled_decode(vae, z, tile=TILE))):
        with accelerate_dcae(vae):
            timing = timed(run, device(), repeats=1)
        seconds = f"{timing.seconds['p50']:.2f} s"
        if timing.peak_bytes is None:
            sys.stdout.write(f"{name} {what}: {seconds}; the device does not tell its memory\n")
            continue
        rows.append(row(f"decode, {name}, {what}, peak memory", "the most allowed", f"{HUGE} px, tiles of {TILE}",
                        median([timing.peak_bytes / 2**20]), median([MOST_BYTES / 2**20]), unit="MiB", reach=1.0,
                        note=seconds))  # fmt: skip
    return rows


def seam_rows(name: str, config: DCAEConfig) -> Rows:
    """The largest difference of tiled from untiled decoding, in the image's range; in bf16 beside its rounding."""
    vae = stock(config, torch.float32)
    z = inputs(vae, WHOLE, 1)["decode"]
    with accelerate_dcae(vae):
        exact = vae.decode(z).sample
        spread = float(exact.max() - exact.min())
        seam = float((tiled_decode(vae, z, tile=TILE) - exact).abs().max()) / spread
    rows = [seam_row(f"{name}, float32", "the most allowed", seam, MOST_SEAM, 1.0, "against untiled")]
    vae.to(torch.bfloat16)
    with accelerate_dcae(vae):
        whole = vae.decode(z.bfloat16()).sample
        rounding = float((whole.float() - exact).abs().max()) / spread
        seam = float((tiled_decode(vae, z.bfloat16(), tile=TILE) - whole).abs().max()) / spread
    note = "against untiled; rounding against float32"
    return [*rows, seam_row(f"{name}, bfloat16", "its rounding", seam, rounding, None, note)]


def seam_row(about: str, against: str, seam: float, bound: float, reach: float | None, note: str) -> dict[str, Any]:
    """What tiles change, beside a bound."""
    seams, bounds = median([max(seam, LEAST_SEAM)]), median([bound])
    shape = f"{WHOLE} px, tiles of {TILE}"
    return row(f"seam, {about}", against, shape, seams, bounds, unit="of the range", reach=reach, note=note)


def uvit_rows() -> Iterator[Rows]:
    """One diffusion model on deep and on shallow latents."""
    for compiled in (False, True):
        yield from going_on(partial(training_rows, compiled))
        for upcast in (False,) if compiled else (False, True):
            yield from going_on(partial(sampling_rows, compiled, upcast))


def uvit(latents: tuple[int, int, int], compiled: bool, **options: Any) -> Any:
    """The network on latents of images."""
    ratio, channels, patch_size = latents
    torch.manual_seed(0)
    with device():
        model = UViT2DModel(
            sample_size=IMAGE_SIZE // ratio, patch_size=patch_size, in_channels=channels, depth=DEPTH,
            hidden_size=HIDDEN_SIZE, num_attention_heads=HEADS, **options,
        )  # fmt: skip
    if compiled:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return model


def fastest(run_of: Callable[[int], Callable[[], Any]], per_call: int = 1) -> tuple[dict[str, float], str]:
    """Images a second at the best batch: doubled until it does not fit or was twice not faster, then those between.

    Args:
        run_of: makes a call on a batch.
        per_call: how many such calls an image takes.
    """
    measured: dict[int, tuple[dict[str, float], str]] = {}

    def fits(batch: int) -> bool:
        torch.compiler.reset()  # each batch is a graph of its own, and they may be only so many
        try:
            timing = timed(run_of(batch), device(), repeats=5 if GPU else 2)
        except torch.OutOfMemoryError:
            return False
        finally:
            free()
        found = rate({name: seconds * per_call / batch for name, seconds in timing.seconds.items()})
        measured[batch] = found, f"batch {batch}, {gigabytes(timing)}"
        return True

    def best() -> int:
        return max(measured, key=lambda batch: measured[batch][0]["p50"], default=0)

    batch = FIRST_BATCH
    while batch <= min(LAST_BATCH, 4 * (best() or FIRST_BATCH)) and fits(batch):
        batch *= 2
    doubled = best()
    for between in (doubled * 5 // 4, doubled * 3 // 2):
        if doubled < between <= LAST_BATCH:
            fits(between)
    return measured.get(best(), ({"p50": 0.0}, "nothing fits"))


def rate(seconds: dict[str, float]) -> dict[str, float]:
    """Images a second from seconds an image."""
    return {"p20": 1 / seconds["p80"], "p50": 1 / seconds["p50"], "p80": 1 / seconds["p20"]}


def batch_of(model: Any, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times and labels."""
    size, where = model.config.sample_size, device()
    z = torch.randn(batch, model.config.in_channels, size, size, device=where, dtype=dtype)
    return z, torch.full((batch,), 500.0, device=where), torch.zeros(batch, dtype=torch.long, device=where)


def training_rows(compiled: bool) -> Rows:
    """Steps of AdamW in mixed precision."""

    def steps(latents: tuple[int, int, int]) -> tuple[dict[str, float], str]:
        model = uvit(latents, compiled).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, fused=GPU
        )  # fmt: skip

        def run_of(batch: int) -> Callable[[], None]:
            z, times, labels = batch_of(model, batch, torch.float32)

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device().type, torch.bfloat16):
                    loss = functional.mse_loss(model(z, times, labels).sample.float(), z)
                loss.backward()
                optimizer.step()

            return step

        return fastest(run_of)

    (ours, about), (theirs, their) = steps(DEEP), steps(SHALLOW)
    return [row(f"training, {NETWORK} on f64c128p1{HOW[compiled]}", "on f8c4p2", f"{IMAGE_SIZE} px", ours, theirs,
                unit="images/s", reach=TRAINING_REACH, higher_is_better=True,
                note=f"bf16 autocast, AdamW, on latents; {about} against {their}")]  # fmt: skip


@torch.no_grad()
def sampling_rows(compiled: bool, upcast: bool) -> Rows:
    """Evaluations of the network, and with the decoders."""

    def evaluations(latents: tuple[int, int, int]) -> tuple[dict[str, float], str]:
        model = uvit(latents, compiled, upcast_attention=upcast).eval().to(DTYPE)

        def run_of(batch: int) -> Callable[[], Any]:
            z, times, labels = batch_of(model, batch, DTYPE)
            return lambda: z - model(z, times, labels).sample / EVALUATIONS

        return fastest(run_of, EVALUATIONS)

    shape, (deep, shallow) = f"{IMAGE_SIZE} px, {EVALUATIONS} evaluations", decoder_seconds()
    how = ("attention in float32 as published" if upcast else "attention in bf16") + HOW[compiled]
    (ours, about), (theirs, their) = evaluations(DEEP), evaluations(SHALLOW)
    note = f"no guidance; {about} against {their}"
    alone = row(f"sampling, {NETWORK} on f64c128p1, {how}", "on f8c4p2", shape, ours, theirs, unit="images/s",
                reach=SAMPLING_REACH, higher_is_better=True, note=f"without decoders; {note}")  # fmt: skip
    ours, theirs = with_decoder(ours, deep), with_decoder(theirs, shallow)
    note = f"{note}; decoders at batch {DECODED_BATCH}: {1 / deep:.1f} against {1 / shallow:.1f} images/s"
    return [alone, row(f"sampling and decoding, {NETWORK} on f64c128p1, {how}", "on f8c4p2", shape, ours, theirs,
                       unit="images/s", higher_is_better=True, note=note)]  # fmt: skip


def with_decoder(images: dict[str, float], seconds: float) -> dict[str, float]:
    """Images a second when each is also decoded."""
    return {name: 1 / (1 / value + seconds) for name, value in images.items()}


def decoder_seconds() -> tuple[float, float]:
    """Of an image: of ours for deep latents, and of Stable Diffusion's autoencoder with channels last."""
    vae = stock(MODELS["dc-ae-f64c128-in-1.0"] if GPU else TINY)
    with accelerate_dcae(vae):
        deep = timed(partial(vae.decode, inputs(vae, IMAGE_SIZE, DECODED_BATCH)["decode"]), device(), repeats=REPEATS)
    del vae
    widths = (128, 256, 512, 512) if GPU else (32,) * 4
    with device():
        other = diffusers.AutoencoderKL(
            block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=SHALLOW[1],
        ).eval().to(DTYPE, memory_format=torch.channels_last)  # fmt: skip
        z = torch.randn(DECODED_BATCH, SHALLOW[1], IMAGE_SIZE // SHALLOW[0], IMAGE_SIZE // SHALLOW[0], dtype=DTYPE)
    shallow = timed(partial(other.decode, z), device(), repeats=REPEATS)
    return deep.seconds["p50"] / DECODED_BATCH, shallow.seconds["p50"] / DECODED_BATCH


PARTS = {
    "autoencoder": autoencoder_rows, "compiled": partial(compiled_rows, COMPILED),
    "compiled_sana": partial(compiled_rows, COMPILED_SANA), "convolutions": convolution_rows, "memory": memory_rows,
    "uvit": uvit_rows,
}  # fmt: skip


def main() -> None:
    """Measure and write the results, what there is after each step."""
    diffusers.logging.set_verbosity_error()
    torch.backends.cudnn.allow_tf32 = False  # float32 is what others are held against
    unknown = set(sys.argv[1:]) - set(PARTS)
    if unknown:
        sys.exit(f"parts: got {', '.join(sorted(unknown))}, accepted are {', '.join(PARTS)}")
    rows: Rows = []
    for name in sys.argv[1:] or PARTS:
        if sys.argv[1:]:
            rows = []
        for found in PARTS[name]():
            rows += found
            write(f"dcae-{name}" if sys.argv[1:] else "dcae", rows)


if __name__ == "__main__":
    main()
