"""Every knob of DuoAttention, its default and where it comes from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from pronghorn.configuration import from_values
from pronghorn.duoattention.pattern import Pattern, checked_gates, load_pattern, save_pattern, threshold_gates

KV_BITS = (16, 8, 4)
DEFAULT_SPARSITY = 0.5


@dataclasses.dataclass
class DuoAttentionConfig:
    """Which heads keep the whole cache, and what the others keep.

    The unit of decision is one key/value head of one layer; all query heads of its group share it.

    Attributes:
        gates: for each layer, for each key/value head, how much it retrieves, 0 to 1; None keeps every head full.
        sparsity: share of heads that stream, those with the lowest gates; 0.5 if there is no threshold either (paper:
            0.5 with grouped queries, 0.75 without).
        threshold: heads with gates below it stream, instead of a share.
        balance: "global" ranks all heads of the model together (the paper's), "per_layer" gives every layer as many
            full heads, which vLLM's memory prefers.
        seed: decides between equal gates.
        sink_size: first tokens that streaming heads keep (paper: 64).
        recent_size: last tokens that they keep (paper: 256).
        kv_bits: of the cached keys and values: 16 is the model's own dtype; 8 and 4 are codes with a scale and a zero
            for each token and head.
        prefill: "dense_first" lets all heads see all of the first chunk, as the authors' code does; "streaming" masks
            streaming heads from the first token on.
        decode_window: "reference" lets a decoded token see `recent_size` tokens and itself, as the authors' code
            does; "mask" counts it among them, as the training does.
        block_size: with `prefill="streaming"`, the mask's granularity in the first chunk: None for tokens, 128 for
            the training's blocks.
    """

    gates: list[list[float]] | None = None
    sparsity: float | None = None
    threshold: float | None = None
    balance: str = "global"
    seed: int = 42
    sink_size: int = 64
    recent_size: int = 256
    kv_bits: int = 16
    prefill: str = "dense_first"
    decode_window: str = "reference"
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.gates is not None:
            self.gates = checked_gates(self.gates)
        for name in ("sparsity", "threshold"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise TypeError(f"{name}: got {value!r}, wanted a finite number or None")
        if self.sparsity is not None and self.threshold is not None:
            raise ValueError(f"threshold: got {self.threshold} beside sparsity={self.sparsity}; give one of them")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity: got {self.sparsity}, wanted 0 (all full) to 1 (all streaming)")
        for name in ("sink_size", "recent_size", "block_size"):
            _check_positive(name, getattr(self, name), optional=name == "block_size")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed!r}, wanted an integer from 0 to 2^32 - 1")
        _check_choice("balance", self.balance, ("global", "per_layer"))
        _check_choice("kv_bits", self.kv_bits, KV_BITS)
        _check_choice("prefill", self.prefill, ("dense_first", "streaming"))
        _check_choice("decode_window", self.decode_window, ("reference", "mask"))
        if self.block_size is not None and self.prefill != "streaming":
            raise ValueError(f"block_size: {self.block_size} has no meaning with prefill={self.prefill!r}")
        if self.block_size is not None and self.decode_window == "mask":
            raise ValueError("block_size: blocks see further back than decode_window='mask'; leave one of them out")

    @property
    def window(self) -> int:
        """Tokens that a streaming head keeps."""
        return self.sink_size + self.recent_size

    def full_heads(self) -> list[list[bool]] | None:
        """For each layer, for each key/value head, whether it keeps the whole cache; None if every head does."""
        if self.gates is None:
            return None
        sparsity = self.sparsity if self.sparsity is not None or self.threshold is not None else DEFAULT_SPARSITY
        return threshold_gates(
            self.gates, sparsity=sparsity, threshold=self.threshold, balance=self.balance, seed=self.seed
        )

    @classmethod
    def from_pattern(cls, pattern: str | os.PathLike[str], **options: Any) -> DuoAttentionConfig:
        """The gates of a pattern, with any other attributes.

        Args:
            pattern: a folder with `full_attention_heads.tsv`, or the name of a published one
                (`pronghorn.duoattention.published_patterns()`).
            **options: other attributes. `sink_size` and `recent_size` are not the pattern's own, with which it was
                trained, but the smaller ones of the paper's evaluation, unless given.

        Raises:
            FileNotFoundError: there is no such pattern.
            ValueError: it is damaged.
        """
        return cls(gates=load_pattern(pattern).gates, **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `full_attention_heads.tsv` and `config.json`, which the authors' code reads too.

        Raises:
            ValueError: there are no gates.
        """
        if self.gates is None:
            raise ValueError("gates: there are none to save")
        fields = {name: value for name, value in self.to_dict().items() if name != "gates"}
        save_pattern(Pattern(self.gates, fields), folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> DuoAttentionConfig:
        """What `save_pretrained` wrote."""
        pattern = load_pattern(folder)
        known = {field.name for field in dataclasses.fields(cls)}  # the authors' file holds their training's arguments
        return cls(**{name: value for name, value in pattern.settings.items() if name in known}, gates=pattern.gates)

    def to_dict(self) -> dict[str, Any]:
        """All attributes, for JSON."""
        return dataclasses.asdict(self)

    def to_json_string(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> DuoAttentionConfig:
        """From what `to_dict` gave.

        Raises:
            ValueError, TypeError: there are other names, or values that are none.
        """
        return from_values(cls, config_dict)


def _check_choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    if type(value) is not type(accepted[0]) or value not in accepted:
        raise ValueError(f"{name}: got {value!r}, accepted are {', '.join(map(str, accepted))}")


def _is_number(value: Any) -> bool:
    """And one that JSON has."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _check_positive(name: str, value: Any, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}, wanted a positive number of tokens{' or None' if optional else ''}")
