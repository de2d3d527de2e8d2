"""DuoAttention on a real model: SmolLM2-135M's retrieval heads, found by optimizing gates and by scores.

`make demo` runs it: some minutes on two cores. A pattern is worth something if the heads that it keeps full find what
was said long ago, and the same number of other heads does not. It leaves patterns, plots and the figures in build/demo.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

import pronghorn.transformers  # noqa: F401 - registers Pronghorn's methods
from pronghorn.duoattention import DuoAttentionConfig, MultiPasskeyDataset, apply_duo, find_heads, save_pattern
from pronghorn.duoattention.bench import cache_bytes
from pronghorn.duoattention.pass_codes import pass_codes, retrieved
from pronghorn.duoattention.plot import plot_gates
from pronghorn.duoattention.transformers.answer import Answer
from pronghorn.transformers.calibration_data import builtin_text

TRAINING = {"sink_size": 16, "recent_size": 32, "block_size": None}
DEPLOYED = {"sink_size": 16, "recent_size": 64}
DRAWS = 4  # of random patterns
CHUNK = 64  # tokens of a prompt read at once: the first chunk is dense, so it must not hold all of it
console = Console()


def main() -> None:
    """Find heads, compare patterns, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="of the optimization")
    parser.add_argument("--codes", type=int, default=6, help="prompts that ask for a pass code")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = MultiPasskeyDataset(
        tokenizer, [builtin_text("calibration")], context_length_min=120, context_length_max=400,
        context_lengths_num_intervals=40, num_passkeys=2, passkey_length=4, buffer_size=0,
    )  # fmt: skip

    console.rule("gates, by optimization")
    start = time.perf_counter()
    learned = find_heads(model, data, num_steps=arguments.steps, lr=0.05, gradient_checkpointing=False, **TRAINING)
    seconds = {"learned": time.perf_counter() - start}
    start = time.perf_counter()
    scored = find_heads(model, data, method="on_the_fly", samples=4, **TRAINING)
    seconds["scored"] = time.perf_counter() - start
    console.print(f"optimized in {seconds['learned']:.0f} s, scored in {seconds['scored']:.0f} s")
    for name, pattern in (("learned", learned), ("scored", scored)):
        save_pattern(pattern, arguments.out / f"duoattention-{name}")
        plot_gates(pattern.gates, arguments.out / f"duoattention-{name}.png")

    inverted = [[1 - gate for gate in row] for row in learned.gates]
    rows = []
    for name, sparsity, patterns in (
        ("all full", 0.0, [learned.gates]), ("learned", 0.5, [learned.gates]), ("learned", 0.7, [learned.gates]),
        ("scored", 0.5, [scored.gates]), ("random", 0.5, [random_gates(learned.gates, seed) for seed in range(DRAWS)]),
        ("inverted", 0.5, [inverted]), ("all streaming", 1.0, [learned.gates]),
    ):  # fmt: skip
        configs = [DuoAttentionConfig(gates=gates, sparsity=sparsity, **DEPLOYED) for gates in patterns]
        found = [measure(model, tokenizer, config, arguments.codes) for config in configs]
        means = {key: sum(entry[key] for entry in found) / len(found) for key in found[0]}
        rows.append({"pattern": name, "sparsity": sparsity, **means, "each": found})
        console.print(f"{name}, {sparsity:.0%}: {[(entry['right'], round(entry['kl'], 3)) for entry in found]}")
    show(rows, arguments.codes)
    report = {"seconds": seconds, "codes": arguments.codes, "rows": rows}
    (arguments.out / "duoattention.json").write_text(json.dumps(report, indent=1))
    found = {(row["pattern"], row["sparsity"]): row for row in rows}
    for name in ("random", "inverted"):
        for key, better in (("right", 1), ("kl", -1)):
            if better * (found["learned", 0.5][key] - found[name, 0.5][key]) <= 0:
                sys.exit(f"the learned pattern did not beat the {name} one in {key}")


def random_gates(gates: list[list[float]], seed: int) -> list[list[float]]:
    """A table of the same shape; a lucky draw holds the heads that matter, so that several are compared."""
    return torch.rand(len(gates), len(gates[0]), generator=torch.Generator().manual_seed(seed)).tolist()


def measure(model, tokenizer, config: DuoAttentionConfig, codes: int) -> dict:
    """Pass codes found, divergence from the dense model, bytes of the cache."""
    duo = apply_duo(model, config)
    cases = pass_codes(codes)
    right = retrieved(Answer(model, duo, prefill_chunk_size=CHUNK), tokenizer, cases)
    ids = torch.tensor([tokenizer.encode(cases[0].prompt + f" {cases[0].code}")])
    cache = duo.make_cache()
    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
        chunks = [model(chunk, past_key_values=cache).logits for chunk in ids.split(CHUNK, dim=1)]
    difference = torch.nn.functional.kl_div(
        torch.cat(chunks, dim=1).log_softmax(-1)[:, -5:], dense[:, -5:], log_target=True, reduction="sum"
    )
    return {"right": right, "kl": float(difference) / 5, "tokens": ids.shape[1], "bytes": cache_bytes(cache)}


def show(rows: list[dict], codes: int) -> None:
    """The table."""
    table = Table("heads kept full", "share that streams", f"codes of {codes}", "KL to dense, nats", "cache, KiB")
    for row in rows:
        table.add_row(
            row["pattern"],
            f"{row['sparsity']:.0%}",
            f"{row['right']:.3g}",
            f"{row['kl']:.3f}",
            f"{row['bytes'] / 1024:.0f}",
        )
    console.print(table)
    console.print(
        f"Prompts of about {rows[0]['tokens']:.0f} tokens; the code stands 60 sentences before the question.\n"
        f"Random: the mean of {DRAWS} patterns."
    )


if __name__ == "__main__":
    main()
