"""Bad arguments are refused by name, and the backend is chosen as documented."""

import logging

import pytest
import torch

from pronghorn.kernels import _dispatch
from pronghorn.kernels.dequantize_weight import dequantize_weight
from pronghorn.kernels.dequantize_weight.layouts import pack
from pronghorn.kernels.group_clip_search import group_clip_search
from pronghorn.kernels.group_fake_quantize import group_fake_quantize, group_quantize
from pronghorn.kernels.w4a16_matmul import w4a16_matmul

N, K, GROUP = 8, 64, 32


def packed(**changes):
    codes = torch.zeros(N, K, dtype=torch.uint8)
    tensors = pack(codes, torch.ones(N, 2), torch.zeros(N, 2).byte(), layout="gemm", bits=4, group_size=GROUP)
    return {**tensors, "layout": "gemm", "bits": 4, "group_size": GROUP, "out_features": N, **changes}


BAD_PACKED = [
    ({"layout": "awful"}, ValueError, "layout"),
    ({"bits": 5}, ValueError, "bits"),
    ({"bits": 3}, ValueError, "holds 4 bits"),
    ({"group_size": 48}, ValueError, "group_size"),
    ({"group_size": 0}, ValueError, "group_size"),
    ({"out_features": 12}, ValueError, "out_features"),
    ({"out_features": 16}, ValueError, "qweight"),
    ({"qweight": torch.zeros(K, 1, dtype=torch.int64)}, TypeError, "qweight"),
    ({"qweight": torch.zeros(K, 1)}, TypeError, "qweight"),
    ({"scales": torch.ones(3, N)}, ValueError, "scales"),
    ({"scales": torch.ones(2, N).int()}, TypeError, "scales"),
    ({"scales": torch.ones(2, N, device="meta")}, ValueError, "scales"),
    ({"qzeros": None}, ValueError, "qzeros"),
    ({"qweight": torch.zeros(K, 1, dtype=torch.int32).to_sparse()}, ValueError, "qweight"),
]


@pytest.mark.fault(4)
@pytest.mark.parametrize(("changes", "kind", "named"), BAD_PACKED)
def test_bad_packed_weights(changes, kind, named):
    with pytest.raises(kind, match=named):
        w4a16_matmul(torch.ones(2, K), **packed(**changes))
    with pytest.raises(kind, match=named):
        dequantize_weight(**packed(**changes), in_features=K)


@pytest.mark.fault(4)
@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (torch.ones(2, K).int(), TypeError),
        (torch.ones(2, K, device="meta"), ValueError),
        (torch.tensor(1.0), ValueError),
        ([1.0], TypeError),
    ],
)
def test_bad_inputs(x, kind):
    with pytest.raises(kind, match=r"x:|qweight:"):
        w4a16_matmul(x, **packed())


def test_bad_bias():
    with pytest.raises(ValueError, match="bias"):
        w4a16_matmul(torch.ones(2, K), **packed(), bias=torch.ones(N + 1))


@pytest.mark.parametrize(
    ("weight", "how", "kind", "named"),
    [
        (torch.ones(4, 10), {"bits": 4, "group_size": 4}, ValueError, "group_size"),
        (torch.ones(4, 10), {"bits": 1, "group_size": 5}, ValueError, "bits"),
        (torch.ones(4), {"bits": 4, "group_size": 4}, ValueError, "weight"),
        (torch.ones(4, 8).int(), {"bits": 4, "group_size": 4}, TypeError, "weight"),
    ],
)
def test_bad_weights(weight, how, kind, named):
    for function in (group_fake_quantize, group_quantize):
        with pytest.raises(kind, match=named):
            function(weight, **how)


@pytest.mark.parametrize("inputs", [torch.ones(0, 8), torch.ones(3, 9), torch.ones(3, 8, device="meta")])
def test_bad_clip_inputs(inputs):
    with pytest.raises(ValueError, match="inputs"):
        group_clip_search(torch.ones(4, 8), inputs, bits=4, group_size=4)


def test_codes_and_zero_points_that_do_not_fit():
    with pytest.raises(ValueError, match="codes"):
        pack(torch.full((8, 8), 16).byte(), torch.ones(8, 1), torch.zeros(8, 1), layout="gemm", bits=4, group_size=8)
    with pytest.raises(ValueError, match="symmetric"):
        pack(torch.zeros(64, 16).byte(), torch.ones(64, 1), torch.ones(64, 1), layout="marlin", bits=4, group_size=16)


@pytest.mark.fault(22)
def test_the_variable_chooses_the_backend(monkeypatch, caplog):
    monkeypatch.setenv(_dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="PRONGHORN_KERNELS"):
        group_fake_quantize(torch.ones(2, 8), bits=4, group_size=8)
    monkeypatch.setenv(_dispatch.VARIABLE, "reference")
    assert not _dispatch.use_triton("any", torch.ones(1))
    monkeypatch.setenv(_dispatch.VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with caplog.at_level(logging.WARNING):
        assert not _dispatch.use_triton("an operation", torch.ones(1))
        assert not _dispatch.use_triton("an operation", torch.ones(1))
    assert [record.message for record in caplog.records] == [
        "an operation runs its reference implementation: the tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    ]
