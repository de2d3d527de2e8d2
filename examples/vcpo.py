"""Reinforcement learning from rollouts that are eight updates old: sums, answered in strokes by a small Llama."""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from datasets import Dataset

from pronghorn.vcpo import EarlyWarning, VCPOConfig, VCPOTrainer, read_run

HERE = Path(__file__).parent / "vcpo"


def strokes(completions, answer, **kwargs):
    """1 for as many strokes as the sum has, less for any other answer."""
    return [
        max(0.0, 1 - abs(text.count("1") - len(right)) / len(right) - 0.1 * len(text.replace("1", "")))
        for text, right in zip(completions, answer, strict=True)
    ]


def main():
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    rows = [json.loads(line) for line in (HERE / "addition.jsonl").read_text().splitlines()]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(HERE / "model"))
    with tempfile.TemporaryDirectory() as folder:
        args = VCPOConfig(
            folder, lag=8, opob_grad_norm="ghost", num_generations=8, per_device_train_batch_size=64, max_steps=40,
            max_completion_length=10, learning_rate=3e-3, lr_scheduler_type="constant", logging_strategy="no",
            use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = VCPOTrainer(
            model, strokes, args, train_dataset=Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(HERE / "model"),
        )  # fmt: skip
        trainer.add_callback(EarlyWarning(trainer.scaling, threshold=0.1))
        trainer.train()
        run = read_run(folder)

    reward, ess = run.steps["reward"], run.steps["ess_ratio"]
    print(f"rollouts up to {run.staleness.max()} updates old, effective samples {ess[8:].mean():.0%} of samples")
    print(f"reward {reward[:5].mean():.2f} -> {reward[-5:].mean():.2f}")


if __name__ == "__main__":
    main()
