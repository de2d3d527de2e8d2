"""Codes of keys and values: both ways, and what they may not be."""

import pytest
import torch
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels.kv_quantize import kv_dequantize, kv_quantize

HALF_A_CODE = 0.5 + 1e-3


def random(*shape, dtype=torch.float16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_values_are_off_by_half_a_code_at_most(bits, dtype, which):
    x = random(2, 3, 7, 96, dtype=dtype)
    with backend(which):
        codes, scale, zero = kv_quantize(x, bits=bits, group_size=32)
        back = kv_dequantize(codes, scale, zero, bits=bits, dtype=torch.float32)
    assert (codes.shape[-1], codes.dtype) == (96 * bits // 8, torch.uint8)
    error = (back - x.float()).abs().unflatten(-1, (3, 32))
    rounding = 2**-10 * x.float().abs().max()  # of scale and zero to fp16
    assert (error <= HALF_A_CODE * scale.float()[..., None] + rounding).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_backends_agree_bit_by_bit(bits, dtype):
    x = random(5, 80, dtype=dtype)
    found = []
    for which in ("reference", "triton"):
        with backend(which):
            codes = kv_quantize(x, bits=bits)
            found.append([*codes, *(kv_dequantize(*codes, bits=bits, dtype=d) for d in (torch.float16, torch.float32))])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_equal_values_and_the_order_of_halves(which):
    with backend(which):
        codes, scale, zero = kv_quantize(torch.full((2, 16), 3.0, device=DEVICE), bits=4)
        assert torch.equal(kv_dequantize(codes, scale, zero, bits=4), torch.full((2, 16), 3.0, device=DEVICE).half())
        codes, _, _ = kv_quantize(torch.tensor([[15.0, 0, 1, 14]], device=DEVICE), bits=4)
        assert codes.tolist() == [[0xF0, 0x1E]]


def test_dequantizing_is_one_operation():
    codes = kv_quantize(random(2, 3, 16), bits=4)
    torch.library.opcheck(torch.ops.pronghorn.kv_dequantize, (*codes, 4, torch.float16))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"bits": 3}, "bits"), ({"bits": 4, "group_size": 5}, "group_size"), ({"bits": 8, "group_size": 0}, "group_size"),
])  # fmt: skip
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kv_quantize(random(2, 16), **arguments)
    with pytest.raises(ValueError, match="head_dim"):
        kv_quantize(random(2, 15), bits=4)
    with pytest.raises(TypeError, match="floating"):
        kv_quantize(torch.ones(2, 16, dtype=torch.int32), bits=4)
    codes, scale, zero = kv_quantize(random(2, 16), bits=4)
    with pytest.raises(ValueError, match="zero"):
        kv_dequantize(codes, scale, zero[:1], bits=4)
