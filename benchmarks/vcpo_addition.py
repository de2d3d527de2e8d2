"""Sums answered in strokes, learnt from random weights with rollouts that are 0, 8 and 32 updates old, by four methods.

All are `VCPOTrainer`: truncated ratios of sequences alone, with the learning rate's scaling, with the baseline, with
both. The learning rate is one at which synchronous training learns, and old rollouts hurt. `make demo` runs it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "vcpo"
DATA, MODEL, REWARDS = EXAMPLE / "addition.jsonl", EXAMPLE / "model", EXAMPLE / "rewards.py"
METHODS: dict[str, dict[str, str]] = {
    "TIS": {"opob": "off", "ess_scaling": "off"}, "TIS + ESS": {"opob": "off"}, "TIS + OPOB": {"ess_scaling": "off"},
    "VCPO": {},
}  # fmt: skip
LAGS, SEEDS = (0, 8, 32), (0, 1, 2)
STEPS, LAST = 240, 24
LEARNING_RATE = 1.5e-3
GOAL = 0.5
GROUPS, SIZE, LONGEST = 8, 8, 10


def trained(case: tuple[str, int, int, int, float]) -> dict[str, list[float]]:
    """Rewards and effective samples of every update of one run."""
    method, lag, seed, steps, rate = case
    import torch
    import transformers
    from datasets import Dataset, disable_progress_bars

    from pronghorn.vcpo import VCPOConfig, VCPOTrainer
    from pronghorn.vcpo.records import read_run
    from pronghorn.vcpo.trl.script import load_function

    torch.set_num_threads(1)
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_config(config)
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    reward = load_function(f"{REWARDS}:strokes")
    with tempfile.TemporaryDirectory() as folder:
        args = VCPOConfig(
            folder, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", seed=seed,
            num_generations=SIZE, per_device_train_batch_size=GROUPS * SIZE, max_completion_length=LONGEST,
            max_steps=steps, learning_rate=rate, lr_scheduler_type="constant", logging_strategy="no",
            gradient_checkpointing=False,
            opob_grad_norm="ghost", lag=lag, **METHODS[method],
        )  # fmt: skip
        tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
        VCPOTrainer(model, reward, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
        run = read_run(folder)
        return {name: run.steps[name].tolist() for name in ("reward", "ess_ratio", "grad_norm")}


def main() -> None:
    """Train all, write the results and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    cases = [
        (method, lag, seed, asked.steps, asked.learning_rate) for lag in LAGS for method in METHODS for seed in SEEDS
    ]
    found: dict[tuple[str, int], list[dict[str, list[float]]]] = {}
    with ProcessPoolExecutor(asked.workers, get_context("spawn")) as pool:
        for case, run in zip(cases, pool.map(trained, cases), strict=True):
            found.setdefault(case[:2], []).append(run)
            last = run["reward"][-LAST:]
            sys.stdout.write(f"lag {case[1]:2}, seed {case[2]}, {case[0]:10}: reward {sum(last) / len(last):.3f}\n")
            sys.stdout.flush()
    _write(found, asked)
    _draw(found, asked)


def _last(runs: list[dict[str, list[float]]]) -> dict[str, float]:
    """Over seeds: the worst, the middle and the best mean of the last updates."""
    means = sorted(sum(run["reward"][-LAST:]) / len(run["reward"][-LAST:]) for run in runs)
    return {"p20": means[0], "p50": means[len(means) // 2], "p80": means[-1]}


def _until(runs: list[dict[str, list[float]]]) -> dict[str, float]:
    """Over seeds: the least, the middle and the most updates until ten in a row have this reward on average."""
    counts = []
    for run in runs:
        means = [sum(run["reward"][place : place + 10]) / 10 for place in range(len(run["reward"]) - 9)]
        counts.append(float(next((place + 10 for place, mean in enumerate(means) if mean >= GOAL), len(run["reward"]))))
    counts.sort()
    return {"p20": counts[0], "p50": counts[len(counts) // 2], "p80": counts[-1]}


def _write(found: dict[tuple[str, int], list[dict[str, list[float]]]], asked: argparse.Namespace) -> None:
    from harness import row, write

    shape = f"{asked.steps} updates of {GROUPS} x {SIZE}, {len(SEEDS)} seeds"
    rows = []
    for lag in LAGS:
        for method in METHODS:
            reach = 0.9 if (method, lag) == ("VCPO", LAGS[-1]) else None
            rows.append(row(f"reward, {method}, lag {lag}", "TIS, lag 0", shape, _last(found[method, lag]),
                            _last(found["TIS", 0]), unit="reward", higher_is_better=True, reach=reach))  # fmt: skip
    for lag in LAGS:
        for method in METHODS:
            rows.append(row(f"updates to reward {GOAL}, {method}, lag {lag}", "TIS, lag 0", shape,
                            _until(found[method, lag]), _until(found["TIS", 0]), unit="updates",
                            note="runs that do not get there count as all of their updates"))  # fmt: skip
    write("vcpo_addition", rows)


def _draw(found: dict[tuple[str, int], list[dict[str, list[float]]]], asked: argparse.Namespace) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from harness import picture_folder

    figure, axes = plt.subplots(2, len(LAGS), figsize=(12, 6), sharex=True, sharey="row", layout="constrained")
    smooth = np.ones(10) / 10
    for column, lag in enumerate(LAGS):
        for number, method in enumerate(METHODS):
            for line, name in enumerate(("reward", "ess_ratio")):
                curves = np.array([np.convolve(run[name], smooth, "valid") for run in found[method, lag]])
                steps = np.arange(curves.shape[1]) + len(smooth)
                axes[line, column].plot(steps, np.median(curves, axis=0), color=f"C{number}", label=method)
                axes[line, column].fill_between(steps, curves.min(0), curves.max(0), color=f"C{number}", alpha=0.15)
        axes[0, column].set_title("synchronous" if not lag else f"rollouts {lag} updates old")
        axes[1, column].set_xlabel("update")
    axes[0, 0].set_ylabel("reward")
    axes[1, 0].set_ylabel("effective samples / samples")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(
        f"Sums answered in strokes, learning rate {asked.learning_rate:g}: middle and range of {len(SEEDS)} seeds"
    )
    figure.savefig(picture_folder() / "vcpo_addition.png", dpi=100)


if __name__ == "__main__":
    main()
