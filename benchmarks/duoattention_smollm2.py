"""The figures of `make demo` (build/demo/duoattention.json) as a results file: learned heads against random ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from harness import median, row, write

SOURCE = Path("build/demo/duoattention.json")


def main() -> None:
    """Write the results."""
    if not SOURCE.exists():
        sys.exit(f"{SOURCE} is not there: run `make demo` first")
    content = json.loads(SOURCE.read_text())
    found = {(entry["pattern"], entry["sparsity"]): entry for entry in content["rows"]}
    rows = []
    for name, sparsity in (("learned", 0.5), ("scored", 0.5)):
        ours = found[name, sparsity]
        shape = f"{ours['tokens']:.0f} tokens, {sparsity:.0%} streaming"
        drawn = found["random", 0.5]["each"]
        codes = median([entry["right"] for entry in drawn])
        rows.append(
            row(f"pass codes of {content['codes']}, {name} heads", "random heads", shape, median([ours["right"]]),
                codes, unit="codes", higher_is_better=True)
        )  # fmt: skip
        for other in ("random", "inverted"):
            theirs = median([entry["kl"] for entry in found[other, 0.5]["each"]])
            what = f"divergence from the dense model, {name} heads"
            rows.append(row(what, f"{other} heads", shape, median([ours["kl"]]), theirs, unit="nats"))
        rows.append(
            row(f"cache, {name} heads", "all full", shape, median([ours["bytes"] / 2**20]),
                median([found["all full", 0.0]["bytes"] / 2**20]), unit="MiB")
        )  # fmt: skip
    write("duoattention_smollm2", rows)


if __name__ == "__main__":
    main()
