"""Every operation against its float64 oracle on this device, all shapes, dtypes and backends: errors as JSON."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from harness import device, slug, write

from pronghorn.kernels._operation import operations, relative_error


def main() -> None:
    """Check and write the errors; exit 1 if one is beyond its tolerance."""
    names = [operation.name for operation in operations()]
    # Nearly all of the time goes to compiling kernels, a process each.
    with ProcessPoolExecutor(min(len(names), os.cpu_count() or 1), get_context("spawn")) as pool:
        rows = [row for found in pool.map(checked, names) for row in found]
    write("correctness", rows)
    bad = [entry["what"] for entry in rows if not entry["ours"]["p50"] <= entry["theirs"]["p50"]]
    if bad:
        sys.exit(f"beyond tolerance on {slug()}: {bad}")


def checked(name: str) -> list[dict]:
    """The rows of one operation."""
    where = device()
    operation = next(found for found in operations() if found.name == name)
    rows = []
    for dtype, tolerance in operation.tolerance.items():
        for which in ("reference", "triton", "fastest") if where.type == "cuda" else ("reference",):
            os.environ["PRONGHORN_KERNELS"] = "" if which == "fastest" else which
            errors = {}
            for knobs in operation.shapes:
                arguments = operation.example(knobs, dtype, torch.Generator().manual_seed(0), where)
                errors[str(knobs)] = relative_error(operation.function(**arguments), operation.oracle(arguments))
            worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
            rows.append(_row(f"{name}, {which}, {dtype}", len(errors), worst, errors[worst], tolerance))
    return rows


def _row(what: str, count: int, worst: str, error: float, tolerance: float) -> dict:
    spread = ("p20", "p50", "p80")
    return {
        "what": what,
        "against": "float64 oracle",
        "shape": f"worst of {count}: {worst}",
        "unit": "relative error (theirs: tolerance)",
        "ours": dict.fromkeys(spread, error),
        "theirs": dict.fromkeys(spread, tolerance),
        "ratio": tolerance / error if error else None,
        "reach": None,
        "roofline": None,
        "note": "",
    }


if __name__ == "__main__":
    main()
