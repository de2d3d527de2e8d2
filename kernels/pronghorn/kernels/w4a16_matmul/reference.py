"""Definition of the matmul with a quantized weight: dequantize, then multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels._autocast import without_autocast
from pronghorn.kernels.dequantize_weight.reference import dequantize_weight


@without_autocast
def w4a16_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    layout: str,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """x [M, K] times the transposed weight, [M, N]; 16-bit inputs are multiplied in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize_weight(qweight, scales, qzeros, layout, bits, group_size, out_features, x.shape[1], wide)
    return (x.to(wide) @ weight.T).to(x.dtype)
