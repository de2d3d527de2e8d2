"""Latency of a policy, the overlap that it needs, and where its time goes."""

import time

import pytest
import torch
from torch import nn

from pronghorn.vlash.bench import Latency, measure, profile


class Chunker(nn.Module):
    """Most of its work is in `heavy.large`."""

    def __init__(self):
        super().__init__()
        self.light = nn.Linear(8, 8)
        self.heavy = nn.ModuleDict({"small": nn.Linear(8, 256), "large": nn.Linear(256, 256)})

    def forward(self, x):
        x = self.heavy["small"](self.light(x))
        for _ in range(6):
            x = self.heavy["large"](x)
        return x


def test_latency():
    calls = []

    def call():
        calls.append(torch.is_grad_enabled())
        time.sleep(0.02 if len(calls) > 2 else 0)

    found = measure(call, samples=4, warm_up=2)
    assert len(found.seconds) == 4
    assert calls == [False] * 6
    assert min(found.seconds) >= 0.02


def test_quantiles_and_overlap():
    found = Latency([0.01 * number for number in range(1, 21)])
    assert found.mean == pytest.approx(0.105)
    assert found.percentile(50) == pytest.approx(0.1)
    assert found.percentile(100) == pytest.approx(0.2)
    assert found.overlap(10, 32) == 2  # 95 % are there after 0.19 s
    assert found.overlap(30, 6) == 6
    assert found.overlap(30, 5) is None


@pytest.mark.parametrize(("samples", "warm_up"), [(0, 1), (1, -1)])
def test_bad_counts(samples, warm_up):
    with pytest.raises(ValueError, match="samples, warm_up"):
        measure(lambda: None, samples=samples, warm_up=warm_up)


def test_where_the_time_goes():
    module = Chunker()
    x = torch.randn(1024, 8)
    found = profile(lambda: module(x), module, samples=2)
    assert {part.name: part.calls for part in found.modules} == {"light": 1, "heavy.small": 1, "heavy.large": 6}
    assert found.modules[0].name == "heavy.large"
    assert {part.name: part.calls for part in found.operators}["aten::addmm"] == 8
    for parts in (found.modules, found.operators):
        assert [part.seconds for part in parts] == sorted((part.seconds for part in parts), reverse=True)
        assert 0.2 * found.seconds < sum(part.seconds for part in parts) <= found.seconds
    assert not module.light._forward_hooks
    assert not module.light._forward_pre_hooks


def test_depth():
    module = nn.Sequential(Chunker(), nn.Linear(256, 2))
    x = torch.randn(4, 8)
    names = [{part.name for part in profile(lambda: module(x), module, depth=depth).modules} for depth in (1, 2)]
    assert names == [{"0", "1"}, {"0", "1", "0.light"}]
    found = profile(lambda: module(x))
    assert found.modules == []
    assert found.operators


def test_a_module_that_fails_leaves_nothing_behind():
    module = Chunker()
    with pytest.raises(RuntimeError):
        profile(lambda: module(torch.randn(4, 9)), module)
    assert not module.light._forward_hooks
    with pytest.raises(ValueError, match="depth, samples"):
        profile(lambda: None, depth=0)
