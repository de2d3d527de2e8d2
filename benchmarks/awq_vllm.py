"""vLLM with a 4-bit Llama-3-8B of random weights: `pronghorn_awq` and vLLM's own AWQ, one after the other.

Each engine runs in a process of its own, with torch.compile and CUDA graphs as vLLM has them by default.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import prepare_vllm, row, write

NEEDS = ("cuda",)

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "torch_dtype": "float16",
    "bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
PEER = "vLLM's AWQ"
ENGINES = {PEER: "awq_marlin", "pronghorn_awq": "pronghorn_awq"}
WORKLOADS = {"1 x (32 in, 256 out)": (1, 32, 256), "64 x (1024 in, 256 out)": (64, 1024, 256)}
REPEATS = 3


def serve(quantization: str) -> dict[str, list[float]]:
    """Generated tokens a second of each workload, each repeat."""
    prepare_vllm()
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        config = {**LLAMA_3_8B, "quantization_config": AWQ}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        llm = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, quantization=quantization, dtype="float16",
            max_model_len=2048, gpu_memory_utilization=0.85, enable_prefix_caching=False, max_num_seqs=64,
        )  # fmt: skip
        measured: dict[str, list[float]] = {name: [] for name in WORKLOADS}
        for name, (batch, given, wanted) in WORKLOADS.items():
            sampling = SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True, detokenize=False)
            prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 for j in range(given)]} for i in range(batch)]
            llm.generate(prompts, sampling, use_tqdm=False)
            for _ in range(REPEATS):
                start = time.perf_counter()
                outputs = llm.generate(prompts, sampling, use_tqdm=False)
                taken = time.perf_counter() - start
                measured[name].append(sum(len(output.outputs[0].token_ids) for output in outputs) / taken)
    return measured


def main() -> None:
    """Measure and write the results."""
    speeds = {}
    for name in ENGINES:
        with tempfile.NamedTemporaryFile(suffix=".json") as answer:
            subprocess.run([sys.executable, __file__, name, answer.name], check=True)
            speeds[name] = json.loads(Path(answer.name).read_text())
        sys.stdout.write(f"{name}: {speeds[name]}\n")
    rows = []
    for workload in WORKLOADS:
        ours, theirs = (_quantiles(speeds[name][workload]) for name in ("pronghorn_awq", PEER))
        rows.append(row("vLLM, Llama-3-8B shapes", PEER, workload, ours, theirs, unit="tokens/s", reach=1.0,
                        higher_is_better=True))  # fmt: skip
    write("awq-vllm", rows)


def _quantiles(values: list[float]) -> dict[str, float]:
    low, middle, high = sorted(values)
    return {"p20": low, "p50": middle, "p80": high}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        Path(sys.argv[2]).write_text(json.dumps(serve(ENGINES[sys.argv[1]])))
    else:
        main()
