"""Models whose heads cannot be told apart, or not be computed."""

import pytest
import torch
from tests.kernels.harness import DEVICE
from tests.plugins.duoattention.conftest import small
from tests.plugins.duoattention.test_gates import MASK, samples

from pronghorn.duoattention.find import find_heads

OPTIONS = {"num_steps": 3, "lr": 0.1, "block_size": None, **MASK}
METHODS = pytest.mark.parametrize("method", ["optimise", "on_the_fly"])


@pytest.mark.fault(6)
@METHODS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(method, value):
    model = small().to(DEVICE)
    find_heads(model, samples(), method=method, **OPTIONS)
    model.model.layers[1].self_attn.k_proj.weight.data[3, 3] = value
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight: holds NaN or Inf"):
        find_heads(model, samples(), method=method, **OPTIONS)


@pytest.mark.fault(6)
@pytest.mark.parametrize(("method", "named"), [("optimise", "loss of step 0"), ("on_the_fly", "sample 0.*layer 0")])
def test_activations_that_overflow_are_named(method, named):
    model = small().to(DEVICE)
    model.model.layers[0].self_attn.v_proj.weight.data.fill_(3e38)
    with pytest.raises(ValueError, match=named):
        find_heads(model, samples(), method=method, **OPTIONS)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.fault(6)
@METHODS
@pytest.mark.parametrize("poison", ["a head of zeros", "all zeros", "an outlier"])
def test_gates_are_numbers(method, poison):
    model = small().to(DEVICE)
    clean = find_heads(model, samples(), method=method, **OPTIONS).gates
    values = model.model.layers[0].self_attn.v_proj.weight.data
    if poison == "an outlier":
        values[3, 4] *= 1e4
    else:
        values[: 16 if poison == "a head of zeros" else None] = 0
    found = torch.tensor(find_heads(model, samples(), method=method, **OPTIONS).gates)
    assert found.tolist() != clean
    assert found.isfinite().all()
    assert (found >= 0).all()
    if poison == "a head of zeros" and method == "on_the_fly":
        assert found[0, 0] == 0
