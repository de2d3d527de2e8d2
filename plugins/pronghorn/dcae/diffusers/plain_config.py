"""Configurations without stage shortcuts, written so that diffusers' own class refuses them.

It knows no such setting and would pass over it: the weights fit, and another model would run. It does not look at the
name of the class either, so that the names of blocks tell it, which it reads out in its error.
"""

from __future__ import annotations

from typing import Any

CLASS = "PlainAutoencoderDC"
SUFFIX = " (stage_shortcuts=False)"
BLOCKS = "encoder_block_types"


def marked(config: dict[str, Any]) -> dict[str, Any]:
    """As it is to be written; as it is, where the model has its shortcuts."""
    if config.get("stage_shortcuts", True):
        return config
    names = config[BLOCKS]
    names = names + SUFFIX if isinstance(names, str) else [name + SUFFIX for name in names]
    return {**config, "_class_name": CLASS, BLOCKS: names}


def unmarked(config: dict[str, Any]) -> dict[str, Any]:
    """As it was."""
    names = config.get(BLOCKS)
    if isinstance(names, str):
        return {**config, BLOCKS: names.removesuffix(SUFFIX)}
    if isinstance(names, list | tuple):
        names = [name.removesuffix(SUFFIX) if isinstance(name, str) else name for name in names]
        return {**config, BLOCKS: names}
    return config
