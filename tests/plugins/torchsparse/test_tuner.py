"""The autotuner finds what is fastest, keeps it in a file, and never makes a model slower than its default."""

import json

import pytest
import torch
from torch import nn

import pronghorn.torchsparse as ts
from pronghorn.torchsparse import tuner


def tensor(seed=0):
    generator = torch.Generator().manual_seed(seed)
    coords = torch.randint(0, 8, (120, 4), generator=generator)
    coords[:, 0] = 0
    coords = coords.unique(dim=0).int()
    return ts.SparseTensor(torch.randn(len(coords), 4, generator=generator), coords, spatial_range=(1, 8, 8, 8))


def network():
    return nn.Sequential(
        ts.nn.Conv3d(4, 4, 3), ts.nn.Conv3d(4, 4, 3), ts.nn.Conv3d(4, 4, 1), ts.nn.Conv3d(4, 4, 2, stride=2),
        ts.nn.Conv3d(4, 4, 3), ts.nn.Conv3d(4, 4, 2, stride=2, transposed=True),
    )  # fmt: skip


GROUPS = {
    "stride=1x1x1 kernel=3x3x3 step=1x1x1 dilation=1x1x1": ["0", "1"],
    "stride=1x1x1 kernel=2x2x2 step=2x2x2 dilation=1x1x1": ["3", "5"],
    "stride=2x2x2 kernel=3x3x3 step=1x1x1 dilation=1x1x1": ["4"],
}


@pytest.fixture
def clock(monkeypatch):
    """Seconds are those of a rule, not of this machine."""
    rules = {"seconds": lambda config: (1.0, 0.0)}
    monkeypatch.setattr(tuner, "WARM_UP", 1)

    def timed(run, configs):
        tuner._set(run.model, configs)
        run._once(run.samples[0])  # it does compute
        spent = [rules["seconds"](config) for config in configs.values()]
        return [tuple(map(sum, zip(*spent, strict=True)))] * len(run.samples)

    monkeypatch.setattr(tuner._Run, "__call__", timed)
    return rules


def test_layers_that_share_a_map_are_a_group():
    found = tuner._groups(network(), tensor())
    assert {tuner._text(group): layers for group, layers in found.items()} == GROUPS


@pytest.mark.parametrize("dataflow", ["implicit_gemm", "fetch_on_demand", "gather_scatter"])
def test_the_fastest_is_found_and_kept(dataflow, clock, tmp_path):
    model, cache = network(), tmp_path / "tuned" / "found.json"
    best = next(c for c in reversed(tuner.candidates([dataflow], backward=False)) if c.dataflow == dataflow)
    clock["seconds"] = lambda config: (0.5 if config == best else 1.0, 0.0)
    wanted = model(tensor()).feats
    found = ts.tune(model, [tensor(0), tensor(1)], dataflow_range=[dataflow], cache=cache, verbose=False)
    assert found == dict.fromkeys(["0", "1", "3", "4", "5"], best)
    assert model[0].config == best
    assert model[2].config is None  # it has no map
    torch.testing.assert_close(model(tensor()).feats, wanted, rtol=1e-5, atol=1e-5)
    assert set(json.loads(cache.read_text())["plans"]["cpu, float32"]) == set(GROUPS)
    clock["seconds"] = lambda config: pytest.fail("tuned again")
    again = network()
    assert ts.tune(again, [tensor()], cache=cache, verbose=False) == found
    clock["seconds"] = lambda config: (1.0, 0.0)
    assert set(ts.tune(again, [tensor()], cache=cache, force_retune=True, verbose=False).values()) == {ts.ConvConfig()}


def test_a_fused_model_is_tuned_too(clock):
    model = nn.Sequential(ts.nn.Conv3d(4, 4, 3), ts.nn.BatchNorm(4), ts.nn.ReLU()).eval()
    outer = nn.Sequential(model)
    clock["seconds"] = lambda config: (0.5 if config.ifsort else 1.0, 0.0)
    with ts.fuse(outer), torch.no_grad():
        found = ts.tune(outer, [tensor()], verbose=False)
    assert list(found) == ["0.0.conv"]
    assert model[0].config.ifsort


def test_what_is_not_faster_in_the_end_is_not_taken(clock):
    calls = []

    def seconds(config):
        calls.append(config)
        return (0.5 if config.ifsort and len(calls) < 60 else 1.0, 0.0)

    clock["seconds"] = seconds
    assert set(ts.tune(network(), [tensor()], verbose=False).values()) == {ts.ConvConfig()}
    assert len(calls) > 60


def test_training_chooses_both_splits(clock):
    clock["seconds"] = lambda config: (
        (abs(config.split_mask_num - 2) + 1, abs(config.split_mask_num_bwd - 4) + 1) if config.ifsort else (9.0, 9.0)
    )
    found = ts.tune(network(), [tensor()], tune_with_bwd=True, verbose=False)
    assert {(c.ifsort, c.split_mask_num, c.split_mask_num_bwd) for c in found.values()} == {(True, 2, 4)}


def test_pruning_leaves_out_what_a_slow_dataflow_could_be(clock):
    tried = set()

    def seconds(config):
        tried.add(config)
        return (0.5 if config.dataflow == "gather_scatter" else 1.0, 0.0)

    clock["seconds"] = seconds
    flows = ["implicit_gemm", "fetch_on_demand", "gather_scatter"]
    found = ts.tune(network(), [tensor()], dataflow_range=flows, dataflow_prune=True, verbose=False)
    assert {config.dataflow for config in found.values()} == {"gather_scatter"}
    every = tuner.candidates(flows, backward=False)
    assert {c for c in every if c.dataflow != "gather_scatter"} - tried == {
        c for c in every if c.ifsort and c.split_mask_num != 3
    }
    assert {c for c in every if c.dataflow == "gather_scatter"} <= tried


@pytest.mark.parametrize("graph", [False, True])
def test_it_really_measures(graph):
    model = network()
    found = ts.tune(model, [tensor()], n_samples=1, tune_with_bwd=True, graph=graph, verbose=False)
    assert set(found) == {"0", "1", "3", "4", "5"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_that_something_disturbed_does_not_count():
    assert tuner._mean([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 100.0]) == 1.0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="dataflow_range"):
        ts.tune(network(), [tensor()], dataflow_range=["coded_csr"])
    with pytest.raises(ValueError, match="no samples"):
        ts.tune(network(), [])
    with pytest.raises(ValueError, match="no convolution"):
        ts.tune(nn.Sequential(ts.nn.Conv3d(4, 4, 1)), [tensor()])
