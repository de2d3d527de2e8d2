"""DuoAttention with the shapes of Llama-3-8B and Llama-2-7B: decoding, prompts and memory against full attention.

Weights are random, in 16 bits or in AWQ's 4; in 16 bits all layers share one layer's, so that the full cache of half a
million tokens fits beside them, and each still reads its weights anew. Caches are filled with random numbers, and steps
are CUDA graphs on both sides, of the same model with the same small operations fused. Full attention is the faster of
PyTorch's and, where vLLM is installed, its FlashAttention 3.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import device, measure, measure_in_turn, median, row, share_of_bandwidth, write
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import Cache, StaticLayer

import pronghorn.transformers  # noqa: F401 - registers the attention
from pronghorn.awq import AwqConfig, fuse, quantize_model
from pronghorn.duoattention import DuoAttentionConfig, apply_duo, plan
from pronghorn.duoattention.bench import cache_bytes
from pronghorn.kernels.decode_attention import CachedHeads, decode_attention
from pronghorn.kernels.kv_quantize import kv_quantize
from pronghorn.transformers.fused_operations import FusedOperations
from pronghorn.transformers.graphs import captured

GPU = torch.cuda.is_available()
SHAPES = {
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 32, "vocab_size": 100}
GROUP_SIZE = 128 if GPU else 32
PARAMETER_BYTES = {16: 16.1e9, 4: 5.7e9}  # of Llama-3-8B, with an embedding and a head in 16 bits
PATTERNS = {"Llama-3-8B": "Llama-3-8B-Instruct-Gradient-1048k", "Llama-2-7B": "Llama-2-7B-32K-Instruct"}
K = 1024
STEP_CONTEXTS = {"Llama-3-8B": [32 * K, 128 * K, 256 * K, 512 * K], "Llama-2-7B": [32 * K, 64 * K, 128 * K]}
SPARSITY = {"Llama-3-8B": 0.5, "Llama-2-7B": 0.75}
REACH = {("Llama-3-8B", 256 * K): 1.5, ("Llama-3-8B", 512 * K): 1.5, ("Llama-2-7B", 128 * K): 2.1}
LEAST_MEMORY = {"Llama-3-8B": 1.65, "Llama-2-7B": 2.5}
KERNEL_CONTEXTS = [64 * K, 256 * K] if GPU else [256]
LAYERS = 4 if GPU else 1  # more than the L2 cache holds
PROMPT_LAYERS = 8
PROMPT, CHUNK = (128 * K, 32 * K) if GPU else (256, 64)
STEPS, ROOM = (20, 32) if GPU else (3, 32)  # decoding steps, and tokens that a cache has room for beyond its context
DTYPE = torch.float16 if GPU else torch.float32


class FullLayer(StaticLayer):
    """A full cache of a fixed length, as good as it can be for a step: keys are views, and nothing is masked."""

    def __init__(self, length: int) -> None:
        super().__init__(max_cache_len=length + 1)
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new token after the others, again and again at the same place."""
        self.keys[:, :, self.length :] = key_states
        self.values[:, :, self.length :] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before the new one."""
        return self.length


def main() -> None:
    """Measure and write the results, what there is after each part."""
    torch.manual_seed(0)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "kernel": kernel_rows, "prompt": prompt_rows, "largest": largest_rows,
        **{f"{short}-w{bits}": functools.partial(step_rows, name, bits)
           for short, name in (("gqa", "Llama-3-8B"), ("mha", "Llama-2-7B")) for bits in (16, 4)},
    }  # fmt: skip
    wanted = sys.argv[1:] or list(parts)
    rows = []
    for name in wanted:
        rows += parts[name]()
        write("duoattention", rows)
        free()


def kernel_rows() -> list[dict[str, Any]]:
    """Layers' decoding, one after the other, against the bandwidth and, with four bits, against 16."""
    rows = []
    index = torch.tensor([0, -1, 1, -2, 2, -3, 3, -4], dtype=torch.int32, device=device())
    every = torch.arange(4, dtype=torch.int32, device=device())
    for context in KERNEL_CONTEXTS:
        layers = [[torch.randn(1, n, t, 128, device=device(), dtype=DTYPE) for n, t in
                   ((32, 1), (8, context), (8, context))] for _ in range(LAYERS)]  # fmt: skip
        halves, shorts, codes, runs = [], [], [], []
        for _, key, value in layers:
            halves.append(_heads(key[:, :4], value[:, :4], 16))
            shorts.append(_heads(key[:, 4:, :384], value[:, 4:, :384], 16))
            codes.append(_heads(key[:, :4], value[:, :4], 4))
        for (query, *_), half, short in zip(layers, halves, shorts, strict=True):
            runs.append(functools.partial(decode_attention, query, half, short, index))
        ours, dense = in_turn(runs), fastest(layers)
        moved = 2 * 4 * (context + 384) * 128 * layers[0][0].element_size()
        rows.append(row("attention of a token, one layer, 4 of 8 heads full", "full attention", f"{context} tokens",
                        ours, dense, roofline=share_of_bandwidth(moved, ours["p50"]), note="bytes"))  # fmt: skip
        measured = []
        for caches, bits in ((codes, 4), (halves, 16)):
            empty = _heads(layers[0][1][:, :0, :1], layers[0][2][:, :0, :1], bits)
            measured.append(in_turn([
                functools.partial(decode_attention, query[:, :16], cache, empty, every, bits=bits)
                for (query, *_), cache in zip(layers, caches, strict=True)
            ]))  # fmt: skip
        rows.append(row("full heads in 4 bits", "in 16 bits", f"{context} tokens, 4 heads", *measured,
                        roofline=share_of_bandwidth(2 * 4 * context * 68, measured[0]["p50"]),
                        reach=2.5 if context == 256 * K else None, note="bytes"))  # fmt: skip
    return rows


def in_turn(runs: list[Callable[[], Tensor]]) -> dict[str, float]:
    """Seconds a layer, of layers that follow each other as in a model, each with a cache of its own."""
    return measure_in_turn(runs) if GPU else measure(runs[0])


def _heads(key: Tensor, value: Tensor, bits: int) -> CachedHeads:
    lengths = torch.full((key.shape[0],), key.shape[2] if key.shape[1] else 0, dtype=torch.int32, device=key.device)
    key, value = key.contiguous(), value.contiguous()
    if bits == 16:
        return CachedHeads(key, value, lengths)
    (k, k_scale, k_zero), (v, v_scale, v_zero) = (kv_quantize(tensor, bits=bits) for tensor in (key, value))
    return CachedHeads(k, v, lengths, None, None, k_scale, k_zero, v_scale, v_zero)


def fastest(layers: list[list[Tensor]]) -> dict[str, float]:
    """Full attention of one token by the faster of PyTorch and FlashAttention 3."""
    kernels = [full_attention, *filter(None, [flash_attention_3()])]
    times = [in_turn([functools.partial(kernel, *layer) for layer in layers]) for kernel in kernels]
    return min(times, key=lambda time: time["p50"])


def full_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def flash_attention_3() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """vLLM's, None where it is not installed."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        ends = [_ends(tensor.shape[0], q.device) for tensor in (q, k)]
        out = flash_attn_varlen_func(
            q, k, v, max_seqlen_q=q.shape[0], cu_seqlens_q=ends[0], max_seqlen_k=k.shape[0], cu_seqlens_k=ends[1],
            fa_version=3, causal=q.shape[0] > 1,
        )  # fmt: skip
        return out.transpose(0, 1)[None]

    return run


@functools.cache
def _ends(tokens: int, where: torch.device) -> Tensor:
    """Where a sequence begins and ends; made before a graph is captured, which cannot copy from the CPU."""
    return torch.tensor([0, tokens], dtype=torch.int32, device=where)


def model_of(name: str, weight_bits: int = 16, layers: int | None = None) -> Any:
    """Random weights, one layer's for all of them where they have 16 bits."""
    shape = SHAPES[name] if GPU else {**SHAPES[name], **TINY, "head_dim": 16}
    config = LlamaConfig(**shape, max_position_embeddings=1 << 20, rope_theta=500000.0)
    layers, config.num_hidden_layers = layers or config.num_hidden_layers, 1
    with device():
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    config.num_hidden_layers = layers
    first = model.model.layers[0]
    parameters = dict(first.named_parameters())
    for index in range(1, layers):
        with torch.device("meta"):
            layer = type(first)(config, index)
        for path, parameter in parameters.items():
            owner, _, leaf = path.rpartition(".")
            setattr(layer.get_submodule(owner), leaf, parameter)
        model.model.layers.append(layer.eval())
    if weight_bits == 16:
        FusedOperations(model)
    else:
        quantize_model(model, AwqConfig(group_size=GROUP_SIZE, method="rtn"), progress=False)
        fuse(model)
    return model


def fill(cache: Cache, model: Any, context: int) -> None:
    """Random keys and values of a whole context."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    none = torch.empty(1, config.num_key_value_heads, 0, size, dtype=DTYPE, device=device())
    for layer in cache.layers:
        layer.lazy_initialization(none, none)
        tensors = [layer.keys, layer.values] if isinstance(layer, FullLayer) else [*layer.full, *layer.streaming]
        for tensor in tensors:
            tensor.random_() if tensor.dtype == torch.uint8 else tensor.normal_()
        if not isinstance(layer, FullLayer):
            layer.lengths.fill_(context)
            layer.written.fill_(context)
            layer.started = True


def step_time(model: Any, cache: Cache, context: int) -> dict[str, float]:
    """A decoding step as a CUDA graph; full attention writes its token to the same place again and again."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=device())
    place = torch.full((1, 1), context, device=device())

    def step() -> Tensor:
        return model(ids, past_key_values=cache, position_ids=place, use_cache=True).logits

    def rewind() -> None:
        for layer in cache.layers:
            if not isinstance(layer, FullLayer):
                layer.lengths.fill_(context)
                layer.written.fill_(context)

    with torch.no_grad():
        if not GPU:
            return measure(step, repeats=STEPS, warmup=1)
        for layer in cache.layers:
            layer._counted = -(1 << 30)  # steps are rewound, and replayed
        step()
        replay = captured(step)
        rewind()
        return measure(replay, repeats=STEPS, graphed=False)


def step_rows(name: str, weight_bits: int) -> list[dict[str, Any]]:
    """Whole models."""
    model, rows = model_of(name, weight_bits), []
    about = f"{name}, {weight_bits}-bit weights, {SPARSITY[name]:.0%} streaming"
    config = DuoAttentionConfig.from_pattern(PATTERNS[name], sparsity=SPARSITY[name], sink_size=128, recent_size=256)
    for context in STEP_CONTEXTS[name] if GPU else [600]:
        full, full_bytes = full_step(model, context)
        duo = apply_duo(model, config)
        for bits in (16, 4):
            duo.config.kv_bits = bits
            cache = duo.make_cache(static=True, max_len=context + ROOM)
            fill(cache, model, context)
            ours = step_time(model, cache, context)
            size = cache_bytes(cache)
            what, peer = f"{about}, {bits}-bit cache", "full attention, 16-bit cache"
            reach = REACH.get((name, context)) if bits == 16 else None
            if full is not None:
                rows.append(row(f"decoding, {what}", peer, f"{context} tokens", ours, full, reach=reach))
            rows.append(row(f"cache, {what}", peer, f"{context} tokens", median([size / 2**20]),
                            median([full_bytes / 2**20]), unit="MiB",
                            reach=LEAST_MEMORY[name] if bits == 16 and context >= 64 * K else None))  # fmt: skip
            del cache
            free()
    return rows


def full_step(model: Any, context: int) -> tuple[dict[str, float] | None, int]:
    """The best of both ways of full attention; None where its cache does not fit."""
    config = model.config
    best, size = None, 0
    for name in ("sdpa", "flash_attention_3"):
        flash = flash_attention_3()
        if name != "sdpa" and flash is None:
            continue
        AttentionInterface.register("bench_full", _attention(full_attention if name == "sdpa" else flash))
        model.set_attn_implementation("bench_full")
        cache = Cache(layers=[FullLayer(context) for _ in range(config.num_hidden_layers)])
        try:
            fill(cache, model, context)
            size = cache_bytes(cache)
            found = step_time(model, cache, context)
        except torch.OutOfMemoryError:
            found = None
        if found is not None and (best is None or found["p50"] < best["p50"]):
            best = found
        del cache
        free()
    of_heads = DuoAttentionConfig()
    return best, size or plan(config, of_heads, context=context).full_bytes


def _attention(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        return function(query, key, value).transpose(1, 2), None

    return attend


def prompt_rows() -> list[dict[str, Any]]:
    """A long prompt in chunks, by a quarter of the layers: all take the same time."""
    name = "Llama-3-8B"
    model, rows = model_of(name, layers=PROMPT_LAYERS), []
    ids = torch.randint(100, (1, PROMPT), device=device())

    def read(make: Callable[[], Cache]) -> dict[str, float]:
        def run(tokens: int) -> None:
            cache = make()
            for part in ids[:, :tokens].split(CHUNK, dim=1):
                model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)

        with torch.no_grad():
            run(2 * CHUNK)
            return measure(lambda: run(PROMPT), repeats=3, warmup=0, graphed=False)

    model.set_attn_implementation("sdpa")
    dense = apply_duo(model, DuoAttentionConfig())
    full = read(lambda: dense.make_cache(static=True, max_len=PROMPT))
    for prefill in ("dense_first", "streaming"):
        sizes = {"sink_size": 128, "recent_size": 256, "sparsity": 0.5}
        config = DuoAttentionConfig.from_pattern(PATTERNS[name], prefill=prefill, **sizes)
        config.gates = (config.gates or [])[::4]
        duo = apply_duo(model, config, reorder=True)
        ours = read(lambda: duo.make_cache(static=True, max_len=PROMPT))  # noqa: B023
        shape = f"{PROMPT} tokens in chunks of {CHUNK}, {PROMPT_LAYERS} layers"
        what = f"reading a prompt, {name}, 50% streaming, {prefill}"
        rows.append(row(what, "full attention", shape, ours, full, reach=1.6))
        free()
    return rows


def largest_rows() -> list[dict[str, Any]]:
    """The largest context that decodes on this GPU, with and without, beside weights as large as they would be."""
    name, rows = "Llama-3-8B", []
    if not GPU:
        return rows
    model = model_of(name)
    config = DuoAttentionConfig.from_pattern(PATTERNS[name], sparsity=0.5, sink_size=128, recent_size=256, kv_bits=4)
    free_bytes = torch.cuda.mem_get_info()[0]
    for weight_bits, weights in PARAMETER_BYTES.items():
        budget = int(free_bytes - weights - 2 * 2**30)  # some is left to compute with
        largest = plan(model.config, config, context=1, budget_bytes=budget).largest_context
        dense = plan(model.config, DuoAttentionConfig(), context=1, budget_bytes=budget).largest_context
        cache = apply_duo(model, config).make_cache(static=True, max_len=largest)
        fill(cache, model, largest - ROOM)
        found = step_time(model, cache, largest - ROOM)
        rows.append(row(f"largest context, {name}, {weight_bits}-bit weights, 50% streaming, 4-bit cache",
                        "full attention, 16-bit cache", f"{budget >> 30} GiB", median([largest]), median([dense]),
                        unit="tokens", higher_is_better=True,
                        note=f"decoded at {found['p50'] * 1e3:.1f} ms a token"))  # fmt: skip
        del cache
        free()
    return rows


def free() -> None:
    """Give back the memory of what is gone."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
