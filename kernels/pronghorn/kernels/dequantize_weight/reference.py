"""Definition of weight dequantization: W = (code - zero_point) * scale, per group of input channels."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dequantize_weight import layouts


def dequantize_weight(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    layout: str,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K]; computed in float32 (float64 if `dtype` is), rounded once at the end."""
    codes = layouts.unpack_codes(qweight, layout=layout, bits=bits, out_features=out_features, in_features=in_features)
    tensors = {"scales": scales} if qzeros is None else {"scales": scales, "qzeros": qzeros}
    wide = torch.promote_types(dtype, torch.float32)
    if layouts.get_layout(layout).zero_points == "scaled":
        groups = in_features // group_size
        scale, shift = (tensors[name][:groups].T.to(wide) for name in ("scales", "qzeros"))
    else:
        scale, zeros = layouts.unpack_groups(
            tensors, layout=layout, bits=bits, out_features=out_features, groups=in_features // group_size
        )
        scale = scale.to(wide)
        shift = -scale * zeros
    # Codes of "natural" come as a transposed view; working on the transpose keeps the memory accesses in order.
    grouped = codes.T.unflatten(0, (-1, group_size)).to(wide)
    weight = torch.addcmul(shift.T[:, None], grouped, scale.T[:, None])
    return weight.flatten(0, 1).to(dtype).T
