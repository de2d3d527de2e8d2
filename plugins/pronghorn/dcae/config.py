"""What a deep compression autoencoder is made of, and the published ones."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

from pronghorn.configuration import from_values

RES, EVIT = "ResBlock", "EfficientViTBlock"
BLOCKS = (RES, EVIT)
DOWNSAMPLES, UPSAMPLES = ("pixel_unshuffle", "conv"), ("pixel_shuffle", "interpolate")
NORMS, ACTIVATIONS = ("rms_norm", "batch_norm"), ("silu", "relu")
WIDTHS = (128, 256, 512, 512, 1024, 1024)
WIDEST, DEEPEST = 1 << 16, 1 << 10  # channels and blocks, far beyond what was ever made
RATIO_OF_SHUFFLE = 4  # channels that pixel (un)shuffling by 2 trades for places


@dataclass(frozen=True)
class DCAEConfig:
    """An autoencoder's architecture, named as by diffusers' `AutoencoderDC`; lists go by stage, the first is finest.

    Attributes:
        in_channels: of an image.
        latent_channels: of a latent.
        latent_channels_list: how many of the first latent channels an adaptive model (1.5) was trained to do with.
        attention_head_dim: channels of an attention head.
        encoder_block_types: "ResBlock" or "EfficientViTBlock".
        decoder_block_types: likewise.
        encoder_block_out_channels: width; each stage halves height and width.
        decoder_block_out_channels: likewise.
        encoder_layers_per_block: number of blocks; 0 in the first stage lets the first convolution halve the image.
        decoder_layers_per_block: likewise.
        encoder_qkv_multiscales: kernel sizes that an attention's queries, keys and values are also taken through.
        decoder_qkv_multiscales: likewise.
        downsample_block_type: "pixel_unshuffle" or "conv" (with stride 2).
        upsample_block_type: "pixel_shuffle" or "interpolate" (nearest).
        decoder_norm_types: "rms_norm" (over the channels of each pixel) or "batch_norm"; the encoder has the first.
        decoder_act_fns: "silu" or "relu"; the encoder has the first.
        encoder_out_shortcut: whether the latent also gets averages of the last stage's channels.
        decoder_in_shortcut: whether the decoder's first stage also gets copies of the latent.
        stage_shortcuts: whether all other stages have such shortcuts. Without any there is no residual autoencoding:
            the paper's ablation, which diffusers' own class does not know.
        decoder_conv_act_fn: activation before the last convolution.
        scaling_factor: what latents are multiplied with for diffusion, 1 / their root mean square; 1 where unknown.

    Raises:
        ValueError: stages differ in number, a name is unknown, or channels do not divide as shortcuts need.

    Source: Chen et al., Deep Compression Autoencoder (arXiv 2410.10733), sections 3.1 and 3.2; Chen et al., DC-AE 1.5
    (arXiv 2508.00413) for adaptive channels.
    """

    in_channels: int = 3
    latent_channels: int = 32
    latent_channels_list: tuple[int, ...] = ()
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = (RES,) * 3 + (EVIT,) * 3
    decoder_block_types: tuple[str, ...] = (RES,) * 3 + (EVIT,) * 3
    encoder_block_out_channels: tuple[int, ...] = WIDTHS
    decoder_block_out_channels: tuple[int, ...] = WIDTHS
    encoder_layers_per_block: tuple[int, ...] = (0, 4, 8, 2, 2, 2)
    decoder_layers_per_block: tuple[int, ...] = (0, 5, 10, 2, 2, 2)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((),) * 6
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((),) * 6
    downsample_block_type: str = "pixel_unshuffle"
    upsample_block_type: str = "pixel_shuffle"
    decoder_norm_types: tuple[str, ...] = ("batch_norm",) * 3 + ("rms_norm",) * 3
    decoder_act_fns: tuple[str, ...] = ("relu",) * 3 + ("silu",) * 3
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    stage_shortcuts: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):  # JSON and diffusers give lists
            object.__setattr__(self, field.name, _tuple(getattr(self, field.name)))
        for name in ("in_channels", "latent_channels", "attention_head_dim"):
            if not _counts((getattr(self, name),), WIDEST):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted 1 to {WIDEST}")
        for name in ("encoder_out_shortcut", "decoder_in_shortcut", "stage_shortcuts"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted True or False")
        for side in ("encoder", "decoder"):
            self._check_stages(side)
        for name, accepted in (
            ("downsample_block_type", DOWNSAMPLES), ("upsample_block_type", UPSAMPLES),
            ("decoder_conv_act_fn", ACTIVATIONS),
        ):  # fmt: skip
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, accepted are {', '.join(accepted)}")
        self._check_shortcuts()
        if not _counts(self.latent_channels_list, self.latent_channels):
            raise ValueError(
                f"latent_channels_list: got {self.latent_channels_list}, wanted numbers up to {self.latent_channels}"
            )
        if not (isinstance(self.scaling_factor, int | float) and 0 < self.scaling_factor < math.inf):
            raise ValueError(f"scaling_factor: got {self.scaling_factor!r}, wanted a positive number")

    def _check_stages(self, side: str) -> None:
        widths = self.encoder_block_out_channels
        stages = len(widths) if isinstance(widths, tuple) else 0
        lists = {f"{side}_block_out_channels": None, f"{side}_block_types": BLOCKS, f"{side}_layers_per_block": None,
                 f"{side}_qkv_multiscales": None}  # fmt: skip
        lists |= {"decoder_norm_types": NORMS, "decoder_act_fns": ACTIVATIONS} if side == "decoder" else {}
        for name, accepted in lists.items():
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values or len(values) != stages:
                raise ValueError(f"{name}: got {values!r}, wanted {stages or 'a list of'} values, one for each stage")
            unknown = [value for value in values if accepted and value not in accepted]
            if unknown:
                raise ValueError(f"{name}: got {unknown[0]!r}, accepted are {', '.join(accepted or ())}")
        name = f"{side}_block_out_channels"
        if not _counts(getattr(self, name), WIDEST):
            raise ValueError(f"{name}: got {getattr(self, name)}, wanted numbers from 1 to {WIDEST}")
        layers = getattr(self, f"{side}_layers_per_block")
        if not _counts(layers[1:], DEEPEST) or (layers[0] != 0 and not _counts(layers[:1], DEEPEST)):
            raise ValueError(
                f"{side}_layers_per_block: got {layers}, wanted 1 to {DEEPEST} blocks in every stage but the first"
            )
        for scales in getattr(self, f"{side}_qkv_multiscales"):
            if not _counts(scales, WIDEST) or any(size % 2 == 0 for size in scales):
                raise ValueError(f"{side}_qkv_multiscales: got {scales!r}, wanted odd kernel sizes for each stage")

    def _check_shortcuts(self) -> None:
        def divides(name: str, many: int, few: int) -> None:
            if many % few:
                raise ValueError(f"{name}: {many} channels do not divide into {few}, as a shortcut needs")

        encoder, decoder = self.encoder_block_out_channels, self.decoder_block_out_channels
        for name, widths in (("encoder_block_out_channels", encoder), ("decoder_block_out_channels", decoder)):
            for narrow, wide in pairwise(widths) if self.stage_shortcuts else ():
                divides(name, RATIO_OF_SHUFFLE * narrow, wide)
        if self.encoder_out_shortcut:
            divides("latent_channels", encoder[-1], self.latent_channels)
        if self.decoder_in_shortcut:
            divides("latent_channels", decoder[-1], self.latent_channels)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels of an image's edge for one of the latent's."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, and for `AutoencoderDC`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DCAEConfig:
        """From what `to_dict` gave.

        Raises:
            ValueError, TypeError: there are other names, or values that are none.
        """
        return from_values(cls, values)


def _counts(values: Any, most: int) -> bool:
    """Whether these are whole numbers from 1 to `most`, or none."""
    return isinstance(values, tuple) and all(type(value) is int and 0 < value <= most for value in values)


def _tuple(value: Any) -> Any:
    return tuple(_tuple(part) for part in value) if isinstance(value, list | tuple) else value


def _deep(extra: int, latent_channels: int, scaling_factor: float) -> DCAEConfig:
    """The first generation: `extra` more stages of 2048 channels."""
    more = (2,) * extra
    return DCAEConfig(
        latent_channels=latent_channels, scaling_factor=scaling_factor,
        encoder_block_types=(RES,) * 3 + (EVIT,) * (3 + extra), decoder_block_types=(RES,) * 3 + (EVIT,) * (3 + extra),
        encoder_block_out_channels=WIDTHS + (2048,) * extra, decoder_block_out_channels=WIDTHS + (2048,) * extra,
        encoder_layers_per_block=(0, 4, 8, 2, 2, 2, *more), decoder_layers_per_block=(0, 5, 10, 2, 2, 2, *more),
        encoder_qkv_multiscales=((),) * (6 + extra), decoder_qkv_multiscales=((),) * (6 + extra),
        decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * (3 + extra),
        decoder_act_fns=("relu",) * 3 + ("silu",) * (3 + extra),
    )  # fmt: skip


def _sana(**changes: Any) -> DCAEConfig:
    values: dict[str, Any] = {
        "encoder_layers_per_block": (2, 2, 2, 3, 3, 3), "decoder_layers_per_block": (3,) * 6,
        "encoder_qkv_multiscales": ((),) * 3 + ((5,),) * 3, "decoder_qkv_multiscales": ((),) * 3 + ((5,),) * 3,
        "downsample_block_type": "conv", "upsample_block_type": "interpolate", "decoder_norm_types": ("rms_norm",) * 6,
        "decoder_act_fns": ("silu",) * 6, "scaling_factor": 0.41407,
    }  # fmt: skip
    return DCAEConfig(**{**values, **changes})


def _adaptive(*more_widths: int) -> DCAEConfig:
    """Version 1.5: residual blocks alone, no shortcut at the latent."""
    stages = 6 + len(more_widths)
    return DCAEConfig(
        latent_channels=128, latent_channels_list=tuple(range(16, 129, 16)),
        encoder_block_types=(RES,) * stages, decoder_block_types=(RES,) * stages,
        encoder_block_out_channels=WIDTHS + more_widths, decoder_block_out_channels=WIDTHS + more_widths,
        encoder_layers_per_block=(0, 5, 10) + (4,) * (stages - 3),
        decoder_layers_per_block=(0, 5, 10) + (4,) * (stages - 3),
        encoder_qkv_multiscales=((),) * stages, decoder_qkv_multiscales=((),) * stages,
        decoder_norm_types=("rms_norm",) * stages, decoder_act_fns=("silu",) * stages, encoder_out_shortcut=False,
        decoder_in_shortcut=False, decoder_conv_act_fn="silu",
    )  # fmt: skip


# By the names under which they are published. Where a scaling factor is 1 nobody published it: estimate it.
CONFIGURATIONS: dict[str, DCAEConfig] = {
    "dc-ae-f32c32-in-1.0": _deep(0, 32, 0.3189),
    "dc-ae-f32c32-in-1.0-256px": _deep(0, 32, 0.3189),
    "dc-ae-f32c32-mix-1.0": _deep(0, 32, 1.0),
    "dc-ae-f64c128-in-1.0": _deep(1, 128, 0.2889),
    "dc-ae-f64c128-mix-1.0": _deep(1, 128, 1.0),
    "dc-ae-f128c512-in-1.0": _deep(2, 512, 1.0),
    "dc-ae-f128c512-mix-1.0": _deep(2, 512, 1.0),
    "dc-ae-f32c32-sana-1.0": _sana(),
    "dc-ae-f32c32-sana-1.1": _sana(),
    "dc-ae-lite-f32c32-sana-1.1": _sana(
        decoder_block_types=(RES,) * 6, decoder_layers_per_block=(0, 3, 5, 4, 4, 4), decoder_qkv_multiscales=((),) * 6,
        upsample_block_type="pixel_shuffle", decoder_conv_act_fn="silu",
    ),
    "dc-ae-f32c128-1.5": _adaptive(),
    "dc-ae-f64c128-1.5": _adaptive(1024),
}  # fmt: skip
ALIASES = {"dc-ae-lite-f32c32": "dc-ae-lite-f32c32-sana-1.1"}


def published(name: str) -> DCAEConfig:
    """The configuration of a published model.

    Args:
        name: such as "dc-ae-f32c32-sana-1.0", also with its owner before it or "-diffusers" behind.

    Raises:
        ValueError: there is no such model.
    """
    short = name.rsplit("/", 1)[-1].removesuffix("-diffusers")
    found = CONFIGURATIONS.get(ALIASES.get(short, short))
    if found is None:
        raise ValueError(f"name: got {name!r}, known are {', '.join((*CONFIGURATIONS, *ALIASES))}")
    return found


def official_name(config: DCAEConfig, name: str | None = None) -> str:
    """What the official code knows an architecture as.

    Args:
        config: the architecture; scaling factors are no part of it.
        name: that is to be used; by default that of the published one that is equal.

    Raises:
        ValueError: none is equal and no name is given, or the name is that of another architecture.
    """
    plain = replace(config, scaling_factor=1.0)
    equal = [known for known, other in CONFIGURATIONS.items() if replace(other, scaling_factor=1.0) == plain]
    if name is None:
        if not equal:
            raise ValueError("model_name: got None, wanted one, as no published architecture is equal to this one")
        return next((known for known in equal if CONFIGURATIONS[known] == config), equal[0])
    if ALIASES.get(name, name) in CONFIGURATIONS and ALIASES.get(name, name) not in equal:
        wanted = f"one of {', '.join(equal)}" if equal else "a name that is not published"
        raise ValueError(f"model_name: got {name}, which is another architecture; wanted {wanted}")
    return name
