"""What holds for all layers that have no configuration of their own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pronghorn.torchsparse.config import ConvConfig


@dataclass
class Settings:
    """Process-wide choices.

    Attributes:
        config: how convolutions are computed.
        allow_negative_coordinates: whether the least coordinate is taken from the data rather than being 0.
        allow_tf32: multiply float32 in tensor cores, with 10 bits of mantissa.
        deterministic: never add in any order; "fetch_on_demand" then computes as "implicit_gemm" does.
    """

    config: ConvConfig = field(default_factory=ConvConfig)
    allow_negative_coordinates: bool = False
    allow_tf32: bool = True
    deterministic: bool = False


settings = Settings()


def get_kmap_mode() -> str:
    """How kernel maps are built."""
    return settings.config.kmap_mode


def set_kmap_mode(kmap_mode: str) -> None:
    """Set how kernel maps are built: see `ConvConfig.kmap_mode`."""
    settings.config = replace(settings.config, kmap_mode=kmap_mode)


def get_downsample_mode() -> str:
    """Which sites a strided convolution has."""
    return settings.config.downsample_mode


def set_downsample_mode(downsample_mode: str) -> None:
    """Set which sites a strided convolution has: see `ConvConfig.downsample_mode`."""
    settings.config = replace(settings.config, downsample_mode=downsample_mode)


CONV_MODES = {0: (False, 1), 1: (True, 1), 2: (True, 3)}  # ifsort, split_mask_num


def get_conv_mode() -> int:
    """0: unsorted, 1: sorted, 2: sorted in 3 splits; -1 for anything else."""
    found = settings.config.ifsort, settings.config.split_mask_num
    return next((mode for mode, values in CONV_MODES.items() if values == found), -1)


def set_conv_mode(conv_mode: int) -> None:
    """Set the mode of implicit gemm: 0, 1 or 2, as `get_conv_mode` tells.

    Raises:
        ValueError: another number.
    """
    if conv_mode not in CONV_MODES:
        raise ValueError(f"conv_mode: got {conv_mode!r}, accepted are {', '.join(map(str, CONV_MODES))}")
    ifsort, splits = CONV_MODES[conv_mode]
    settings.config = replace(settings.config, ifsort=ifsort, split_mask_num=splits)


def get_global_config() -> ConvConfig:
    """How layers without a configuration of their own compute."""
    return settings.config


def set_global_config(config: ConvConfig) -> None:
    """Set how layers without a configuration of their own compute.

    Raises:
        TypeError: no ConvConfig.
    """
    if not isinstance(config, ConvConfig):
        raise TypeError(f"config: got {type(config).__name__}, wanted a ConvConfig")
    settings.config = config


def get_allow_negative_coordinates() -> bool:
    """Whether coordinates may be negative."""
    return settings.allow_negative_coordinates


def set_allow_negative_coordinates(allow: bool) -> None:
    """Set whether coordinates may be negative."""
    settings.allow_negative_coordinates = bool(allow)
