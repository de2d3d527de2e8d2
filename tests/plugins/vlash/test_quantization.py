"""Several actions as one, and what holds a robot."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.quantization import hold, is_delta, is_sent, merge, merge_chunk

ACTIONS = torch.tensor([[1.0, 10.0, 0.0], [2.0, 20.0, 1.0]])


def test_merge():
    assert merge(ACTIONS, VLASHSettings()).tolist() == [2.0, 20.0, 1.0]
    assert merge(ACTIONS, VLASHSettings(delta_dims=[0])).tolist() == [3.0, 20.0, 1.0]
    assert merge(ACTIONS, VLASHSettings(delta_dims=[])).tolist() == [2.0, 20.0, 1.0]
    assert merge(ACTIONS, VLASHSettings(legacy_sum=True)).tolist() == [3.0, 30.0, 1.0]
    assert merge(ACTIONS, VLASHSettings(state_estimator="sum_delta")).tolist() == [3.0, 30.0, 1.0]
    assert merge(ACTIONS, VLASHSettings(state_estimator="sum_delta", delta_dims=[1])).tolist() == [2.0, 30.0, 1.0]
    assert merge(ACTIONS[1:], VLASHSettings(delta_dims=[0])).tolist() == ACTIONS[1].tolist()
    with pytest.raises(
        ValueError, match=r"actions: got \[0, 3\], wanted \[..., steps, action_dim\], at least one step"
    ):
        merge(ACTIONS[:0], VLASHSettings())


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_merge_chunk(ratio, groups, seed):
    chunk = torch.randn(2, ratio * groups, 3, generator=torch.Generator().manual_seed(seed))
    settings = VLASHSettings(
        action_quant_ratio=ratio, n_action_steps=ratio, inference_overlap_steps=0, delta_dims=[0, 2]
    )
    found = merge_chunk(chunk, settings)
    assert found.shape == (2, groups, 3)
    assert torch.allclose(found.sum(1)[:, [0, 2]], chunk.sum(1)[:, [0, 2]], atol=1e-6)
    assert torch.equal(found[..., 1], chunk[:, ratio - 1 :: ratio, 1])


def test_steps_that_do_not_divide():
    with pytest.raises(ValueError, match=r"chunk: got \[5, 3\].*multiple of action_quant_ratio, 2"):
        merge_chunk(torch.zeros(5, 3), VLASHSettings(action_quant_ratio=2))
    for changes in ({"delta_dims": [0]}, {"legacy_sum": True}, {"state_estimator": "sum_delta"}):
        with pytest.raises(ValueError, match="action_quant_ratio: got 3, wanted a divisor of n_action_steps, 32"):
            VLASHSettings(action_quant_ratio=3, **changes)
    VLASHSettings(action_quant_ratio=3)


def test_a_coordinate_that_is_not_there():
    with pytest.raises(ValueError, match=r"delta_dims: got \[3\], wanted coordinates below action_dim, 3"):
        is_delta(VLASHSettings(delta_dims=[3]), 3)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_the_last_tick_of_a_group_is_sent(ratio):
    settings = VLASHSettings(action_quant_ratio=ratio)
    assert [tick for tick in range(7) if is_sent(tick, settings)] == list(range(ratio - 1, 7, ratio))


def test_hold():
    assert hold(ACTIONS[1], VLASHSettings()).tolist() == [2.0, 20.0, 1.0]
    assert hold(ACTIONS, VLASHSettings(delta_dims=[0])).tolist() == [[0.0, 10.0, 0.0], [0.0, 20.0, 1.0]]
    assert ACTIONS[0, 0] == 1.0
