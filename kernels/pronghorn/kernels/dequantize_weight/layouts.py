"""How group-quantized weights lie in memory: seven layouts, each defined by one permutation.

A weight [N, K] (N outputs, K inputs) is kept as codes, with a scale and a zero point for every `group_size` inputs of
an output; W = (code - zero_point) * scale. Five layouts hold 4-bit codes: split n and k into digits, transpose the
digits, and the codes stand one after the other in little-endian words. That permutation is the definition of a layout;
packing and unpacking follow from it, and `triton.py` mirrors it as arithmetic. Two layouts are ours. "natural" holds 2,
3, 4 and 8 bits: the codes of each output along k, as one bit stream. "fragments" holds 2, 3 and 4 bits in the order of
the tensor cores' registers; models are brought into it to run, and never stored in it.

Sources: AutoAWQ (gemm, gemv, gemv_fast, Marlin tiles), llm-awq (v1 is gemv, v2 is gemv_fast), ExLlama (GPTQ order).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pronghorn.kernels._arguments import check_bits, check_shape, resolve_group_size

# ExLlama's kernels add one to a zero point, so AutoAWQ's repack takes one from each; it does so on the whole word, and
# the borrow of a zero point of 0 shows in its neighbour.
EXLLAMA_ONES = 0x11111111


@dataclass(frozen=True)
class Permutation:
    """Order of the codes of a weight [N, K] in memory.

    Attributes:
        n_digits, k_digits: how n and k are split, most significant digit first; the first is what remains.
        order: the transposition of all these digits, n's before k's.
    """

    n_digits: tuple[int, ...]
    k_digits: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def n_multiple(self) -> int:
        """What N must be divisible by."""
        return math.prod(self.n_digits)

    @property
    def k_multiple(self) -> int:
        """What K must be divisible by."""
        return math.prod(self.k_digits)

    def apply(self, codes: Tensor) -> Tensor:
        """Codes [N, K] to their sequence [N * K] in memory."""
        return codes.reshape(self._digits(*codes.shape)).permute(self.order).reshape(-1)

    def invert(self, sequence: Tensor, rows: int, columns: int) -> Tensor:
        """The sequence [N * K] to codes [N, K] (a view where that is possible)."""
        digits = self._digits(rows, columns)
        stored = sequence.reshape([digits[position] for position in self.order])
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return stored.permute(inverse).reshape(rows, columns)

    def _digits(self, rows: int, columns: int) -> tuple[int, ...]:
        return (rows // self.n_multiple, *self.n_digits, columns // self.k_multiple, *self.k_digits)


# n and k are split into (rest, *digits). AutoAWQ's gemm: of eight channels the even ones come first.
GEMM = Permutation((4, 2), (), (3, 0, 2, 1))
ROW_MAJOR = Permutation((), (), (0, 1))
# llm-awq v2: four rows interleaved over 64 columns; within 32 columns pairs are spread for 16-bit lanes.
GEMV_FAST = Permutation((4,), (2, 4, 4, 2), (0, 2, 1, 3, 5, 6, 4))
ALONG_K = Permutation((), (8,), (1, 0, 2))
# 16 x 64 tiles in the order in which tensor-core fragments (mma.m16n8k16) want them.
MARLIN = Permutation((4, 2, 8), (2, 4, 2), (4, 0, 3, 6, 1, 7, 2, 5))
# Of 16 x 64 tiles, lane (n % 8, k % 8 / 2) of a warp holds 2 x 16 codes: those of the low half of its registers, then
# those of the high half, in each half by step of 16 inputs, then as the operand of mma.m16n8k16 has its registers.
FRAGMENTS = Permutation((2, 8), (4, 2, 4, 2), (0, 3, 2, 6, 7, 4, 5, 1))


@dataclass(frozen=True)
class Layout:
    """One way to store a quantized weight.

    Attributes:
        name: what configurations call it.
        bits: widths it can hold.
        permutation: where its codes stand; None for the bit stream of "natural".
        word_dtype: dtype of `qweight`.
        qweight_shape: (N, K, bits) to the shape of `qweight`.
        n_multiple, k_multiple: what N and K must be divisible by (whole words and whole tiles).
        zero_points: "packed" in words, as "bytes", "scaled" (-scale * zero as a float) or "none" (symmetric).
    """

    name: str
    bits: tuple[int, ...]
    permutation: Permutation | None
    word_dtype: torch.dtype
    qweight_shape: Callable[[int, int, int], tuple[int, int]]
    n_multiple: int
    k_multiple: int
    zero_points: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        return ("qweight", "scales") if self.zero_points == "none" else ("qweight", "qzeros", "scales")

    def check(self, out_features: int, in_features: int, bits: int, group_size: int) -> None:
        """Raise ValueError if a weight of this shape cannot be stored in this layout."""
        check_bits(bits)
        resolve_group_size(group_size, in_features)
        if bits not in self.bits:
            raise ValueError(f"layout {self.name!r} holds {_either(self.bits)} bits, got {bits}")
        for what, value, multiple in (
            ("out_features", out_features, self.n_multiple),
            ("in_features", in_features, self.k_multiple),
        ):
            if value % multiple:
                raise ValueError(f"{what}: layout {self.name!r} needs a multiple of {multiple}, got {value}")

    def shapes(
        self, out_features: int, in_features: int, group_size: int, bits: int
    ) -> dict[str, tuple[tuple[int, int], torch.dtype | None]]:
        """Shape and dtype of each stored tensor; None is the dtype of the model."""
        self.check(out_features, in_features, bits, group_size)
        groups = in_features // resolve_group_size(group_size, in_features)
        padded = 8 * _zero_words(groups, in_features // groups)
        shapes: dict[str, tuple[tuple[int, int], torch.dtype | None]] = {
            "qweight": (self.qweight_shape(out_features, in_features, bits), self.word_dtype)
        }
        if self.name == "gemv":
            shapes["qzeros"] = ((out_features, padded // 8), torch.int32)
            shapes["scales"] = ((out_features, padded), None)
        elif self.name == "gemv_fast":
            shapes["qzeros"] = ((padded, out_features), None)
            shapes["scales"] = ((padded, out_features), None)
        elif self.name == "fragments":
            shapes["qzeros"] = ((out_features // 16, groups * 16), torch.uint8)
            shapes["scales"] = ((out_features // 16, groups * 16), None)
        else:
            if self.zero_points == "packed":
                shapes["qzeros"] = ((groups, out_features // 8), torch.int32)
            elif self.zero_points == "bytes":
                shapes["qzeros"] = ((groups, out_features), torch.uint8)
            shapes["scales"] = ((groups, out_features), None)
        return shapes


def _either(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))


def _zero_words(groups: int, group_size: int) -> int:
    """llm-awq pads the zero-point words of a row, more for small groups."""
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    return math.ceil(math.ceil(groups / 8) / multiple) * multiple


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("gemm", (4,), GEMM, torch.int32, lambda n, k, b: (k, n // 8), 8, 1, "packed"),
        Layout("gemv", (4,), ROW_MAJOR, torch.int32, lambda n, k, b: (n, k // 8), 1, 8, "packed"),
        Layout("gemv_fast", (4,), GEMV_FAST, torch.int16, lambda n, k, b: (n // 4, k), 4, 64, "scaled"),
        Layout("exllama", (4,), ALONG_K, torch.int32, lambda n, k, b: (k // 8, n), 8, 8, "packed"),
        Layout("marlin", (4,), MARLIN, torch.int32, lambda n, k, b: (k // 16, 2 * n), 64, 16, "none"),
        Layout("fragments", (2, 3, 4), FRAGMENTS, torch.int32, lambda n, k, b: (n // 16, k * b // 2), 16, 64, "bytes"),
        Layout("natural", (2, 3, 4, 8), None, torch.int32, lambda n, k, b: (math.ceil(k * b / 32), n), 1, 1, "bytes"),
    )
}


def get_layout(name: str) -> Layout:
    """The layout of this name, or a ValueError that lists what there is."""
    if name not in LAYOUTS:
        raise ValueError(f"layout: got {name!r}, accepted are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, *, layout: str, bits: int, group_size: int) -> dict[str, Tensor]:
    """Store a quantized weight.

    Args:
        codes: uint8 [N, K] in 0 … 2^bits - 1.
        scales: float [N, K/group_size].
        zeros: integer [N, K/group_size] in 0 … 2^bits - 1.
        layout: a name of `LAYOUTS`.
        bits: width of a code.
        group_size: inputs a scale, -1 for the whole row.

    Returns:
        `qweight`, `scales` and, where the layout has it, `qzeros`.

    Raises:
        ValueError: a shape or value that the layout cannot hold; Marlin holds zero points of 2^(bits-1) only.
    """
    chosen = get_layout(layout)
    rows, columns = codes.shape
    chosen.check(rows, columns, bits, group_size)
    groups = columns // resolve_group_size(group_size, columns)
    check_shape("scales", scales, (rows, groups))
    check_shape("zeros", zeros, (rows, groups))
    for name, values in (("codes", codes), ("zeros", zeros)):
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >> bits):
            raise ValueError(f"{name}: outside 0 … {(1 << bits) - 1}")
    return {
        "qweight": pack_codes(codes, layout=layout, bits=bits),
        **_pack_groups(chosen, scales, zeros, bits, columns),
    }


def unpack(
    tensors: Mapping[str, Tensor], *, layout: str, bits: int, group_size: int, out_features: int, in_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `pack`: codes uint8 [N, K], scales [N, K/group_size] and zeros uint8 [N, K/group_size].

    Raises:
        ValueError: a tensor is missing or has another shape or dtype than the layout says.
    """
    chosen = get_layout(layout)
    for name, (shape, dtype) in chosen.shapes(out_features, in_features, group_size, bits).items():
        if name not in tensors:
            raise ValueError(f"{name}: missing; layout {layout!r} holds {', '.join(chosen.tensors)}")
        check_shape(name, tensors[name], shape)
        if dtype is not None and tensors[name].dtype != dtype:
            raise ValueError(f"{name}: got {tensors[name].dtype}, layout {layout!r} has {dtype}")
    groups = in_features // resolve_group_size(group_size, in_features)
    codes = unpack_codes(
        tensors["qweight"], layout=layout, bits=bits, out_features=out_features, in_features=in_features
    )
    scales, zeros = unpack_groups(tensors, layout=layout, bits=bits, out_features=out_features, groups=groups)
    return codes, scales, zeros


def repack(
    tensors: Mapping[str, Tensor],
    source: str,
    target: str,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
) -> dict[str, Tensor]:
    """Packed tensors of layout `source` in layout `target`, without loss.

    Raises:
        ValueError: `target` cannot hold them.
    """
    shape = {"out_features": out_features, "in_features": in_features}
    codes, scales, zeros = unpack(tensors, layout=source, bits=bits, group_size=group_size, **shape)
    return pack(codes, scales, zeros, layout=target, bits=bits, group_size=group_size)


def pack_codes(codes: Tensor, *, layout: str, bits: int) -> Tensor:
    """`qweight` of codes uint8 [N, K]."""
    chosen = get_layout(layout)
    rows, columns = codes.shape
    shape = chosen.qweight_shape(rows, columns, bits)
    if chosen.permutation is None:
        return _pack_stream(codes.T.contiguous(), bits)
    if chosen.name == "fragments":
        return _pack_lanes(chosen.permutation.apply(codes), bits).view(shape)
    per_word = torch.iinfo(chosen.word_dtype).bits // 4
    return _to_words(chosen.permutation.apply(codes), per_word).to(chosen.word_dtype).view(shape)


def unpack_codes(qweight: Tensor, *, layout: str, bits: int, out_features: int, in_features: int) -> Tensor:
    """Codes uint8 [N, K] of `qweight`."""
    chosen = get_layout(layout)
    if chosen.permutation is None:
        return _unpack_stream(qweight, bits, in_features).T
    if chosen.name == "fragments":
        return chosen.permutation.invert(_unpack_lanes(qweight, bits), out_features, in_features)
    return chosen.permutation.invert(_to_nibbles(qweight), out_features, in_features)


def _to_words(nibbles: Tensor, per_word: int) -> Tensor:
    """Codes in memory order to signed words of `per_word` codes each, as int64."""
    shifts = torch.arange(0, 4 * per_word, 4, device=nibbles.device)
    words = (nibbles.reshape(-1, per_word).long() << shifts).sum(-1)
    width = 4 * per_word
    return torch.where(words >= 1 << (width - 1), words - (1 << width), words)


def _to_nibbles(words: Tensor) -> Tensor:
    """Words of any shape to the sequence of their codes, uint8."""
    shifts = torch.arange(0, torch.iinfo(words.dtype).bits, 4, device=words.device, dtype=torch.int32)
    return ((words.reshape(-1, 1).int() >> shifts) & 15).to(torch.uint8).view(-1)


def _pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Codes [K, N] to int32 words [ceil(K * bits / 32), N]: each column one little-endian bit stream."""
    count, columns = codes.shape
    total = math.ceil(count * bits / 32)
    # Code i spans bits i * bits …; with 3 bits it may reach into the next word.
    words = torch.zeros(total + 1, columns, dtype=torch.int64, device=codes.device)
    start = torch.arange(count, device=codes.device) * bits
    value = codes.long() << (start % 32)[:, None]
    words.index_add_(0, start // 32, value & 0xFFFFFFFF)
    words.index_add_(0, start // 32 + 1, value >> 32)
    words = words[:total]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `_pack_stream`: int32 [ceil(K * bits / 32), N] to uint8 [K, N]."""
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
        codes = (words[:, None] >> shifts[:, None]) & mask
        return codes.to(torch.uint8).flatten(0, 1)[:count]
    start = torch.arange(count, device=words.device) * bits
    low = words.long()[start // 32] & 0xFFFFFFFF
    following = (start // 32 + 1).clamp(max=words.shape[0] - 1)
    both = low | (words.long()[following] & 0xFFFFFFFF) << 32
    return (both >> (start % 32)[:, None] & mask).to(torch.uint8)


def _pack_lanes(sequence: Tensor, bits: int) -> Tensor:
    """Codes in the order of "fragments" to int32 words: for each lane `bits` words, each with a low and a high half.

    A half holds 16 // bits codes; of 3-bit codes the sixteenth lies in the top bits of the three halves. The 4-bit
    words of a lane are neighbours, for one load of 16 bytes; else the words of the lanes are.
    """
    codes = sequence.view(-1, 32, 2, 16).int()
    in_half = 16 // bits
    shifts = torch.arange(in_half, device=codes.device, dtype=torch.int32) * bits
    halves = (codes[..., : in_half * bits].unflatten(-1, (bits, in_half)) << shifts).sum(-1, dtype=torch.int32)
    if bits == 3:
        halves |= (codes[..., 15:] >> torch.arange(3, device=codes.device, dtype=torch.int32) & 1) << 15
    words: Tensor = halves[:, :, 0] | halves[:, :, 1] << 16
    return words if bits == 4 else words.transpose(1, 2).contiguous()


def _unpack_lanes(words: Tensor, bits: int) -> Tensor:
    """Inverse of `_pack_lanes`: the sequence of codes, uint8."""
    words = words.view(-1, 32, bits) if bits == 4 else words.view(-1, bits, 32).transpose(1, 2)
    halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], dim=2)
    in_half = 16 // bits
    shifts = torch.arange(in_half, device=words.device, dtype=torch.int32) * bits
    codes = (halves[..., None] >> shifts & ((1 << bits) - 1)).flatten(-2)
    if bits == 3:
        last = (halves >> 15 << torch.arange(3, device=words.device, dtype=torch.int32)).sum(-1, keepdim=True)
        codes = torch.cat([codes, last], dim=-1)
    return codes.to(torch.uint8).reshape(-1)


def _fragment_groups(values: Tensor) -> Tensor:
    """[N, groups] to [N / 16, groups * 16]: outputs g and g + 8 of a tile, which one lane holds, side by side."""
    rows, groups = values.shape
    return values.view(rows // 16, 2, 8, groups).permute(0, 3, 2, 1).reshape(rows // 16, groups * 16)


def _of_fragment_groups(stored: Tensor, groups: int) -> Tensor:
    return stored.view(-1, groups, 8, 2).permute(0, 3, 2, 1).reshape(-1, groups)


def _pack_groups(layout: Layout, scales: Tensor, zeros: Tensor, bits: int, columns: int) -> dict[str, Tensor]:
    rows, groups = scales.shape
    padding = 8 * _zero_words(groups, columns // groups) - groups
    if layout.name == "gemv":
        words = _to_words(pad(zeros, (0, padding)), 8).to(torch.int32)
        return {"qzeros": words.view(rows, (groups + padding) // 8), "scales": pad(scales, (0, padding))}
    if layout.name == "gemv_fast":
        scaled = -(scales * zeros.to(scales.dtype))
        padded_rows = (0, 0, 0, padding)
        return {
            "qzeros": pad(scaled.T, padded_rows).contiguous(),
            "scales": pad(scales.T, padded_rows).contiguous(),
        }
    if layout.name == "marlin":
        middle = 1 << (bits - 1)
        if bool((zeros != middle).any()):
            raise ValueError(f"zeros: layout 'marlin' is symmetric and holds zero points of {middle} only")
        return {"scales": scales.T[:, _marlin_scale_order(rows, groups, scales.device)].contiguous()}
    if layout.name == "fragments":
        return {"scales": _fragment_groups(scales), "qzeros": _fragment_groups(zeros.to(torch.uint8))}
    stored = {"scales": scales.T.contiguous()}
    if layout.name == "natural":
        stored["qzeros"] = zeros.T.to(torch.uint8).contiguous()
    else:
        words = _to_words(_zeros_permutation(layout).apply(zeros), 8).to(torch.int32).view(groups, -1)
        stored["qzeros"] = words - EXLLAMA_ONES if layout.name == "exllama" else words
    return stored


def _zeros_permutation(layout: Layout) -> Permutation:
    return GEMM if layout.name == "gemm" else Permutation((), (), (1, 0))


def unpack_groups(
    tensors: Mapping[str, Tensor], *, layout: str, bits: int, out_features: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Scales [N, groups] and zeros uint8 [N, groups] of the stored tensors, without padding."""
    scales = unpack_scales(tensors["scales"], layout=layout, groups=groups)
    chosen = get_layout(layout)
    if chosen.zero_points == "none":
        return scales, torch.full_like(scales, 1 << (bits - 1), dtype=torch.uint8)
    if chosen.zero_points == "scaled":
        return scales, zeros_of_scaled(scales, tensors["qzeros"][:groups].T)
    return scales, unpack_zeros(tensors["qzeros"], layout=layout, out_features=out_features, groups=groups)


def unpack_scales(scales: Tensor, *, layout: str, groups: int) -> Tensor:
    """Stored scales to [N, groups], without padding."""
    if layout == "gemv":
        return scales[:, :groups].contiguous()
    if layout == "marlin":
        scales = scales[:, _marlin_scale_order(scales.shape[1], groups, scales.device).argsort()]
    elif layout == "fragments":
        return _of_fragment_groups(scales, groups)
    return scales[:groups].T.contiguous()


def unpack_zeros(qzeros: Tensor, *, layout: str, out_features: int, groups: int) -> Tensor:
    """Stored integer zero points to uint8 [N, groups], without padding."""
    if layout == "natural":
        return qzeros.T.contiguous()
    if layout == "fragments":
        return _of_fragment_groups(qzeros, groups)
    if layout == "gemv":
        return _to_nibbles(qzeros).view(out_features, 8 * qzeros.shape[1])[:, :groups].contiguous()
    words = qzeros + EXLLAMA_ONES if layout == "exllama" else qzeros
    return _zeros_permutation(get_layout(layout)).invert(_to_nibbles(words), out_features, groups).contiguous()


def zeros_of_scaled(scales: Tensor, scaled_zeros: Tensor) -> Tensor:
    """uint8 zero points of -(scale * zero), which is exact: a zero point has few bits. Where a scale is 0, 0."""
    scale = scales.float()
    quotient = -scaled_zeros.float() / torch.where(scale != 0, scale, 1)
    return torch.where(scale != 0, quotient, 0).round().clamp(0, 255).to(torch.uint8)


def _marlin_scale_order(rows: int, groups: int, device: torch.device) -> Tensor:
    """Position to output channel, in blocks of 64 channels (32 where one scale serves the whole row)."""
    if groups > 1:
        block = torch.arange(64, device=device).view(8, 8).T.flatten()
    else:
        pairs = torch.tensor([0, 1, 8, 9, 16, 17, 24, 25], device=device)
        block = (2 * torch.arange(4, device=device)[:, None] + pairs).flatten()
    return (torch.arange(0, rows, len(block), device=device)[:, None] + block).flatten()
