"""vLLM's models with the heads of every attention layer split: the classes, made on demand, and what they refuse."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from pronghorn.duoattention.config import DuoAttentionConfig
from pronghorn.duoattention.heads import HeadSplit
from pronghorn.duoattention.vllm import PREFIX
from pronghorn.duoattention.vllm.layers import SinkWindow, SplitAttention
from pronghorn.vllm.batch_invariance import refuse_batch_invariance

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

SETTINGS, HEADS = "duoattention", "duoattention_full_heads"
EXAMPLE = '{"duoattention": {"pattern": "Llama-3-8B-Instruct-Gradient-1048k", "sparsity": 0.5, "balance": "per_layer"}}'


def __getattr__(name: str) -> Any:
    """`DuoAttention<Architecture>`: the model that vLLM has for the architecture, with its attention layers split."""
    stock = ModelRegistry.models.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    model = type(name, (DuoAttentionModel, stock.load_model_cls()), {"__module__": __name__})
    return globals().setdefault(name, model)


class DuoAttentionModel:
    """What is done to a model of vLLM: it builds itself, and then its attention layers are replaced."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = duo_config(vllm_config.additional_config)
        full_heads = heads_of_rank(config, vllm_config)
        # What is compiled depends on the heads; a pattern's name in the key of the compile cache would not tell.
        vllm_config.additional_config = {**vllm_config.additional_config, HEADS: full_heads}
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        split_attention(self, config, full_heads, vllm_config)  # type: ignore[arg-type]


def duo_config(additional_config: Any) -> DuoAttentionConfig:
    """The settings in vLLM's `additional_config`.

    Raises:
        ValueError, TypeError: there are none, one is unknown or wrong, or vLLM has no use for it.
    """
    settings = additional_config.get(SETTINGS) if isinstance(additional_config, Mapping) else None
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"additional_config: got {additional_config!r}, wanted DuoAttention's settings as in {EXAMPLE}"
        )
    options = {"prefill": "streaming", **settings}
    known = {field.name for field in dataclasses.fields(DuoAttentionConfig)} | {"pattern"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"{SETTINGS}: got {', '.join(unknown)}, accepted are {', '.join(sorted(known))}")
    pattern = options.pop("pattern", None)
    if (pattern is None) == (options.get("gates") is None):
        raise ValueError(f"pattern: got {pattern!r} with gates={options.get('gates')!r}, wanted one of the two")
    config = DuoAttentionConfig(**options) if pattern is None else DuoAttentionConfig.from_pattern(pattern, **options)
    if config.kv_bits != 16:
        raise ValueError(f"kv_bits: got {config.kv_bits}; in vLLM caches are kept as 16 bits, the model's own dtype")
    if config.prefill != "streaming":
        raise ValueError(
            f"prefill: got {config.prefill!r}; vLLM chunks prompts as it sees fit, so only 'streaming' is well defined"
        )
    if config.block_size is not None:
        raise ValueError(f"block_size: got {config.block_size}; in vLLM the mask is by tokens, whatever its blocks")
    return config


def heads_of_rank(config: DuoAttentionConfig, vllm_config: Any) -> list[list[bool]]:
    """For each layer, for each key/value head that this process has, whether it keeps the whole cache.

    Raises:
        ValueError: the pattern is another model's, or ranks would have different numbers of full heads.
    """
    _check_engine(vllm_config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers, heads = model.model_arch_config.total_num_hidden_layers, model.get_total_num_kv_heads()
    table = config.full_heads() or []
    if (len(table), len(table[0])) != (layers, heads):
        raise ValueError(
            f"pattern: is for {len(table)} layers of {len(table[0])} key/value heads, and the model has {layers} of "
            f"{heads}"
        )
    ranks, rank = parallel.tensor_parallel_size, 0
    if ranks > 1:
        from vllm.distributed import get_tensor_model_parallel_rank

        rank = get_tensor_model_parallel_rank()
    return [_share(row, layer, ranks, rank) for layer, row in enumerate(table)]


def _share(row: list[bool], layer: int, ranks: int, rank: int) -> list[bool]:
    if len(row) % ranks:
        raise ValueError(
            f"tensor_parallel_size: {ranks} ranks cannot share {len(row)} key/value heads evenly; DuoAttention wants "
            "a divisor"
        )
    share = len(row) // ranks
    shares = [row[first : first + share] for first in range(0, len(row), share)]
    counts = [sum(part) for part in shares]
    if len(set(counts)) > 1:
        raise ValueError(
            f"tensor_parallel_size: {ranks} ranks would have {counts} full heads of layer {layer}, and vLLM wants the "
            "same cache on all; use one rank, or a pattern with as many in each"
        )
    return shares[rank]


def _check_engine(vllm_config: Any) -> None:
    refuse_batch_invariance("DuoAttention")
    if vllm_config.model_config.use_mla:
        raise ValueError("architecture: its attention is latent (MLA), without key/value heads to split")
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "disable_hybrid_kv_cache_manager: is on, by you, this platform or the KV connector; without the hybrid "
            "manager streaming heads would keep all their blocks"
        )
    ranks = vllm_config.parallel_config.decode_context_parallel_size
    if ranks > 1:
        raise ValueError(f"decode_context_parallel_size: got {ranks}, wanted 1")


def split_attention(
    model: nn.Module, config: DuoAttentionConfig, full_heads: list[list[bool]], vllm_config: Any
) -> None:
    """Replace attention layers that have streaming heads, here and where vLLM looks for them.

    Raises:
        ValueError: a layer is of a kind whose heads cannot be split.
    """
    layers = vllm_config.compilation_config.static_forward_context
    found: dict[str, Any] = {
        path: layer for path, layer in model.named_modules() if isinstance(layer, AttentionLayerBase)
    }
    counts = [sum(row) for row in full_heads]
    if len(set(counts)) > 1:
        logger.warning(
            "layers keep from %d to %d full heads; vLLM then wants many groups of blocks, padded to one size. "
            'balance="per_layer" saves that memory',
            min(counts), max(counts),
        )  # fmt: skip
    window = SinkWindow(config.sink_size, config.recent_size + (config.decode_window == "reference"))
    for path, layer in found.items():
        row = full_heads[extract_layer_index(path)]
        _check_layer(layer, path, len(row))
        if not all(row):
            parent, _, name = path.rpartition(".")
            del layers[layer.layer_name]
            split = SplitAttention(layer, HeadSplit(row), window, max(counts), vllm_config.cache_config)
            setattr(model.get_submodule(parent), name, split)


def _check_layer(layer: Any, path: str, heads: int) -> None:
    implementation = getattr(layer, "impl", None)
    obstacles = {
        f"it is {type(layer).__name__}": type(layer) is not Attention,
        "it is no causal attention of a decoder": getattr(layer, "attn_type", None) != AttentionType.DECODER,
        "it has a sliding window": getattr(layer, "sliding_window", None) is not None,
        "it has sinks of its own": getattr(layer, "has_sink", False),
        "it has position biases (ALiBi)": getattr(implementation, "alibi_slopes", None) is not None,
        "its scores are capped": bool(getattr(implementation, "logits_soft_cap", None)),
        "it reads another layer's cache": getattr(layer, "kv_sharing_target_layer_name", None) is not None,
        "its values are of another size than its keys": layer_sizes_differ(layer),
        f"it has not {heads} key/value heads": getattr(layer, "num_kv_heads", heads) != heads,
    }
    for obstacle, stands in obstacles.items():
        if stands:
            raise ValueError(f"architecture: {path} cannot be split into full and streaming heads: {obstacle}")
    if layer.kv_cache_torch_dtype.itemsize < 2:
        raise ValueError(
            f"kv_cache_dtype: got {layer.kv_cache_dtype!r}; streaming heads take caches of 16 or 32 bits, as 'auto' is"
        )


def layer_sizes_differ(layer: Any) -> bool:
    """Whether a head's values are not as long as its keys."""
    return bool(getattr(layer, "head_size", 0) != getattr(layer, "head_size_v", getattr(layer, "head_size", 0)))
