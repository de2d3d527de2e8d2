"""diffusers' `AutoencoderDC` with official weights in and out, and with adaptive latent channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as DiffusersAutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # diffusers loads parts of pipelines by it
from torch import Tensor

from pronghorn.dcae.config import ALIASES, CONFIGURATIONS, DCAEConfig, official_name, published
from pronghorn.dcae.convert import to_diffusers, to_efficientvit
from pronghorn.dcae.diffusers.checkpointing import CheckpointedStage
from pronghorn.dcae.diffusers.inputs import check_images, checked_channels, whole_latents
from pronghorn.dcae.diffusers.plain_config import marked, unmarked
from pronghorn.dcae.diffusers.tiling import decode_in_tiles, encode_in_tiles
from pronghorn.dcae.diffusers.whole_checkpoints import WholeCheckpoints, check_numbers
from pronghorn.files.atomic import write_atomically
from pronghorn.files.json_files import parse_json
from pronghorn.files.sealed import check_seal
from pronghorn.files.tensor_files import load_tensors, save_tensors

WEIGHTS = "model.safetensors"
FORMAT = 2  # of those that we write
ARCHITECTURE = "architecture"  # in the official layout's config.json, beside its model_name
OURS = ("latent_channels_list", "stage_shortcuts")  # settings that diffusers' class lacks
PER_STAGE = (
    "encoder_block_types", "decoder_block_types", "decoder_norm_types", "decoder_act_fns",
)  # what diffusers also takes as one name for all stages  # fmt: skip


class AutoencoderDC(WholeCheckpoints, DiffusersAutoencoderDC):  # type: ignore[misc]  # both define config_name
    """A deep compression autoencoder, loaded and saved as diffusers' own, which also loads what this one saves.

    Without `stage_shortcuts` it loads here alone, and diffusers refuses it.
    `enable_gradient_checkpointing` works: blocks are computed twice, and batch norms count images once.

    Args:
        in_channels: see `DCAEConfig`, as for all others; where that has a name for each stage, one stands for all.
        latent_channels: see there.
        attention_head_dim: see there.
        encoder_block_types: see there.
        decoder_block_types: see there.
        encoder_block_out_channels: see there.
        decoder_block_out_channels: see there.
        encoder_layers_per_block: see there.
        decoder_layers_per_block: see there.
        encoder_qkv_multiscales: see there.
        decoder_qkv_multiscales: see there.
        upsample_block_type: see there.
        downsample_block_type: see there.
        decoder_norm_types: see there.
        decoder_act_fns: see there.
        encoder_out_shortcut: see there.
        decoder_in_shortcut: see there.
        stage_shortcuts: see there.
        decoder_conv_act_fn: see there.
        scaling_factor: see there.
        latent_channels_list: see there.

    Raises:
        ValueError: as `DCAEConfig` does.
    """

    _supports_gradient_checkpointing = True
    # After `enable_tiling`, tiles are exact. (diffusers declares results that it does not give.)
    tiled_encode = encode_in_tiles  # type: ignore[assignment]
    tiled_decode = decode_in_tiles  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        attention_head_dim: int = 32,
        encoder_block_types: str | tuple[str, ...] = "ResBlock",
        decoder_block_types: str | tuple[str, ...] = "ResBlock",
        encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
        encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3),
        decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,)),
        upsample_block_type: str = "pixel_shuffle",
        downsample_block_type: str = "pixel_unshuffle",
        decoder_norm_types: str | tuple[str, ...] = "rms_norm",
        decoder_act_fns: str | tuple[str, ...] = "silu",
        encoder_out_shortcut: bool = True,
        decoder_in_shortcut: bool = True,
        stage_shortcuts: bool = True,
        decoder_conv_act_fn: str = "relu",
        scaling_factor: float = 1.0,
        latent_channels_list: tuple[int, ...] = (),
    ) -> None:
        values = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        stages = len(encoder_block_out_channels)
        for name in PER_STAGE:
            values[name] = (values[name],) * stages if isinstance(values[name], str) else values[name]
        self.architecture = DCAEConfig.from_dict(values)
        super().__init__(**{name: value for name, value in values.items() if name not in OURS})
        both: tuple[Any, Any] = self.encoder.down_blocks, self.decoder.up_blocks
        for side in both:
            for place, stage in enumerate(side):
                side[place] = CheckpointedStage(*stage)
        if not stage_shortcuts:
            for module in self.modules():
                if isinstance(module, DCDownBlock2d | DCUpBlock2d):
                    module.shortcut = False

    @classmethod
    def from_published(cls, name: str) -> AutoencoderDC:
        """A model of a published architecture, with random weights.

        Args:
            name: see `published`.

        Raises:
            ValueError: there is no such model.
        """
        return cls(**published(name).to_dict())

    @classmethod
    def from_efficientvit(cls, path: str | Path, *, config: DCAEConfig | str | None = None) -> AutoencoderDC:
        """Load weights in the official names.

        Args:
            path: a folder with `config.json` ({"model_name": …}, and "architecture" where that is none of the published
                ones) and `model.safetensors`; or a `.safetensors` file, or a `.pt` or `.pth` file with
                {"state_dict": …}, which need a configuration.
            config: the architecture, or the name of a published one; by default what the folder says.

        Raises:
            ValueError: there is no configuration, the file is of another kind, weights are missing, left over or of
                another shape, or the folder is not as sealed. FileNotFoundError: there is no such file.
        """
        path = Path(path)
        if path.is_dir():
            check_seal(path)
        if config is None:
            named = path / "config.json"
            if not named.is_file():
                raise ValueError(f"config: got None, and there is no {named} that names the model")
            config = _described(named)
        model = cls(**(published(config) if isinstance(config, str) else config).to_dict())
        file = path / WEIGHTS if path.is_dir() else path
        try:
            state = to_diffusers(_read(file))
            _check_weights(state, model.state_dict())
        except (ValueError, IndexError, RuntimeError) as error:  # of a shape that cannot be cut as the names say
            raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
        model.load_state_dict(state)
        check_numbers(model, file)
        return model

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict: Any = None, **kwargs: Any) -> Any:
        """As diffusers does; a file in the official names is read as `from_efficientvit` does, of any published model.

        Args:
            pretrained_model_link_or_path_or_dict: see diffusers.
            **kwargs: likewise; `config` may also be the name of a published model, or a `DCAEConfig`.

        Raises:
            ValueError: diffusers cannot read it, or see `from_efficientvit`.
        """
        given = pretrained_model_link_or_path_or_dict
        local = isinstance(given, str | Path) and Path(given).is_file()
        config = _architecture_of(kwargs.get("config"), kwargs.get("subfolder") or "")
        if local and config is not None and _has_official_names(Path(given)):
            model: Any = cls.from_efficientvit(given, config=config)
            return model.to(kwargs.get("torch_dtype") or torch.float32).eval()
        try:
            return super().from_single_file(given, **kwargs)
        except (ValueError, RuntimeError, KeyError, AttributeError, OSError) as error:
            raise ValueError(
                f"{given if local else 'from_single_file'}: diffusers cannot read it ({error}); "
                "AutoencoderDC.from_efficientvit does, with config, the name of a published model"
            ) from error

    def save_efficientvit(self, folder: str | Path, *, model_name: str | None = None) -> None:
        """Write what `from_efficientvit` reads.

        Args:
            folder: is made where it is not there.
            model_name: what the official code knows the architecture as; by default the name of the published one that
                is equal. Under any other name, the architecture is written beside it, for us to read.

        Raises:
            ValueError: there is no such name, or the one that is given stands for another architecture.
        """
        folder = Path(folder)
        name = official_name(self.architecture, model_name)
        known = CONFIGURATIONS.get(ALIASES.get(name, name))
        whole = {} if known == self.architecture else {ARCHITECTURE: self.architecture.to_dict()}
        folder.mkdir(parents=True, exist_ok=True)
        state = to_efficientvit(self.state_dict(), self.architecture)
        save_tensors(folder / WEIGHTS, state, format=FORMAT)
        write_atomically(folder / "config.json", (json.dumps({"model_name": name, **whole}) + "\n").encode())

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As diffusers does, also of what was written so that it refuses it."""
        return super().extract_init_dict(unmarked(config_dict), **kwargs)

    def to_json_string(self) -> str:
        """The configuration, which diffusers refuses if there are no stage shortcuts: it has them always."""
        written: str = super().to_json_string()
        return json.dumps(marked(json.loads(written)), indent=2, sort_keys=True) + "\n"

    def encode(
        self, x: Tensor, return_dict: bool = True, *, latent_channels: int | None = None
    ) -> EncoderOutput | tuple[Tensor]:
        """Latents of images.

        Args:
            x: [batch, 3, height, width] from -1 to 1, both divisible by `spatial_compression_ratio`.
            return_dict: give an `EncoderOutput` rather than a tuple.
            latent_channels: give so many of the first channels, of an adaptive model; by default all.

        Returns:
            `latent` [batch, latent channels, height / ratio, width / ratio], not scaled. An image with NaN has a latent
            with NaN, and others beside it are not harmed; looking for it would make a GPU wait, so that nothing does
            here. `latent_statistics`, `dump_latents` and metrics refuse it.

        Raises:
            ValueError: there are no images, or the shape, the number of channels or the dtype does not fit.
        """
        check_images(self, x)
        count = checked_channels(self, "latent_channels", latent_channels)
        latent = super().encode(x, return_dict=False)[0][:, :count]
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Images of latents.

        Args:
            z: [batch, latent channels, height, width], not scaled; of an adaptive model also the first channels alone.
            return_dict: give a `DecoderOutput` rather than a tuple.

        Returns:
            `sample` [batch, 3, height * ratio, width * ratio], about from -1 to 1.

        Raises:
            ValueError: there are none, or the shape, the number of channels or the dtype does not fit.
        """
        z = whole_latents(self, z)
        sample = super().decode(z, return_dict=False)[0]
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def _architecture_of(config: Any, subfolder: str) -> DCAEConfig | str | None:
    """An architecture, where it is one, its name, or a folder in diffusers' layout."""
    if isinstance(config, DCAEConfig) or config in CONFIGURATIONS or config in ALIASES:
        named: DCAEConfig | str = config
        return named
    path = None if config is None else Path(config, subfolder, "config.json")
    if path is None or not path.is_file():
        return None
    values = unmarked(parse_json(path.read_bytes(), path))
    return DCAEConfig.from_dict({name: values[name] for name in DCAEConfig().to_dict() if name in values})


def _has_official_names(path: Path) -> bool:
    return any(name.startswith("encoder.project_in.") for name in _read(path))


def _described(path: Path) -> DCAEConfig | str:
    """What a folder in the official layout says of its architecture."""
    described = parse_json(path.read_bytes(), path)
    whole = described.get(ARCHITECTURE) if isinstance(described, dict) else None
    if whole is None:
        return str(described.get("model_name") if isinstance(described, dict) else None)
    try:
        return DCAEConfig.from_dict(whole)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {ARCHITECTURE}: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path, newest=FORMAT)[0]
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"path: got {path}, accepted are a folder, .safetensors, .pt and .pth")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: nothing that torch can read: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no weights by name")
    return state


def _check_weights(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """As `load_state_dict` does, but a ValueError that also tells shapes."""
    missing, left = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    other = [f"{name}: {tuple(state[name].shape)} {state[name].dtype} for {tuple(wanted[name].shape)}"
             for name in sorted(set(state) & set(wanted)) if state[name].shape != wanted[name].shape
             or state[name].is_floating_point() != wanted[name].is_floating_point()]  # fmt: skip
    if missing or left or other:
        raise ValueError(
            f"weights: {len(missing)} are missing ({missing[:2]}), {len(left)} left over ({left[:2]}), "
            f"{len(other)} of another shape ({other[:2]})"
        )
