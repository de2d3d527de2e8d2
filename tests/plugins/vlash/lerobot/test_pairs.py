"""Other methods in LeRobot's environment: those that need newer libraries say so, those that need none run."""

import importlib

import pytest
import torch

from pronghorn.versions import SUPPORTED, installed


def test_methods_of_newer_libraries_say_so():
    assert installed("lerobot") is not None
    with pytest.raises(ImportError, match=r"needs transformers .*, found .*: pip install 'pronghorn\[transformers\]'"):
        importlib.import_module("pronghorn.transformers")
    assert installed("transformers") not in SUPPORTED["transformers"]


def test_sparse_convolutions_run_here():
    import pronghorn.torchsparse as ts

    torch.manual_seed(0)
    layer = ts.nn.Conv3d(2, 3, 1, bias=True)
    coords = torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6]], dtype=torch.int32)
    features = torch.randn(2, 2)
    wanted = features @ layer.kernel.reshape(2, 3) + layer.bias
    torch.testing.assert_close(layer(ts.SparseTensor(features, coords)).feats, wanted)
