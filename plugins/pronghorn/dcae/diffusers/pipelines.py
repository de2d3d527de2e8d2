"""Images of classes: UViT, USiT and DiT with an autoencoder, as diffusers' pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC as StockAutoencoderDC
from diffusers import DDPMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm import tqdm

from pronghorn.dcae.diffusers.autoencoder import AutoencoderDC
from pronghorn.dcae.diffusers.guidance import guided
from pronghorn.dcae.diffusers.schedulers import DPMSolverFastScheduler, FlowODEScheduler

OUTPUTS = ("pil", "np", "pt", "latent")
# How DiT is sampled: evenly spaced steps, the variance that the model answers with, and nothing clipped.
DIT_SAMPLING = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "timestep_spacing": "linspace", "variance_type": "learned_range", "clip_sample": False,
}  # fmt: skip
Callback = Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]]


class _ClassPipeline(DiffusionPipeline):
    """What the pipelines have in common: labels and noise before, pictures after."""

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]  # diffusers declares None
    _optional_components: list[str] = ["scheduler"]  # noqa: RUF012  # as diffusers declares it
    first_timestep = 0  # how the model counts the step that schedulers call 0
    scheduler_method = "step"

    def __init__(
        self, vae: Any, transformer: Any, scheduler: Any = None, latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        channels = int(transformer.config.in_channels)
        _check_channels(vae, channels)
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            if (latents_mean is None) != (latents_std is None):
                raise ValueError("latents_mean, latents_std: got one, wanted both or none")
            if values is not None and len(values) != channels:
                raise ValueError(f"{name}: got {len(values)}, wanted one for each of the {channels} channels")
        scheduler = self._usual_scheduler() if scheduler is None else scheduler
        if not hasattr(scheduler, self.scheduler_method):
            raise TypeError(f"scheduler: got {type(scheduler).__name__}, wanted one with `{self.scheduler_method}`")
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            latents_mean=None if latents_mean is None else list(latents_mean),
            latents_std=None if latents_std is None else list(latents_std),
        )
        self.image_processor = VaeImageProcessor()

    @staticmethod
    def _usual_scheduler() -> Any:
        raise NotImplementedError

    def _prepare(
        self, class_labels: int | Sequence[int] | Tensor, generator: Any, output_type: str
    ) -> tuple[Tensor, Tensor]:
        """Labels int64 [batch] and noise float32 [batch, channels, height, width].

        Raises:
            ValueError: as the call does; before anything is computed.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: got {output_type!r}, accepted are {', '.join(OUTPUTS)}")
        if output_type != "latent" and self.config["latents_std"] is None and self.vae.config.scaling_factor == 1:
            raise ValueError(
                "scaling_factor: the autoencoder has 1, which stands for none; what the latents of the training were "
                "multiplied with is wanted in its configuration, or latents_mean and latents_std of the pipeline"
            )
        labels = torch.as_tensor(class_labels)
        labels = labels[None] if labels.dim() == 0 else labels
        classes = int(self.transformer.num_classes)
        whole = labels.dim() == 1 and len(labels) > 0 and labels.dtype in (torch.int32, torch.int64)
        if not whole or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels: got {class_labels}, wanted whole numbers from 0 to {classes - 1}")
        size = self.transformer.config.sample_size
        shape = (len(labels), self.transformer.config.in_channels, size, size)
        device = self._execution_device
        # The sample stays in float32 whatever the model's precision: it gathers the steps' rounding errors.
        noise = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)
        return labels.to(device, torch.int64), noise * self.scheduler.init_noise_sigma

    def _predict(self, latents: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        found = guided(self.transformer, latents.to(self.transformer.dtype), timestep, labels, guidance_scale)
        return found.float()

    def _denoise(
        self, latents: Tensor, labels: Tensor, guidance_scale: float, num_inference_steps: int, generator: Any,
        callback: Callback | None,
    ) -> Tensor:  # fmt: skip
        """Step by step, with any scheduler that has `step`."""
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if "generator" in accepted else {}
        variances = self._takes_variances()
        for number, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            seen = self.scheduler.scale_model_input(latents, timestep)
            found = self._predict(seen, timestep + self.first_timestep, labels, guidance_scale)
            found = found if variances else found[:, : latents.shape[1]]
            latents = self.scheduler.step(found, timestep, latents, **extra).prev_sample
            if callback is not None:
                latents = callback(self, number, timestep, {"latents": latents}).get("latents", latents)
        return latents

    def _takes_variances(self) -> bool:
        """Whether the scheduler wants to be given the model's variances.

        Raises:
            ValueError: it is set up for them, and the model has none, or it would cut its answer to 3 channels, as
                diffusers' solvers do that are made from another one's configuration.
        """
        if not str(self.scheduler.config.get("variance_type")).startswith("learned"):
            return False
        channels = self.transformer.config.in_channels
        if self.transformer.config.get("out_channels") != 2 * channels or not isinstance(self.scheduler, DDPMScheduler):
            got = f"{type(self.scheduler).__name__} with variance_type {self.scheduler.config.variance_type!r}"
            raise ValueError(f"scheduler: got {got}, wanted variance_type=None, or DDPMScheduler for a DiT")
        return True

    def _deliver(self, latents: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple[Any]:
        images: Any = latents
        if output_type != "latent":
            if self.config["latents_std"] is None:
                latents = latents / self.vae.config.scaling_factor
            else:
                mean, std = (latents.new_tensor(values)[:, None, None]
                             for values in (self.config["latents_mean"], self.config["latents_std"]))  # fmt: skip
                latents = latents * std + mean
            decoded = self.vae.decode(latents.to(self.vae.dtype)).sample
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class UViTPipeline(_ClassPipeline):
    """Images of classes by a UViT that predicts noise.

    Args:
        vae: an autoencoder, ours or diffusers' `AutoencoderDC`; a model of fewer channels takes the first of an
            adaptive one.
        transformer: a `UViT2DModel`.
        scheduler: anything of diffusers' that has `step` and counts training steps from 0, of which UViT's are counted
            from 1; by default `DPMSolverFastScheduler`.
        latents_mean: of each channel, where the training standardized latents; by default the autoencoder's
            scaling_factor counts.
        latents_std: likewise.

    Raises:
        TypeError: the autoencoder is of another class, or the scheduler has no `step`.
        ValueError: the parts do not fit together.

    Source: Chen et al. (arXiv 2410.10733), section 4.
    """

    first_timestep = 1

    @staticmethod
    def _usual_scheduler() -> DPMSolverFastScheduler:
        return DPMSolverFastScheduler()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        guidance_scale: float = 1.5,
        num_inference_steps: int = 30,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image for each label.

        Args:
            class_labels: from 0 to the transformer's num_classes - 1.
            guidance_scale: 1 is the class alone, and takes half of the work.
            num_inference_steps: evaluations of the model.
            generator: what noise is drawn with; or one for each label.
            output_type: "pil"; "np" [batch, height, width, 3] or "pt" [batch, 3, height, width] from 0 to 1; or
                "latent", scaled as for the training.
            return_dict: give an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called with the pipeline, the number of the step, its time and {"latents": …}; what
                it gives back as "latents" is gone on with.

        Raises:
            ValueError: a label or an output type is unknown, or the autoencoder has no scaling factor.
        """
        labels, latents = self._prepare(class_labels, generator, output_type)
        latents = self._denoise(latents, labels, guidance_scale, num_inference_steps, generator, callback_on_step_end)
        return self._deliver(latents, output_type, return_dict)


class DCAEDiTPipeline(_ClassPipeline):
    """Images of classes by a DiT that predicts noise and its variance.

    diffusers' `DiTPipeline` runs it too, but takes no variances and knows 1000 classes alone.

    Args:
        vae: see `UViTPipeline`.
        transformer: a `DiT2DModel`.
        scheduler: anything of diffusers' that has `step`; by default `DDPMScheduler` with DIT_SAMPLING.
        latents_mean: see `UViTPipeline`.
        latents_std: see there.

    Raises:
        ValueError: the parts do not fit together.

    Source: Peebles and Xie (arXiv 2212.09748).
    """

    @staticmethod
    def _usual_scheduler() -> DDPMScheduler:
        return DDPMScheduler(**DIT_SAMPLING)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        guidance_scale: float = 1.3,
        num_inference_steps: int = 250,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image for each label.

        Args:
            class_labels: see `UViTPipeline`, as for all others.
            guidance_scale: see there; variances are those of the class.
            num_inference_steps: see there.
            generator: see there.
            output_type: see there.
            return_dict: see there.
            callback_on_step_end: see there.

        Raises:
            ValueError: see there.
        """
        labels, latents = self._prepare(class_labels, generator, output_type)
        latents = self._denoise(latents, labels, guidance_scale, num_inference_steps, generator, callback_on_step_end)
        return self._deliver(latents, output_type, return_dict)


class USiTPipeline(_ClassPipeline):
    """Images of classes by a USiT: a UViT that predicts the velocity from noise, at time 0, to images, at time 1.

    Args:
        vae: see `UViTPipeline`.
        transformer: a `UViT2DModel`.
        scheduler: by default `FlowODEScheduler` with dopri5.
        latents_mean: see `UViTPipeline`.
        latents_std: see there.

    Raises:
        ValueError: the parts do not fit together.

    Source: Ma et al., SiT (arXiv 2401.08740); Chen et al. (arXiv 2410.10733) for its use on deep latents.
    """

    scheduler_method = "integrate"

    @staticmethod
    def _usual_scheduler() -> FlowODEScheduler:
        return FlowODEScheduler()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        guidance_scale: float = 1.2,
        num_inference_steps: int = 250,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image for each label.

        Args:
            class_labels: see `UViTPipeline`, as for all others.
            guidance_scale: see there.
            num_inference_steps: of "heun2" and "euler"; dopri5 makes as many as its tolerances need.
            generator: see there.
            output_type: see there.
            return_dict: see there.

        Raises:
            ValueError: see there.
        """
        labels, latents = self._prepare(class_labels, generator, output_type)
        # How many evaluations there will be, an adaptive method does not know.
        with tqdm(**{"unit": " evaluations", **getattr(self, "_progress_bar_config", {})}) as bar:

            def velocity(x: Tensor, time: Tensor) -> Tensor:
                bar.update()
                return self._predict(x, time, labels, guidance_scale)

            latents = self.scheduler.integrate(velocity, latents, num_inference_steps)
        return self._deliver(latents, output_type, return_dict)


def _check_channels(vae: Any, channels: int) -> None:
    """A model of fewer channels needs an autoencoder that decodes the first alone.

    Raises:
        TypeError, ValueError: see `UViTPipeline`.
    """
    config = getattr(vae, "config", None)
    if config is None or not isinstance(vae, StockAutoencoderDC):
        raise TypeError(f"vae: got {type(vae).__name__}, wanted an AutoencoderDC")
    most = int(config.latent_channels)
    shortcut = config.encoder_out_shortcut or config.decoder_in_shortcut
    adaptive = isinstance(vae, AutoencoderDC) and not shortcut
    if channels > most or (channels < most and not adaptive):
        accepted = f"at most {most}" if adaptive else f"the autoencoder's {most}"
        raise ValueError(f"transformer: got {channels} channels, wanted {accepted}")
