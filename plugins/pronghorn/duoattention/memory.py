"""What the caches of a model take, before any is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pronghorn.duoattention.config import DuoAttentionConfig

SCALE_BYTES = 4  # a scale and a zero in fp16


@dataclass(frozen=True)
class Plan:
    """Memory of keys and values, in bytes, all layers and the whole batch.

    Attributes:
        context: tokens of a sequence.
        cache_bytes: what DuoAttention keeps of them.
        full_bytes: what a cache of all tokens in the model's own dtype takes.
        kept: share of heads and tokens that is kept; more than the share of full heads, for sink and recent tokens.
        largest_context: tokens of a sequence that fit into `budget_bytes`; None without a budget, or if all do.
    """

    context: int
    cache_bytes: int
    full_bytes: int
    kept: float
    largest_context: int | None

    def __str__(self) -> str:
        gib = 2**30
        text = (
            f"{self.context} tokens: {self.cache_bytes / gib:.2f} GiB of keys and values, "
            f"{self.full_bytes / gib:.2f} GiB without DuoAttention ({self.full_bytes / self.cache_bytes:.2f} x); "
            f"{self.kept:.1%} of all heads' tokens are kept"
        )
        return text if self.largest_context is None else f"{text}; {self.largest_context} tokens fit"


def plan(
    model_config: Any,
    config: DuoAttentionConfig,
    *,
    context: int,
    batch_size: int = 1,
    budget_bytes: int | None = None,
    element_bytes: int = 2,
) -> Plan:
    """The memory that a context takes, and the largest that fits.

    Args:
        model_config: configuration of a model of transformers (its shapes are read, nothing is loaded).
        config: settings; without gates, `sparsity` is taken as the share of streaming heads, rounded per layer.
        context: tokens of a sequence.
        batch_size: sequences.
        budget_bytes: memory for keys and values.
        element_bytes: of the model's dtype.

    Raises:
        ValueError: the pattern's shape is not the model's, or a number is not positive.
    """
    for name, value in (("context", context), ("batch_size", batch_size), ("budget_bytes", budget_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, wanted a positive number")
    text = model_config.get_text_config()
    layers = text.num_hidden_layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    full = _full_heads(config, layers, heads)
    of_token = 2 * batch_size * _head_bytes(size, config.kv_bits, element_bytes)

    def needed(tokens: int) -> int:
        return sum(of_token * (n * tokens + (heads - n) * min(tokens, config.window)) for n in full)

    kept = sum(n * context + (heads - n) * min(context, config.window) for n in full) / (layers * heads * context)
    dense = 2 * batch_size * size * element_bytes * layers * heads * context
    return Plan(context, needed(context), dense, kept, _largest(budget_bytes, full, heads, of_token, config.window))


def _full_heads(config: DuoAttentionConfig, layers: int, heads: int) -> list[int]:
    table: Sequence[Sequence[bool]] | None = config.full_heads()
    if table is None:
        return [heads - round((config.sparsity or 0) * heads)] * layers
    if (len(table), len(table[0])) != (layers, heads):
        raise ValueError(
            f"gates: the pattern is for {len(table)} layers of {len(table[0])} key/value heads, "
            f"the model has {layers} of {heads}"
        )
    return [sum(row) for row in table]


def _head_bytes(size: int, bits: int, element_bytes: int) -> int:
    return size * element_bytes if bits == 16 else size * bits // 8 + SCALE_BYTES


def _largest(budget: int | None, full: list[int], heads: int, of_token: int, window: int) -> int | None:
    if budget is None:
        return None
    streaming = len(full) * heads - sum(full)
    tokens = budget // (of_token * len(full) * heads)  # while streaming heads still keep all
    if tokens < window:
        return tokens
    return None if not sum(full) else (budget - of_token * streaming * window) // (of_token * sum(full))
