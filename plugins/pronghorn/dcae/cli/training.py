"""Commands for training: an autoencoder phase by phase, a diffusion model on its latents, and samples of that."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pronghorn.dcae.cli.options import (
    BaseModel,
    Config,
    Device,
    NoReport,
    Rfid,
    class_numbers,
    features_of,
    numbers,
    on,
    pair,
)
from pronghorn.dcae.phases import PhaseConfig

app = typer.Typer()

Output = Annotated[Path, typer.Argument(help="Folder for checkpoints, the log and the model.")]
Steps = Annotated[int, typer.Option(help="Updates of the weights.")]
BatchSize = Annotated[int, typer.Option(help="Images of a step, on each device.")]
LearningRate = Annotated[float | None, typer.Option(help="The paper's by default.")]
WeightDecay = Annotated[float | None, typer.Option(help="Of AdamW; the paper's by default.")]
Betas = Annotated[str | None, typer.Option(help="Of AdamW, two numbers with a comma; the paper's by default.")]
MaxGradNorm = Annotated[float, typer.Option(help="Gradients are shortened to this; 0 leaves them.")]
Warmup = Annotated[int, typer.Option(help="Steps over which the learning rate rises.")]
Accumulation = Annotated[int, typer.Option(help="Batches of a step.")]
EmaDecay = Annotated[float, typer.Option(help="Of the mean of the weights, which is what is kept; 0 keeps the last.")]
Precision = Annotated[str, typer.Option(help="no, bf16 or fp16.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints; 0 makes none.")]
Workers = Annotated[int, typer.Option(help="Processes that read data.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Try a few steps, print peak memory, time and disk, and stop.")]
LogWith = Annotated[str | None, typer.Option(help="A tracker of accelerate's, as tensorboard.")]
PERCEPTUAL = ("pyramid", "lpips")

L1Weight = Annotated[float, typer.Option(help="Of the mean absolute difference.")]
Perceptual = Annotated[str, typer.Option(help="pyramid, which is a stand-in, or lpips.")]
PerceptualWeight = Annotated[float, typer.Option(help="Of that distance; 0 leaves it out.")]
AdversarialWeight = Annotated[float, typer.Option(help="Phase 3: of the discriminator's judgement.")]
Adaptive = Annotated[bool, typer.Option(help="Phase 3: weight that also to a gradient as large as the other losses'.")]
DiscriminatorStart = Annotated[int, typer.Option(help="Phase 3: the step after which the discriminator counts.")]
DiscriminatorLearningRate = Annotated[float | None, typer.Option(help="Phase 3: by default as --learning-rate.")]
ChannelSamples = Annotated[int, typer.Option(help="Version 1.5: numbers of channels that a step draws.")]
AlwaysChannels = Annotated[str, typer.Option(help="Version 1.5: max, or min_max, which each step has beside these.")]
Zoom = Annotated[float, typer.Option(help="Images are shrunk to a shorter edge of at most so many times --resolution.")]
Channels = Annotated[str | None, typer.Option(help="Version 1.5: numbers of first channels to learn, with commas.")]
ChannelDraws = Annotated[int, typer.Option(help="Version 1.5: how many of these a batch draws.")]


@app.command()
def train(
    model: Annotated[str, typer.Argument(
        help="Folder in either layout, official file, or hub name with its owner; with random weights a published "
        "name or a JSON file of DCAEConfig."
    )],
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    output: Output,
    phase: Annotated[int, typer.Option(help="1 everything, 2 the middle, 3 the decoder's head.")],
    steps: Steps,
    config: Config = None,
    held_out: Annotated[Path | None, typer.Option(help="Folder of images for evaluation.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Edge of an image; by default 256, 1024 and 256.")] = None,
    batch_size: BatchSize = PhaseConfig.batch_size, learning_rate: LearningRate = None,
    weight_decay: WeightDecay = None, betas: Betas = None, max_grad_norm: MaxGradNorm = PhaseConfig.max_grad_norm,
    warmup_steps: Warmup = PhaseConfig.warmup_steps,
    gradient_accumulation_steps: Accumulation = PhaseConfig.gradient_accumulation_steps,
    middle_blocks: Annotated[int, typer.Option(help="Phase 2: also so many blocks on both sides of the latent.")] = 0,
    head_blocks: Annotated[int, typer.Option(help="Phase 3: also so many of the decoder's last blocks.")] = 0,
    l1_weight: L1Weight = PhaseConfig.l1_weight, perceptual: Perceptual = PERCEPTUAL[0],
    perceptual_weight: PerceptualWeight = PhaseConfig.perceptual_weight,
    adversarial_weight: AdversarialWeight = PhaseConfig.adversarial_weight, adaptive: Adaptive = PhaseConfig.adaptive,
    discriminator_start: DiscriminatorStart = PhaseConfig.discriminator_start,
    discriminator_learning_rate: DiscriminatorLearningRate = PhaseConfig.discriminator_learning_rate,
    channel_samples: ChannelSamples = PhaseConfig.channel_samples,
    always_channels: AlwaysChannels = PhaseConfig.always_channels, zoom: Zoom = PhaseConfig.zoom,
    ema_decay: EmaDecay = PhaseConfig.ema_decay, mixed_precision: Precision = PhaseConfig.mixed_precision,
    gradient_checkpointing: Checkpointing = False, rfid: Rfid = None,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = PhaseConfig.evaluate_every,
    save_every: SaveEvery = PhaseConfig.save_every, workers: Workers = PhaseConfig.workers,
    seed: Seed = PhaseConfig.seed, log_with: LogWith = None, dry_run: DryRun = False,
    no_report: NoReport = False, base_model: BaseModel = None,
) -> None:  # fmt: skip
    """Train an autoencoder through one of the three phases; the same command goes on with one that was broken off."""
    from pronghorn.dcae.diffusers.loading import start_dcae, starts_random
    from pronghorn.dcae.diffusers.training import AutoencoderTrainer
    from pronghorn.dcae.diffusers.training.rehearsal import rehearse
    from pronghorn.dcae.report import TrainingReport

    settings = PhaseConfig(
        phase=phase, steps=steps, resolution=resolution, batch_size=batch_size, learning_rate=learning_rate,
        weight_decay=weight_decay, betas=pair(betas), max_grad_norm=max_grad_norm, warmup_steps=warmup_steps,
        gradient_accumulation_steps=gradient_accumulation_steps, middle_blocks=middle_blocks, head_blocks=head_blocks,
        l1_weight=l1_weight, perceptual_weight=perceptual_weight, adversarial_weight=adversarial_weight,
        adaptive=adaptive, discriminator_start=discriminator_start,
        discriminator_learning_rate=discriminator_learning_rate, channel_samples=channel_samples,
        always_channels=always_channels, zoom=zoom, ema_decay=ema_decay, mixed_precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing, evaluate_every=evaluate_every, save_every=save_every,
        workers=workers, seed=seed,
    )  # fmt: skip
    distance, features = _distance(perceptual), _features(rfid, held_out, settings)
    _seed(seed)
    vae = start_dcae(model, config=config)

    def trainer(settings: PhaseConfig, output: Path) -> AutoencoderTrainer:
        return AutoencoderTrainer(
            vae, settings, images, output=output, held_out=held_out, perceptual=distance, features=features,
            log_with=log_with,
        )  # fmt: skip

    if dry_run:
        _say(str(rehearse(settings, trainer)))
        return
    made = trainer(settings, output)
    report = None if no_report else TrainingReport(made, None if starts_random(model) else model, base_model)
    metrics = made.fit()
    found = "" if metrics is None else f", PSNR {metrics.psnr:.2f} dB and SSIM {metrics.ssim:.4f} of {held_out}"
    found += "" if metrics is None or metrics.frechet is None else f", rFID {metrics.frechet:.4g} by {rfid}"
    _say(f"{output / 'model'}: phase {phase}, {steps} steps{found}")
    if report is not None and _is_first():
        typer.echo(report.write(output / "model", metrics))


@app.command()
def train_diffusion(
    latents: Annotated[Path, typer.Argument(help="Folder as `dump` writes it, with a folder for each class.")],
    output: Output, steps: Steps,
    method: Annotated[str, typer.Option(help="uvit, usit or dit.")] = "usit",
    size: Annotated[str | None, typer.Option(help="S, H or 2B; of dit S, B, L or XL.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Channels of a token, in place of the size's.")] = None,
    depth: Annotated[int | None, typer.Option(help="Blocks, likewise.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, likewise.")] = None,
    patch_size: Annotated[int, typer.Option(help="Places of a token's edge.")] = 1,
    batch_size: BatchSize = PhaseConfig.batch_size, learning_rate: LearningRate = None,
    weight_decay: WeightDecay = None, betas: Betas = None, max_grad_norm: MaxGradNorm = PhaseConfig.max_grad_norm,
    warmup_steps: Warmup = PhaseConfig.warmup_steps,
    gradient_accumulation_steps: Accumulation = PhaseConfig.gradient_accumulation_steps,
    label_dropout: Annotated[float, typer.Option(help="Share of images without their label, for guidance.")] = 0.1,
    channels: Channels = None, channel_draws: ChannelDraws = 1,
    ema_decay: EmaDecay = 0.9999, mixed_precision: Precision = PhaseConfig.mixed_precision,
    gradient_checkpointing: Checkpointing = False, save_every: SaveEvery = PhaseConfig.save_every,
    workers: Workers = PhaseConfig.workers, seed: Seed = PhaseConfig.seed, log_with: LogWith = None,
    dry_run: DryRun = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no model card.")] = False,
) -> None:  # fmt: skip
    """Train a diffusion model on latents; the same command goes on with one that was broken off."""
    from pronghorn.dcae.diffusers.training import DiffusionTrainer, Latents, new_model
    from pronghorn.dcae.diffusers.training.rehearsal import rehearse
    from pronghorn.dcae.diffusion import DiffusionConfig
    from pronghorn.dcae.report import write_diffusion_report

    settings = DiffusionConfig(
        method=method, steps=steps, batch_size=batch_size, learning_rate=learning_rate,
        weight_decay=weight_decay, betas=pair(betas), max_grad_norm=max_grad_norm, warmup_steps=warmup_steps,
        gradient_accumulation_steps=gradient_accumulation_steps, label_dropout=label_dropout,
        channels=() if channels is None else tuple(numbers(channels)), channel_draws=channel_draws, ema_decay=ema_decay,
        mixed_precision=mixed_precision, gradient_checkpointing=gradient_checkpointing, save_every=save_every,
        workers=workers, seed=seed,
    )  # fmt: skip
    data = Latents(latents)
    _seed(seed)
    model = new_model(
        method, tuple(data[0][0].shape), len(data.classes), size=size, hidden_size=hidden_size, depth=depth,
        num_attention_heads=heads, patch_size=patch_size,
    )  # fmt: skip
    _say(f"{len(data.paths)} latents of {len(data.classes)} classes, {model.num_parameters() / 1e6:.2f} M parameters")

    def trainer(settings: DiffusionConfig, output: Path) -> DiffusionTrainer:
        return DiffusionTrainer(model, settings, latents, output=output, log_with=log_with)

    if dry_run:
        _say(str(rehearse(settings, trainer)))
        return
    made = trainer(settings, output)
    made.fit()
    _say(f"{output / 'model'}: {method}, {steps} steps")
    if not no_report and _is_first():
        write_diffusion_report(output / "model", made, len(data.paths))


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="The autoencoder, as of other commands.")],
    training: Annotated[Path, typer.Argument(help="Folder that `train-diffusion` wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder for the pictures.")],
    classes: Annotated[str, typer.Option(help="Names of class folders, or numbers from 0 in their order; commas.")],
    each: Annotated[int, typer.Option(min=1, help="Pictures of a class.")] = 1,
    guidance_scale: Annotated[float | None, typer.Option(help="The paper's by default.")] = None,
    scaling_factor: Annotated[float | None, typer.Option(help="As of `dump`; by default the autoencoder's.")] = None,
    config: Config = None, batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0, device: Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try two batches, print peak memory, time and disk, and stop.")
    ] = False,
) -> None:  # fmt: skip
    """Pictures of classes, by a diffusion model that was trained here; the same ones whatever the batch size."""
    from pronghorn.dcae.diffusers import DCAEDiTPipeline, DiT2DModel, USiTPipeline, UViT2DModel, UViTPipeline
    from pronghorn.dcae.diffusers.loading import load_dcae
    from pronghorn.dcae.diffusers.training.record import MADE_FROM, read_record
    from pronghorn.dcae.dump_record import check_scaling_factor
    from pronghorn.dcae.sampling import rehearse_samples, write_samples

    kinds: dict[str, tuple[Any, Any]] = {
        "uvit": (UViTPipeline, UViT2DModel), "usit": (USiTPipeline, UViT2DModel), "dit": (DCAEDiTPipeline, DiT2DModel),
    }  # fmt: skip
    record = read_record(training)
    if record.get("method") not in kinds:
        raise ValueError(f"training: got {training}, wanted a folder that `pronghorn dcae train-diffusion` wrote")
    names = record.get(MADE_FROM, {}).get("classes", [])
    numbers = class_numbers(classes, names)
    if scaling_factor is not None:
        check_scaling_factor(scaling_factor)
    pipeline, kind = kinds[record["method"]]
    vae = load_dcae(model, config=config)
    if scaling_factor is not None:
        vae.register_to_config(scaling_factor=scaling_factor)
    pipe = on(pipeline(vae, kind.from_pretrained(training / "model").eval()), device)
    how: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    if guidance_scale is not None:
        how["guidance_scale"] = guidance_scale
    wanted = [(number, place) for number in numbers for place in range(each)]
    if dry_run:
        typer.echo(rehearse_samples(pipe, wanted, **how))
        return
    write_samples(pipe, wanted, output, **how)
    told = ", ".join(f"{number} {names[number]}" if number < len(names) else str(number) for number in numbers)
    typer.echo(f"{len(wanted)} pictures of {told} -> {output}")


def _distance(perceptual: str) -> Any:
    """What the trainer is given; None is its stand-in."""
    if perceptual not in PERCEPTUAL:
        raise ValueError(f"perceptual: got {perceptual!r}, accepted are {', '.join(PERCEPTUAL)}")
    if perceptual == "pyramid":
        return None
    try:
        import lpips
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "perceptual: got 'lpips', which needs the package of that name (pip install lpips) and downloads weights"
        ) from error
    from accelerate import PartialState

    return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False).to(PartialState().device)


def _features(rfid: str | None, held_out: Path | None, settings: PhaseConfig) -> Any:
    """What evaluations take rFID of; see `features_of`."""
    if rfid is None:
        return None
    if held_out is None:
        raise ValueError(f"rfid: got {rfid!r}, and no images are held out for it; wanted --held-out")
    from accelerate import PartialState

    from pronghorn.dcae.images import find_images

    return features_of(
        rfid, images=len(find_images(held_out)), size=int(settings.resolution or 0), device=PartialState().device
    )


def _seed(seed: int) -> None:
    """Of random weights: alike in all processes, and when the command is given again."""
    import torch

    torch.manual_seed(seed)


def _say(text: str) -> None:
    """In one of several processes."""
    if _is_first():
        typer.echo(text)


def _is_first() -> bool:
    """Whether this is the first of several processes."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
