"""Training an autoencoder: L1, a perceptual distance and in the end a discriminator, phase by phase."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pronghorn.dcae.crops import Crops, batches
from pronghorn.dcae.diffusers.autoencoder import AutoencoderDC
from pronghorn.dcae.diffusers.training.batch_norms import restore_batch_norms
from pronghorn.dcae.diffusers.training.loop import MODEL, Loop
from pronghorn.dcae.diffusers.training.record import made_from
from pronghorn.dcae.diffusers.training.selection import select, trained_modules
from pronghorn.dcae.discriminator import PatchDiscriminator
from pronghorn.dcae.images import to_image
from pronghorn.dcae.losses import adaptive_weight, hinge_of_discriminator, hinge_of_generator, pyramid_distance
from pronghorn.dcae.metrics import Features, ReconstructionMetrics, evaluate
from pronghorn.dcae.phases import HEAD, MIN_MAX, PhaseConfig
from pronghorn.dcae.sources import squares

logger = logging.getLogger(__name__)

SAMPLES = "samples"
SHOWN = 8  # images of a sample grid


class AutoencoderTrainer:
    """Trains an autoencoder in place, through one of the three phases of decoupled high-resolution adaptation.

    What a phase does not train is the same afterwards, bit for bit. Several GPUs (`accelerate launch`), mixed precision
    and trackers are accelerate's. A training that was broken off goes on from the last checkpoint in its folder when it
    is started again with the same weights and images, as if nothing had happened.

    Args:
        vae: our `AutoencoderDC`.
        config: the phase.
        images: a folder, files, images, tensors or a `datasets.Dataset`, see `Sources`.
        output: folder for checkpoints, `log.jsonl`, sample grids, and in the end the model.
        held_out: images likewise, for evaluation by the square of their middle; none without.
        perceptual: distance of two batches of images from -1 to 1, as `lpips.LPIPS(net="vgg")` from PyPI is with its
            weights; by default `pyramid_distance`, which is a stand-in.
        features: of images, for the Fréchet distance in evaluations, which is rFID if they are of FID's Inception.
        log_with: trackers of accelerate's, as "tensorboard".

    Raises:
        TypeError: the autoencoder is another one, as diffusers' own.
        ValueError: the resolution is no multiple of the autoencoder's ratio, images cannot be read or are smaller than
            that, the autoencoder has no channels to draw from, or the folder holds another training.

    Examples:
        >>> AutoencoderTrainer(vae, PhaseConfig(phase=1, steps=100_000), "photos", output="phase-1").fit()

    Source: Chen et al. (arXiv 2410.10733), section 3.3; Chen et al. (arXiv 2508.00413) for channels drawn at random.
    """

    def __init__(
        self, vae: Any, config: PhaseConfig, images: Any, *, output: str | Path, held_out: Any = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None, features: Features | None = None,
        log_with: str | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(vae, AutoencoderDC):
            got = f"{type(vae).__module__}.{type(vae).__name__}"
            raise TypeError(
                f"vae: got {got}, wanted pronghorn.dcae.AutoencoderDC; its from_pretrained loads diffusers'"
            )
        ratio, size = vae.spatial_compression_ratio, int(config.resolution or 0)
        if size % ratio:
            raise ValueError(f"resolution: got {size}, wanted a multiple of {ratio}")
        channels = tuple(vae.config.latent_channels_list)
        if config.always_channels == MIN_MAX and not channels:
            raise ValueError("always_channels: got 'min_max', and the model has no latent_channels_list; wanted 'max'")
        self.vae, self.config, self.output = vae, config, Path(output)
        self.perceptual, self.features = perceptual or pyramid_distance, features
        self._modules = trained_modules(vae, config)
        select(vae, self._modules)
        crops = Crops(images, size=size, seed=config.seed, zoom=config.zoom)
        self._held_out = [] if held_out is None else squares(held_out, size=size, argument="held_out")
        self._loop = Loop(output, config, vae, crops, origin=made_from(vae, crops.digest()), log_with=log_with)
        accelerator = self._loop.accelerator
        vae.to(accelerator.device)
        if config.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        self._synchronizes = _several_gpus(accelerator)
        if self._synchronizes:
            nn.SyncBatchNorm.convert_sync_batchnorm(vae)
        self._channels = channels
        self._random = torch.Generator().manual_seed(config.seed)
        self._reconstruct = accelerator.prepare(_Reconstruct(vae))
        self._optimizer, self._schedule = self._loop.optimizer(self._loop.trained)
        self._discriminator: Any = None
        if config.phase == HEAD:
            self._discriminator = accelerator.prepare(PatchDiscriminator(vae.config.in_channels))
            self._critics = list(self._discriminator.parameters())
            self._critic, self._critic_schedule = self._loop.optimizer(
                self._critics, config.discriminator_learning_rate
            )

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self._loop.accelerator.device

    def evaluate(self) -> ReconstructionMetrics | None:
        """Metrics of the images that were held out, if there are some, by the autoencoder as it is."""
        if not self._held_out:
            return None
        self.vae.eval()
        stacks = batches(self._held_out, self.config.batch_size)
        found = evaluate(self.vae, stacks, features=self.features, perceptual=self.perceptual)
        select(self.vae, self._modules)
        return found

    def fit(self, on_step: Callable[[int], None] | None = None) -> ReconstructionMetrics | None:
        """Train for the configuration's steps; the autoencoder then has the mean of its weights, and is in `output`.

        Args:
            on_step: called after each step with its number.

        Returns:
            Metrics of the images that were held out, if there are some.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        for step, images in self._loop.steps():
            found: dict[str, float] = {}
            for x in images:
                with self._loop.accelerator.accumulate(self._reconstruct):
                    found = self._step(step, x)
            self._loop.count()
            if self.config.evaluate_every and step % self.config.evaluate_every == 0:
                with self._loop.mean_weights():
                    found |= self._evaluated(step)
            self._loop.log(step, found)
            if on_step is not None:
                on_step(step)
        if self.config.phase != HEAD:
            self._forget_scale()
        self._loop.finish(self.vae, self.output / MODEL)
        metrics = self.evaluate()
        if self._synchronizes:
            restore_batch_norms(self.vae)
        self.vae.eval().requires_grad_(True)
        return metrics

    def _forget_scale(self) -> None:
        """Latents are others now: the factor that made the former ones even is that of another model."""
        before = self.vae.config.scaling_factor
        if before == 1:
            return
        logger.warning(
            "scaling_factor: was %g, of latents before this training; it is 1 now, which stands for none: "
            "`pronghorn dcae stats %s IMAGES --write` estimates it", before, self.output / MODEL,
        )  # fmt: skip
        self.vae.register_to_config(scaling_factor=1.0)
        self.vae.architecture = replace(self.vae.architecture, scaling_factor=1.0)

    def _step(self, step: int, x: Tensor) -> dict[str, float]:
        config, loop = self.config, self._loop
        losses: dict[str, Tensor] = {}
        made = self._reconstruct(x, self._counts(step))
        losses["l1"] = sum((functional.l1_loss(y, x) for y in made), x.new_zeros(())) / len(made)
        total = config.l1_weight * losses["l1"]
        if config.perceptual_weight:
            near = sum((self.perceptual(y, x).mean() for y in made), x.new_zeros(())) / len(made)
            losses["perceptual"] = near
            total = total + config.perceptual_weight * near
        judged = self._discriminator is not None and step > config.discriminator_start
        if judged:
            self._discriminator.requires_grad_(False)
            adversarial = hinge_of_generator(self._discriminator(made[0]))
            weight = torch.as_tensor(config.adversarial_weight, device=x.device)
            if config.adaptive:
                weight = weight * adaptive_weight(total, adversarial, _last_weight(self.vae))
            losses |= {"adversarial": adversarial, "adversarial_weight": weight}
            total = total + weight * adversarial
        losses["loss"] = total
        loop.backward(total)
        loop.update(self._optimizer, self._schedule, loop.trained)
        if judged:
            self._discriminator.requires_grad_(True)
            real, fake = self._discriminator(torch.cat([x, made[0].detach()])).chunk(2)
            losses["discriminator"] = hinge_of_discriminator(real, fake)
            loop.backward(losses["discriminator"])
            loop.update(self._critic, self._critic_schedule, self._critics)
        return {name: value.item() for name, value in losses.items()}

    def _counts(self, step: int) -> tuple[int | None, ...]:
        """Latent channels to reconstruct from: all, perhaps the fewest, and what is drawn, alike if done again."""
        if not self._channels:
            return (None,)
        fewest = (min(self._channels),) if self.config.always_channels == MIN_MAX else ()
        self._random.manual_seed(self.config.seed * 1_000_003 + step)
        drawn = torch.randint(len(self._channels), (self.config.channel_samples,), generator=self._random)
        return None, *fewest, *(self._channels[place] for place in drawn.tolist())

    def _evaluated(self, step: int) -> dict[str, float]:
        """Metrics of images that were held out, and a picture of some of them beside what is made of them."""
        metrics = self.evaluate()
        if metrics is None:
            return {}
        self.vae.eval()
        if self._loop.accelerator.is_main_process:
            x = torch.stack(self._held_out[:SHOWN]).to(self.vae.device)
            with torch.no_grad():
                y = self.vae.decode(self.vae.encode(x).latent).sample
            grid = torch.cat([torch.cat(list(images), dim=2) for images in (x, y)], dim=1)
            (self.output / SAMPLES).mkdir(exist_ok=True)
            to_image(grid).save(self.output / SAMPLES / f"{step:08d}.png")
        select(self.vae, self._modules)
        return {f"held_out_{name}": value for name, value in metrics.to_dict().items() if value is not None}


class _Reconstruct(nn.Module):
    """Images of images, through all or through the first channels of their latents: one forward for several GPUs."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, counts: tuple[int | None, ...]) -> list[Tensor]:
        """[batch, 3, height, width], one for each number of channels."""
        latent = self.vae.encode(x).latent
        return [self.vae.decode(latent if count is None else latent[:, :count]).sample for count in counts]


def _several_gpus(accelerator: Any) -> bool:
    return bool(accelerator.num_processes > 1 and accelerator.device.type == "cuda")


def _last_weight(vae: Any) -> Tensor:
    """Of the decoder's last convolution."""
    return [parameter for parameter in vae.decoder.conv_out.parameters() if parameter.dim() == 4][-1]
