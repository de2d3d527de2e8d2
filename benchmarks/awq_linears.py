"""w4a16_matmul on Llama-3-8B's linears against cuBLAS in fp16 and vLLM's Marlin and Machete; needs a Hopper GPU.

Every run of a measurement has its own copy of the weight, so that weights come from memory and not from the L2 cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import measure_in_turn, row, share_of_bandwidth, write
from torch import Tensor

from pronghorn.kernels.dequantize_weight import dequantize_weight
from pronghorn.kernels.w4a16_matmul.cases import OPERATION

NEEDS = ("cuda",)

LINEARS = [(4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)]
ROWS = [1, 4, 16, 64, 256, 2048]
GROUP_SIZE = 128
BYTES_IN_TURN = 300e6
# Bars of issue 3; at M = 1 also against the roofline.
REACH = {
    "cuBLAS fp16": {1: 2.5, 2048: 0.9},
    "Marlin": {1: 1.0, 4: 0.95, 16: 0.95, 64: 0.95, 256: 0.95},
    "Machete": {1: 1.0, 4: 0.95, 16: 0.95, 64: 0.95, 256: 0.95},
}

Multiply = Callable[[Tensor], Any]


def main() -> None:
    """Measure and write the results."""
    rows = []
    for n, k in LINEARS:
        rows += _measured(ROWS, n, k, 4, torch.float16, ["cuBLAS fp16", "Marlin", "Machete"])
        for bits, dtype in ((3, torch.float16), (4, torch.bfloat16)):
            rows += _measured([1], n, k, bits, dtype, ["cuBLAS fp16"])
    write("awq-linears", rows)


def _measured(
    sizes: list[int], n: int, k: int, bits: int, dtype: torch.dtype, peers: list[str]
) -> Iterator[dict[str, Any]]:
    knobs = {"m": max(sizes), "n": n, "k": k, "layout": "fragments", "bits": bits, "group_size": GROUP_SIZE}
    arguments = OPERATION.example(knobs, dtype, torch.Generator().manual_seed(0), torch.device("cuda"))
    inputs = arguments.pop("x")
    for m in sizes:
        x = inputs[:m]
        ours = _in_turn(lambda: _ours(arguments), x, n * k * bits / 8)
        share = share_of_bandwidth(OPERATION.cost({**knobs, "m": m}).bytes, ours["p50"]) if m <= 16 else None
        for peer in peers:
            theirs = _in_turn(
                lambda peer=peer: PEERS[peer](arguments, dtype), x, n * k * (2 if peer == "cuBLAS fp16" else 0.5)
            )
            yield row(
                f"w4a16_matmul, {bits} bits, {str(dtype)[6:]}", peer, f"M={m} N={n} K={k} g={GROUP_SIZE}",
                ours, theirs, reach=REACH[peer].get(m) if bits == 4 else None, roofline=share,
                note="bytes" if m <= 16 else "tensor cores",
            )  # fmt: skip


def _in_turn(make: Callable[[], Multiply], x: Tensor, weight_bytes: float) -> dict[str, float]:
    copies = [make() for _ in range(max(4, int(BYTES_IN_TURN / weight_bytes)))]
    return measure_in_turn([lambda multiply=multiply: multiply(x) for multiply in copies])


def _ours(arguments: dict[str, Any]) -> Multiply:
    own = {**arguments, "qweight": arguments["qweight"].clone()}
    return lambda x: OPERATION.function(x=x, **own)


def _cublas(arguments: dict[str, Any], dtype: torch.dtype) -> Multiply:
    weight = dequantize_weight(**arguments, in_features=_columns(arguments), dtype=dtype)
    return lambda x: x @ weight.T


def _marlin(arguments: dict[str, Any], dtype: torch.dtype) -> Multiply:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    n, k = arguments["out_features"], _columns(arguments)
    packed = torch.randint(-(2**31), 2**31, (k, n // 8), dtype=torch.int32, device="cuda")
    weight = ops.awq_marlin_repack(packed, k, n, 4)
    scales = marlin_utils.marlin_permute_scales(_scales(n, k, dtype), k, n, GROUP_SIZE)
    zeros = torch.randint(-(2**31), 2**31, (k // GROUP_SIZE, n // 8), dtype=torch.int32, device="cuda")
    empty = torch.empty(0, dtype=torch.int32, device="cuda")
    workspace = marlin_utils.marlin_make_workspace_new(torch.device("cuda"))
    return lambda x: ops.marlin_gemm(
        x, None, weight, None, scales, None, None, zeros, empty, empty, workspace, scalar_types.uint4,
        x.shape[0], n, k, is_k_full=True, use_atomic_add=False, use_fp32_reduce=True, is_zp_float=False,
    )  # fmt: skip


def _machete(arguments: dict[str, Any], dtype: torch.dtype) -> Multiply:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    n, k = arguments["out_features"], _columns(arguments)
    packed = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32, device="cuda")
    kind = scalar_types.uint4
    weight = ops.machete_prepack_B(packed.t().contiguous().t(), a_type=dtype, b_type=kind, group_scales_type=dtype)
    scales = _scales(n, k, dtype)
    zeros = -8 * scales
    return lambda x: ops.machete_mm(
        a=x, b_q=weight, b_type=kind, b_group_scales=scales, b_group_zeros=zeros, b_group_size=GROUP_SIZE
    )


def _scales(n: int, k: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(k // GROUP_SIZE, n, device="cuda") * 0.01).to(dtype)


def _columns(arguments: dict[str, Any]) -> int:
    return int(arguments["qweight"].shape[1] * 2 // arguments["bits"])


PEERS: dict[str, Callable[[dict[str, Any], torch.dtype], Multiply]] = {
    "cuBLAS fp16": _cublas, "Marlin": _marlin, "Machete": _machete
}  # fmt: skip

if __name__ == "__main__":
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("awq_linears measures a Hopper GPU, and there is none")
    main()
