"""Diffusion models with random weights, by the names of their sizes."""

from __future__ import annotations

from collections.abc import Sequence

from pronghorn.dcae.diffusers.dit import DIT_SIZES, DiT2DModel
from pronghorn.dcae.diffusers.uvit import SIZES, UViT2DModel
from pronghorn.dcae.diffusion import OBJECTIVES


def new_model(
    method: str, shape: Sequence[int], num_classes: int, *, size: str | None = None, hidden_size: int | None = None,
    depth: int | None = None, num_attention_heads: int | None = None, patch_size: int = 1,
) -> UViT2DModel | DiT2DModel:  # fmt: skip
    """A diffusion model to train on latents.

    Args:
        method: "uvit", "usit" or "dit".
        shape: of a latent: channels, height and width.
        num_classes: of the latents.
        size: "S", "H" or "2B"; of "dit" "S", "B", "L" or "XL".
        hidden_size: channels of a token, in place of the size's.
        depth: number of blocks, likewise.
        num_attention_heads: likewise.
        patch_size: places of a token's edge.

    Raises:
        ValueError: a name is unknown, latents are not square, a number is wanted and there is no size, or one does not
            divide another.
    """
    if method not in OBJECTIVES:
        raise ValueError(f"method: got {method!r}, accepted are {', '.join(OBJECTIVES)}")
    sizes = DIT_SIZES if method == "dit" else SIZES
    if size is not None and size not in sizes:
        raise ValueError(f"size: got {size!r}, accepted for {method} are {', '.join(sizes)}")
    channels, height, width = shape
    if height != width:
        raise ValueError(f"latents: got {height} x {width}, wanted squares")
    of_size = sizes[size] if size is not None else (None, None, None)
    given = {"depth": depth, "hidden_size": hidden_size, "num_attention_heads": num_attention_heads}
    chosen: dict[str, int] = {}
    for (name, own), usual in zip(given.items(), of_size, strict=True):
        number = usual if own is None else own
        if number is None or number < 1:
            raise ValueError(f"{name}: got {number}, wanted a positive number, or size: {', '.join(sizes)}")
        chosen[name] = number
    if method != "dit":
        return UViT2DModel(
            sample_size=height, in_channels=channels, num_classes=num_classes, patch_size=patch_size, **chosen
        )
    heads, across = chosen["num_attention_heads"], chosen["hidden_size"]
    if across % heads:
        raise ValueError(f"num_attention_heads: got {heads}, wanted a divisor of {across}")
    return DiT2DModel(
        num_attention_heads=heads, attention_head_dim=across // heads, in_channels=channels,
        num_layers=chosen["depth"], sample_size=height, patch_size=patch_size, num_embeds_ada_norm=num_classes,
    )  # fmt: skip
