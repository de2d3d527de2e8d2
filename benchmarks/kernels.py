"""Every operation at its large size: its fastest kernel against its reference on this device, and the bandwidth."""

from __future__ import annotations

import os

import torch
from harness import device, measure, row, share_of_bandwidth, write

from pronghorn.kernels._operation import operations


def main() -> None:
    """Measure and write the results."""
    where = device()
    rows = []
    for operation in operations():
        knobs = operation.large if where.type == "cuda" else operation.shapes[0]
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        arguments = operation.example(knobs, dtype, torch.Generator().manual_seed(0), where)
        times = {}
        for backend in ("reference", "") if where.type == "cuda" else ("reference",):
            os.environ["PRONGHORN_KERNELS"] = backend
            times[backend] = measure(
                lambda operation=operation, arguments=arguments: operation.timed(**arguments), repeats=20,
                graphed=not backend,  # a reference may wait for the GPU
            )  # fmt: skip
        ours = times.get("", times["reference"])
        share = share_of_bandwidth(operation.cost(knobs).bytes, ours["p50"])
        shape = " ".join(f"{key}={value}" for key, value in knobs.items())
        rows.append(row(operation.name, "its reference", shape, ours, times["reference"], roofline=share, note="bytes"))
    write("kernels", rows)


if __name__ == "__main__":
    main()
