"""vLLM over two GPUs with `pronghorn_awq`: greedy tokens against one GPU's; needs two GPUs.

The model is small and random. Its output layer looks for the embedding of a token's successor, of a size at which the
best next token stands out from roundings, which differ between one GPU and two, but not from a wrong layer: on a CPU,
rounding the weights to bfloat16 changed none of 192 tokens, leaving out a rank's half of one layer's linear every
tenth. Engines run side by side: nothing is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from harness import median, prepare_vllm, row, write

NEEDS = ("cuda:2",)

SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 512,
}  # fmt: skip
FORMATS = [("gemm", 4), ("natural", 3)]
PROMPTS, PROMPT, NEW_TOKENS = 8, 40, 64


def checkpoint(folder: Path, version: str, bits: int) -> None:
    """A quantized model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    import pronghorn.transformers  # noqa: F401 - registers the quantizer
    from pronghorn.awq import AwqConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.float16).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    embedding = torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.4)
    model.get_output_embeddings().weight.data.copy_(embedding[torch.randperm(len(embedding))])
    model.save_pretrained(folder / "whole")
    config = AwqConfig(group_size=128, method="rtn", version=version, bits=bits)
    model = AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.float16, quantization_config=config)
    model.save_pretrained(folder / "quantized")


def tokens_of(folder: str, ranks: int) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    prepare_vllm()
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, quantization="pronghorn_awq", dtype="float16", tensor_parallel_size=ranks, skip_tokenizer_init=True,
        max_model_len=256, gpu_memory_utilization=0.1, kv_cache_memory_bytes=1 << 30, enforce_eager=True,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [(37 * i + 11 * j) % 4000 + 3 for j in range(PROMPT)]} for i in range(PROMPTS)]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, sampling, use_tqdm=False)]


def _answer(folder: Path, ranks: int) -> list[list[int]]:
    answer = folder / f"{ranks}.json"
    subprocess.run([sys.executable, __file__, f"{folder}/quantized", str(ranks), str(answer)], check=True)
    tokens: list[list[int]] = json.loads(answer.read_text())
    return tokens


def main() -> None:
    """Compare and write the results."""
    rows = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as pool:
        folders = {kind: Path(name) / f"{kind[0]}-{kind[1]}" for kind in FORMATS}
        for kind, folder in folders.items():
            checkpoint(folder, *kind)
        answers = {kind: pool.map(_answer, [folder] * 2, (1, 2)) for kind, folder in folders.items()}
        compared = {kind: list(found) for kind, found in answers.items()}
    for (version, bits), found in compared.items():
        pairs = [one == other for a, b in zip(*found, strict=True) for one, other in zip(a, b, strict=True)]
        rows.append(row(f"vLLM over 2 GPUs, {version}, {bits} bits: tokens of one GPU", "all tokens",
                        f"{PROMPTS} prompts x {NEW_TOKENS} tokens", median([sum(pairs)]), median([len(pairs)]),
                        unit="tokens", reach=1.0, higher_is_better=True))  # fmt: skip
    write("awq-tensor-parallel", rows)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        Path(sys.argv[3]).write_text(json.dumps(tokens_of(sys.argv[1], int(sys.argv[2]))))
    elif torch.cuda.device_count() < 2:
        sys.exit("awq_tensor_parallel needs two GPUs")
    else:
        main()
