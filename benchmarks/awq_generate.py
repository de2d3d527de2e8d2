"""`generate` at batch 1 with Llama-3-8B's shapes and random weights: 4 bits fused against fp16 as users run it.

Peers: transformers as it is, and with a static cache, for which it compiles the decoding step. `--compiled` lets
`torch.compile` work below our CUDA graphs too.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from harness import device, median, row, write
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from pronghorn.awq import AwqConfig, fuse, quantize_model
from pronghorn.awq.bench import context_speeds, follow_up_speeds

LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 8192,
}  # fmt: skip
CONTEXTS, HISTORIES, NEW_TOKENS, REPEATS = [512, 2048, 4096], [16, 256, 1024], 64, 3
REACH = {"fp16": 3.0, "fp16, static cache, compiled": 1.5}


def main() -> None:
    """Measure and write the results."""
    where = device()
    on_gpu = where.type == "cuda"
    dtype = torch.float16 if on_gpu else torch.float32
    contexts, histories = (CONTEXTS, HISTORIES) if on_gpu else ([8, 16], [32])
    torch.manual_seed(0)
    with where:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**(LLAMA_3_8B if on_gpu else TINY)), dtype=dtype).eval()
    peers = {"fp16": _contexts(model, contexts)}
    kept = _follow_ups(model, histories)
    if on_gpu:
        model.generation_config.cache_implementation = "static"
        peers["fp16, static cache, compiled"] = _contexts(model, contexts)
        model.generation_config.cache_implementation = None
        torch._dynamo.reset()
    quantize_model(model, AwqConfig(group_size=128, method="rtn"), progress=False)
    rows = []
    for compiled, suffix in ((False, ""), (True, ", compiled"))[: 2 if "--compiled" in sys.argv else 1]:
        with fuse(model, compile=compiled):
            ours, follow_ups = _contexts(model, contexts), _follow_ups(model, histories)
        for name, theirs in peers.items():
            for context in contexts:
                (first, speed), (their_first, their_speed) = ours[context], theirs[context]
                rows.append(row(f"generate, batch 1{suffix}", name, f"{context} in, {NEW_TOKENS} out", speed,
                                their_speed, unit="tokens/s", reach=REACH[name], higher_is_better=True))  # fmt: skip
                rows.append(
                    row(f"time to the first token{suffix}", name, f"{context} in", first, their_first, reach=1.0)
                )
        for history in histories:
            rows.append(row(f"time to the first token{suffix}", "fp16, recomputed", f"32 in after {history}",
                            follow_ups[history][0], kept[history][1],
                            reach=5.0 if history == 1024 else None))  # fmt: skip
    write("awq-generate", rows)


def _contexts(model: PreTrainedModel, contexts: list[int]) -> dict[int, tuple[Any, Any]]:
    speeds = context_speeds(model, contexts, new_tokens=NEW_TOKENS, repeats=REPEATS)
    result = {}
    for found in speeds:
        result[found.context] = median(found.first_token_seconds), median(found.tokens_per_second)
        sys.stdout.write(f"{found}\n")
        sys.stdout.flush()
    return result


def _follow_ups(model: PreTrainedModel, histories: list[int]) -> dict[int, tuple[Any, Any]]:
    speeds = follow_up_speeds(model, histories, repeats=REPEATS)
    return {found.history: (median(found.kept_seconds), median(found.recomputed_seconds)) for found in speeds}


if __name__ == "__main__":
    main()
