"""Our layers copied, pickled to a process of another kind, and shared between processes."""

import copy
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from tests.plugins.dcae.test_autoencoder import small

from pronghorn.awq.config import AwqConfig
from pronghorn.awq.layers import AwqLinear
from pronghorn.torchsparse import nn as spnn
from pronghorn.torchsparse.tensor import SparseTensor

pytestmark = pytest.mark.fault(20)


def awq():
    linear = torch.nn.Linear(64, 32)
    return AwqLinear.from_linear(linear, AwqConfig(group_size=32)), (torch.ones(3, 64),)


def torchsparse():
    coords = torch.stack([torch.zeros(9), torch.arange(9), torch.arange(9) % 2, torch.zeros(9)], dim=1).int()
    layer = torch.nn.Sequential(spnn.Conv3d(3, 4, 3), spnn.BatchNorm(4), spnn.ReLU()).eval()
    return layer, (SparseTensor(torch.ones(9, 3), coords),)


def dcae():
    return small(), (torch.ones(1, 3, 16, 16),)


LAYERS = {"awq": awq, "torchsparse": torchsparse, "dcae": dcae}


@pytest.fixture(scope="module", params=LAYERS)
def layer(request):
    """A layer, what it is given and what it makes of it."""
    torch.manual_seed(0)
    module, given = LAYERS[request.param]()
    return module, given, outcome(module, given)


def outcome(module, given):
    with torch.no_grad():
        found = module(*given)
    for name in ("feats", "sample"):
        found = getattr(found, name, found)
    return found


def test_a_copy_computes_the_same_and_is_its_own(layer):
    module, given, wanted = layer
    copied = copy.deepcopy(module)
    assert torch.equal(outcome(copied, given), wanted)
    for tensor in copied.state_dict().values():
        tensor.zero_()
    assert torch.equal(outcome(module, given), wanted)


CHILD = """
import pickle, sys, torch
torch.set_num_threads(1)
with open(sys.argv[1], "rb") as file:
    module, given, wanted = pickle.load(file)
with torch.no_grad():
    found = module(*given)
for name in ("feats", "sample"):
    found = getattr(found, name, found)
print(torch.equal(found, wanted))
"""


def test_a_new_process_computes_the_same(layer, tmp_path):
    """As a worker that was spawned: nothing was imported there before."""
    (tmp_path / "layer").write_bytes(pickle.dumps(layer))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "layer")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.stdout.strip() == "True", found.stderr


def test_shared_memory_is_shared(layer):
    """What a child writes to a layer's tensors its parent sees."""
    module, given, wanted = layer
    shared = copy.deepcopy(module).share_memory()
    tensors = [tensor for tensor in shared.state_dict().values() if tensor.is_floating_point()]
    assert tensors
    assert all(tensor.is_shared() for tensor in shared.state_dict().values())
    assert torch.equal(outcome(shared, given), wanted)
    worker = multiprocessing.get_context("fork").Process(target=lambda: [tensor.fill_(3) for tensor in tensors])
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert all((tensor == 3).all() for tensor in tensors)
