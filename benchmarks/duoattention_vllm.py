"""DuoAttention in vLLM: a small random model's greedy tokens against transformers', and speed against full attention.

Speed is that of Llama-3-8B's shapes with random weights and the published pattern of the 1048k model, half of each
layer's heads streaming. Each engine runs in a process of its own, with torch.compile and CUDA graphs as vLLM has them
by default. `speed` on the command line asks for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from awq_vllm import LLAMA_3_8B
from harness import median, prepare_vllm, row, write

NEEDS = ("cuda",)

PATTERN = "Llama-3-8B-Instruct-Gradient-1048k"
SIZES = {"sink_size": 64, "recent_size": 256}
DUO = {"pattern": PATTERN, "sparsity": 0.5, "balance": "per_layer", **SIZES}
STOCK, OURS = "full attention", "DuoAttention"
CONTEXT, NEW_TOKENS, REPEATS = 128 * 1024, 64, 3
MEMORY = 0.85  # of the GPU
SMALL = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 4096,
}  # fmt: skip
GATES = [[1.0, 0.0, 0.0, 1.0]] * 4


def serve(name: str) -> dict[str, Any]:
    """Tokens that fit, seconds to read a context, and tokens a second after it."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        config = {**LLAMA_3_8B, "max_position_embeddings": 1 << 20}
        if name == OURS:
            config["architectures"] = ["DuoAttentionLlamaForCausalLM"]
        (Path(folder) / "config.json").write_text(json.dumps(config))
        llm = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="float16", max_num_seqs=16,
            max_model_len=CONTEXT + 1024, max_num_batched_tokens=16384, gpu_memory_utilization=MEMORY,
            enable_prefix_caching=False, additional_config={"duoattention": DUO} if name == OURS else {},
        )  # fmt: skip
    cache = llm.llm_engine.vllm_config.cache_config
    prompt = [{"prompt_token_ids": [(7 * i) % 1000 for i in range(CONTEXT)]}]
    first, whole = (
        [_seconds(llm, prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False))
         for _ in range(REPEATS)]
        for tokens in (1, 1 + NEW_TOKENS)
    )  # fmt: skip
    fits = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    return {
        "first": first, "speeds": [NEW_TOKENS / (time_ - min(first)) for time_ in whole],
        "blocks": cache.num_gpu_blocks, "groups": len(fits.kv_cache_groups),
        "concurrency": getattr(fits, "max_concurrency", None),
    }  # fmt: skip


def _seconds(llm: Any, prompt: list[dict[str, list[int]]], sampling: Any) -> float:
    start = time.perf_counter()
    llm.generate(prompt, sampling, use_tqdm=False)
    return time.perf_counter() - start


def tokens(folder: str, eager: bool) -> dict[str, Any]:
    """Greedy tokens by vLLM and by transformers on the same GPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from vllm import LLM, SamplingParams

    import pronghorn.transformers  # noqa: F401 - registers the attention
    from pronghorn.duoattention import DuoAttentionConfig, apply_duo

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), dtype=torch.float16).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    settings = {"gates": GATES, "threshold": 0.5, "decode_window": "mask", **SIZES}
    prompts = [
        [(37 * i + 11 * j + j * j) % 4000 + 3 for j in range(length)] for i, length in enumerate((2000, 700, 90))
    ]
    duo = apply_duo(model.cuda(), DuoAttentionConfig(prefill="streaming", **settings))
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=duo.make_cache(), max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        wanted.append(found[0, len(prompt) :].tolist())
    del model
    torch.cuda.empty_cache()
    llm = LLM(
        folder, dtype="float16", skip_tokenizer_init=True, max_model_len=4096, max_num_batched_tokens=512,
        gpu_memory_utilization=0.1, kv_cache_memory_bytes=1 << 30, enforce_eager=eager,
        additional_config={"duoattention": settings},
        hf_overrides={"architectures": ["DuoAttentionLlamaForCausalLM"]},
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return {"ours": [list(answer.outputs[0].token_ids) for answer in answers], "theirs": wanted}


def main() -> None:
    """Measure and write the results."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:  # nothing is timed yet
        kinds = {"compiled, CUDA graphs": False, "eager": True}
        answers = pool.map(lambda eager: _answer("tokens", f"{folder}/{eager}", str(int(eager))), kinds.values())
        compared = dict(zip(kinds, answers, strict=True))
    for how, found in compared.items():
        pairs = [a == b for ours, theirs in zip(found["ours"], found["theirs"], strict=True)
                 for a, b in zip(ours, theirs, strict=True)]  # fmt: skip
        rows.append(row(f"vLLM, {how}: tokens of transformers", "all tokens",
                        f"3 prompts x {NEW_TOKENS} tokens", median([sum(pairs)]), median([len(pairs)]),
                        unit="tokens", reach=1.0, higher_is_better=True))  # fmt: skip
    if "speed" in sys.argv:
        ours, theirs = _answer(OURS), _answer(STOCK)
        shape = f"Llama-3-8B shapes, {CONTEXT} tokens"
        rows.append(row("vLLM, decoding, 50% streaming", STOCK, shape, median(ours["speeds"]), median(theirs["speeds"]),
                        unit="tokens/s", higher_is_better=True))  # fmt: skip
        rows.append(row("vLLM, reading the prompt, 50% streaming", STOCK, shape, median(ours["first"]),
                        median(theirs["first"])))  # fmt: skip
    write("duoattention-vllm", rows)


def _answer(*arguments: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        subprocess.run([sys.executable, __file__, answer.name, *arguments], check=True)
        found = json.loads(Path(answer.name).read_text())
    sys.stdout.write(f"{arguments[0]}: {str(found)[:1500]}\n")
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].endswith(".json"):
        file, kind, *rest = sys.argv[1:]
        prepare_vllm()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the cache's configuration is looked at
        result = tokens(rest[0], rest[1] == "1") if kind == "tokens" else serve(kind)
        Path(file).write_text(json.dumps(result))
    else:
        main()
