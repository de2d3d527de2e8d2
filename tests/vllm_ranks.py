"""vLLM over several processes that share a model (tensor parallelism), as its users have it: outside of this one."""

import json
import os
import subprocess
import sys
from pathlib import Path


def tokens_of_ranks(folder, prompts, tokens, ranks, **options):
    """Greedy tokens of each prompt, from an engine whose model `ranks` processes share, on CPUs."""
    job = {"prompts": prompts, "tokens": tokens, "options": {"tensor_parallel_size": ranks, **options}}
    cores = "|".join(map(str, sorted(os.sched_getaffinity(0))[:ranks]))
    env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    answer = Path(folder) / "answer.json"
    command = [sys.executable, __file__, str(folder), json.dumps(job), str(answer)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(answer.read_text())


def main(folder, job, answer):
    """The other process."""
    import vllm

    job = json.loads(job)
    llm = vllm.LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **job["options"])
    sampling = vllm.SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling, use_tqdm=False)
    Path(answer).write_text(json.dumps([list(one.outputs[0].token_ids) for one in found]))


if __name__ == "__main__":  # workers import this file again
    main(*sys.argv[1:])
