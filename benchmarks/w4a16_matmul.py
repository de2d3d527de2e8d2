"""w4a16_matmul on Llama-3-8B's linears against cuBLAS in fp16."""

from __future__ import annotations

import torch
from harness import device, measure, row, share_of_bandwidth, write

from pronghorn.kernels.dequantize_weight import dequantize_weight
from pronghorn.kernels.w4a16_matmul.cases import OPERATION

LINEARS = [(4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)]
ROWS = [1, 4, 16, 64, 256, 2048]
REACH = {1: 2.5, 2048: 0.9}  # bars of the issue that makes these kernels fast


def main() -> None:
    """Measure and write the results."""
    where = device()
    linears, counts = (LINEARS, ROWS) if where.type == "cuda" else ([(256, 512)], [1, 16])
    dtype = torch.float16 if where.type == "cuda" else torch.float32
    rows = []
    for n, k in linears:
        for m in counts:
            for bits in (4, 3) if m == 1 else (4,):
                knobs = {"m": m, "n": n, "k": k, "layout": "natural", "bits": bits, "group_size": 128}
                arguments = OPERATION.example(knobs, dtype, torch.Generator().manual_seed(0), where)
                packed = {key: value for key, value in arguments.items() if key != "x"}
                weight = dequantize_weight(**packed, in_features=k)
                x = arguments["x"]
                ours = measure(lambda arguments=arguments: OPERATION.function(**arguments))
                peer = "cuBLAS fp16" if where.type == "cuda" else "torch fp32"
                theirs = measure(lambda x=x, weight=weight: x @ weight.T)
                cost = OPERATION.cost(knobs)
                share = share_of_bandwidth(cost.bytes, ours["p50"]) if m <= 16 else None
                note = "bytes" if m <= 16 else "tensor cores and unpacking"
                what = f"w4a16_matmul, {bits} bits"
                rows.append(row(what, peer, f"M={m} N={n} K={k} g=128", ours, theirs,
                                reach=REACH.get(m) if bits == 4 else None, roofline=share, note=note))  # fmt: skip
    write("w4a16_matmul", rows)


if __name__ == "__main__":
    main()
