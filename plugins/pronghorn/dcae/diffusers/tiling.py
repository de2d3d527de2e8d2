"""Large images in bounded memory, exactly: convolutions see what lies around a tile, attention sees the whole image.

Layers on small grids run one after the other over strips of rows; an attention's sums of keys and values are added up
over all strips before any strip reads them. Layers on large grids, which are convolutions alone, run one after the
other on tiles, each with a margin that all of them together reach into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC, DCDownBlock2d, DCUpBlock2d
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor, nn

from pronghorn.dcae.diffusers.attention import attention_output, gated, out_weight, qkv_weight, queries_keys_values
from pronghorn.dcae.diffusers.inputs import check_images, whole_latents
from pronghorn.dcae.diffusers.resampling import FastDownBlock, FastStem, FastUpBlock
from pronghorn.kernels.relu_linear_attention import attend_state, key_value_state
from pronghorn.kernels.shuffle_shortcut import shuffle_add, unshuffle_add

SMALL = 8  # grids this many times coarser than the image, and coarser ones, are kept whole
Range = tuple[int, int]


@dataclass(frozen=True)
class _Step:
    """A layer of convolutions: how far it reaches, and how it changes the grid."""

    run: Callable[[Tensor], Tensor]
    halo: int = 0
    up: int = 1
    down: int = 1


@dataclass(frozen=True)
class _Attend:
    """An attention over the whole grid; its queries, keys and values reach `halo` far."""

    attn: Any
    halo: int
    up: int = 1
    down: int = 1


Steps = list[_Step | _Attend]


def stream_decode(vae: AutoencoderDC, z: Tensor, *, tile: int = 1024) -> Iterator[tuple[int, int, Tensor]]:
    """Decode a latent of any size, tile by tile.

    Args:
        vae: in evaluation mode, stock or accelerated.
        z: [batch, latent channels, height, width]; of an adaptive model also the first channels alone.
        tile: edge of a tile in pixels; memory grows with its square, and time falls with its edge.

    Yields:
        Top and left edge in pixels and the tile [batch, 3, height, width], from the upper left to the lower right.

    Raises:
        TypeError: no `AutoencoderDC`.
        ValueError: the latent does not fit, the tile is smaller than its grid, or the autoencoder is in training mode.
    """
    ratio = _checked(vae, tile)
    return _streamed(vae, whole_latents(vae, z), tile, ratio)


def _streamed(vae: AutoencoderDC, z: Tensor, tile: int, ratio: int) -> Iterator[tuple[int, int, Tensor]]:
    steps = _decoder_steps(vae.decoder)
    small, large = _split(steps, ratio, grow=True)
    x = _whole(small, z, tile // ratio)
    height, width = z.shape[2] * ratio, z.shape[3] * ratio
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            rows, columns = (top, min(top + tile, height)), (left, min(left + tile, width))
            yield top, left, _part(large, x, rows, columns)


def tiled_decode(vae: AutoencoderDC, z: Tensor, *, tile: int = 1024) -> Tensor:
    """What `vae.decode(z).sample` is, in bounded memory; see `stream_decode`."""
    parts = stream_decode(vae, z, tile=tile)
    ratio = int(vae.spatial_compression_ratio)
    out: Tensor | None = None
    for top, left, part in parts:
        if out is None:
            out = part.new_empty(len(z), part.shape[1], z.shape[2] * ratio, z.shape[3] * ratio)
        out[:, :, top : top + part.shape[2], left : left + part.shape[3]] = part
    assert out is not None  # noqa: S101 - there is at least one place
    return out


def tiled_encode(vae: AutoencoderDC, x: Tensor, *, tile: int = 1024) -> Tensor:
    """What `vae.encode(x).latent` is, in bounded memory.

    Args:
        vae: in evaluation mode, stock or accelerated.
        x: [batch, 3, height, width], both divisible by `spatial_compression_ratio`.
        tile: edge of a tile in pixels.

    Raises:
        TypeError: no `AutoencoderDC`.
        ValueError: the images do not fit, the tile is smaller than the grid of a latent, or the autoencoder is in
            training mode.
    """
    ratio = _checked(vae, tile)
    check_images(vae, x)
    steps = _encoder_steps(vae.encoder)
    large, small = _split(steps, ratio, grow=False)
    factor = _product(large, "down")
    height, width, step = x.shape[2] // factor, x.shape[3] // factor, tile // factor
    found: Tensor | None = None
    for top in range(0, height, step):
        for left in range(0, width, step):
            rows, columns = (top, min(top + step, height)), (left, min(left + step, width))
            part = _part(large, x, rows, columns)
            if found is None:
                found = part.new_empty(len(x), part.shape[1], height, width)
            found[:, :, rows[0] : rows[1], columns[0] : columns[1]] = part
    return _whole(small, x if found is None else found, step)


def encode_in_tiles(vae: Any, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
    """`tiled_encode` with the tile that `vae.enable_tiling` was told, and diffusers' result."""
    latent = tiled_encode(vae, x, tile=_tile_of(vae))
    return EncoderOutput(latent=latent) if return_dict else (latent,)


def decode_in_tiles(vae: Any, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
    """`tiled_decode` likewise."""
    sample = tiled_decode(vae, z, tile=_tile_of(vae))
    return DecoderOutput(sample=sample) if return_dict else (sample,)


def _tile_of(vae: Any) -> int:
    """Edge of a tile, rounded to what the autoencoder can."""
    ratio = int(vae.spatial_compression_ratio)
    return max(1, min(vae.tile_sample_min_height, vae.tile_sample_min_width) // ratio) * ratio


def _checked(vae: AutoencoderDC, tile: int) -> int:
    if not isinstance(vae, AutoencoderDC):
        raise TypeError(f"vae: got {type(vae).__name__}, wanted an AutoencoderDC")
    ratio = int(vae.spatial_compression_ratio)
    if tile < ratio or tile % ratio:
        raise ValueError(f"tile: got {tile}, wanted a multiple of {ratio}")
    if vae.training:
        raise ValueError("vae: is in training mode; call its eval method first")
    return ratio


def _decoder_steps(decoder: Any) -> Steps:
    def head(z: Tensor) -> Tensor:
        y: Tensor = decoder.conv_in(z)
        return shuffle_add(y, z, factor=1) if decoder.in_shortcut else y

    def tail(x: Tensor) -> Tensor:
        x = decoder.norm_out(x.movedim(1, -1)).movedim(-1, 1)
        y: Tensor = decoder.conv_out(decoder.conv_act(x))
        return y

    blocks = [block for stage in reversed(decoder.up_blocks) for block in stage]
    up = 2 if isinstance(decoder.conv_out, DCUpBlock2d) else 1
    return [_Step(head, 1), *_block_steps(blocks), _Step(tail, 1, up=up)]


def _encoder_steps(encoder: Any) -> Steps:
    def tail(x: Tensor) -> Tensor:
        y: Tensor = encoder.conv_out(x)
        return unshuffle_add(y, x, factor=1) if encoder.out_shortcut else y

    blocks = [block for stage in encoder.down_blocks for block in stage]
    first = _block_steps([encoder.conv_in])
    return [*first, *_block_steps(blocks), _Step(tail, 1)]


def _block_steps(blocks: list[Any]) -> Steps:
    steps: Steps = []
    for block in blocks:
        if isinstance(block, DCUpBlock2d | FastUpBlock):
            steps.append(_Step(block, 1, up=2))
        elif isinstance(block, DCDownBlock2d | FastDownBlock | FastStem):
            steps.append(_Step(block, 1, down=2))
        elif isinstance(block, nn.Conv2d):
            steps.append(_Step(block, 1))
        elif hasattr(block, "attn"):
            sizes = [scale.proj_in.kernel_size[0] for scale in block.attn.to_qkv_multiscale]
            steps.append(_Attend(block.attn, max(sizes, default=1) // 2))
            steps.append(_Step(partial(gated, block.conv_out), 1))
        else:
            steps.append(_Step(block, 2))  # a residual block: two convolutions
    return steps


def _product(steps: Steps, name: str) -> int:
    result = 1
    for step in steps:
        result *= getattr(step, name)
    return result


def _split(steps: Steps, ratio: int, *, grow: bool) -> tuple[Steps, Steps]:
    """The steps on small grids and those on large ones, in the order in which they run."""
    coarseness = [ratio if grow else 1]  # before each step, and after the last
    for step in steps:
        coarseness.append(coarseness[-1] // step.up * step.down)
    small = [place for place, coarse in enumerate(coarseness) if coarse >= min(SMALL, ratio)]
    attends = [place for place, step in enumerate(steps) if isinstance(step, _Attend)]
    at = max(small[-1], *[place + 1 for place in attends], 0) if grow else min(small[0], *attends, len(steps))
    return steps[:at], steps[at:]


def _reach(steps: Steps, wanted: Range, sizes: list[int]) -> Range:
    """Which inputs the wanted outputs depend on; `sizes` are those of the grid before each step, and after the last."""
    start, end = wanted
    for place in reversed(range(len(steps))):
        step = steps[place]
        if step.down > 1:
            start, end = step.down * (start - step.halo), step.down * (end + step.halo)
        else:
            start, end = start // step.up - step.halo, -(-end // step.up) + step.halo
        start, end = max(0, start), min(sizes[place], end)
    align = _product(steps, "down")  # so that every halving begins at an even place
    return start // align * align, min(sizes[0], -(-end // align) * align)


def _sizes(steps: Steps, size: int) -> list[int]:
    sizes = [size]
    for step in steps:
        sizes.append(sizes[-1] * step.up // step.down)
    return sizes


def _part(steps: Steps, x: Tensor, rows: Range, columns: Range) -> Tensor:
    """Some rows and columns of what the steps make of a whole grid."""
    top, bottom = _reach(steps, rows, _sizes(steps, x.shape[2]))
    left, right = _reach(steps, columns, _sizes(steps, x.shape[3]))
    y = x[:, :, top:bottom, left:right]
    for step in steps:
        assert isinstance(step, _Step)  # noqa: S101 - attention is on small grids
        y = step.run(y)
    up, down = _product(steps, "up"), _product(steps, "down")
    top, left = (start * up // down for start in (top, left))
    return y[:, :, rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]


def _whole(steps: Steps, x: Tensor, edge: int) -> Tensor:
    """One step after the other on the whole grid, in strips of about `edge`² places (and more, as grids grow)."""
    for step in steps:
        edge = edge * step.up // step.down if step.down == 1 else max(1, edge // step.down)
        height, width = (size * step.up // step.down for size in x.shape[2:])
        strip = max(1, edge * edge // width)
        strips = [(start, min(start + strip, height)) for start in range(0, height, strip)]
        parts = _attended(step, x, strips) if isinstance(step, _Attend) else _convolved(step, x, strips)
        found: Tensor | None = None
        for (start, end), part in zip(strips, parts, strict=True):
            if found is None:
                found = part.new_empty(len(x), part.shape[1], height, width)
            found[:, :, start:end] = part
        x = x if found is None else found
    return x


def _convolved(step: _Step, x: Tensor, strips: list[Range]) -> Iterator[Tensor]:
    width = x.shape[3] * step.up // step.down
    for strip in strips:
        yield _part([step], x, strip, (0, width))


def _attended(step: _Attend, x: Tensor, strips: list[Range]) -> Iterator[Tensor]:
    attn, weight, weight_out = step.attn, qkv_weight(step.attn), out_weight(step.attn)

    def of(strip: Range) -> list[Tensor]:
        top, bottom = max(0, strip[0] - step.halo), min(x.shape[2], strip[1] + step.halo)
        places = slice((strip[0] - top) * x.shape[3], (strip[1] - top) * x.shape[3])
        return [part[:, :, places] for part in queries_keys_values(attn, x[:, :, top:bottom], weight)]

    state: Any = 0
    for strip in strips:
        state = state + key_value_state(*of(strip)[1:])
    for strip in strips:
        read = attend_state(of(strip)[0], state, eps=attn.eps)
        yield attention_output(attn, read, x[:, :, strip[0] : strip[1]], weight_out)
