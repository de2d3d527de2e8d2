"""The figures of `make demo` (build/demo/awq.json) as a results file: AWQ against rounding to nearest, by bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from harness import median, row, write

SOURCE = Path("build/demo/awq.json")


def main() -> None:
    """Write the results."""
    if not SOURCE.exists():
        sys.exit(f"{SOURCE} is not there: run `make demo` first")
    found = {(entry["method"], entry["bits"]): entry for entry in json.loads(SOURCE.read_text())["rows"]}
    rows = []
    original = found["fp16", 16]
    for bits in (4, 3):
        awq, rtn = found["AWQ", bits], found["RTN", bits]
        shape = f"{awq['tokens']} tokens, g=64"
        what = f"perplexity, {bits} bits"
        ours, theirs = median([awq["perplexity"]]), median([rtn["perplexity"]])
        rows.append(row(what, "round to nearest", shape, ours, theirs, unit="perplexity"))
        whole = median([original["perplexity"]])
        rows.append(row(what, "the fp16 model", shape, ours, whole, unit="perplexity"))
        size, original_size = median([awq["blocks_mib"]]), median([original["blocks_mib"]])
        rows.append(row(f"decoder blocks, {bits} bits", "fp16", "30 blocks", size, original_size, unit="MiB"))
    write("awq_smollm2", rows)


if __name__ == "__main__":
    main()
