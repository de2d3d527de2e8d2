"""Draws `docs/assets/awq_linears.png` from the results: how close kernels come to the hardware's limit, by rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
from harness import BYTES_PER_SECOND

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "awq-linears-h100.json"
TARGET = ROOT / "docs" / "assets" / "awq_linears.png"
LINEARS = [(4096, 4096), (14336, 4096), (4096, 14336)]
FLOPS_PER_SECOND = 7.98e14  # the best that cuBLAS did in 16 bits on such a machine


def main() -> None:
    """Draw a panel for each linear."""
    content = json.loads(RESULTS.read_text())
    bandwidth = BYTES_PER_SECOND[content["device"]]
    figure, panels = plt.subplots(1, len(LINEARS), figsize=(13, 4), sharey=True)
    for panel, (n, k) in zip(panels, LINEARS, strict=True):
        curves: dict[str, dict[int, float]] = {}
        for row in content["rows"]:
            if f"N={n} K={k}" not in row["shape"] or row["what"] != "w4a16_matmul, 4 bits, float16":
                continue
            m = int(re.search(r"M=(\d+)", row["shape"])[1])
            floor = max(_bytes(m, n, k, 4.25) / bandwidth, 2 * m * n * k / FLOPS_PER_SECOND)
            curves.setdefault("pronghorn", {})[m] = 100 * floor / row["ours"]["p50"]
            curves.setdefault(row["against"], {})[m] = 100 * floor / row["theirs"]["p50"]
        for name, curve in curves.items():
            panel.plot(curve.keys(), curve.values(), marker="o", label=name, linewidth=2 if name == "pronghorn" else 1)
        panel.set(xscale="log", xlabel="rows of x", title=f"{n} x {k}", ylim=(0, 105))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("% of the limit for 4-bit weights")
    panels[-1].legend()
    figure.suptitle(f"{content['device']}, group 128, weights cold in L2, commit {content['commit'][:10]}")
    figure.tight_layout()
    figure.savefig(TARGET, dpi=100)


def _bytes(m: int, n: int, k: int, bits: float) -> float:
    return n * k * bits / 8 + 2 * m * (n + k)


if __name__ == "__main__":
    main()
