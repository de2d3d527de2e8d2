"""Masks and positions of branches over one prefix, by the rule stated token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.vlash.shared_observation import (
    MASK_VALUE,
    additive,
    allowed,
    position_ids,
    shared_allowed,
    shared_position_ids,
)

PREFIX, SUFFIX = 4, 3


def starts(state_tokens):
    """No block begins in the prefix; one at a branch's first action, and for pi0 one at its state before that."""
    suffix = torch.zeros(1, SUFFIX)
    suffix[:, : state_tokens + 1] = 1
    return torch.zeros(1, PREFIX), suffix


@given(
    prefix=st.lists(st.booleans(), min_size=PREFIX, max_size=PREFIX),
    branches=st.lists(st.booleans(), min_size=1, max_size=4), state_tokens=st.sampled_from([0, 1]),
)  # fmt: skip
def test_the_rule(prefix, branches, state_tokens):
    prefix_starts, suffix_starts = starts(state_tokens)
    pad, ones = torch.tensor([prefix]), torch.ones(1, SUFFIX, dtype=torch.bool)
    found = shared_allowed(pad, prefix_starts, ones, suffix_starts, torch.tensor([branches]))[0]
    tokens = [(None, place, real) for place, real in enumerate(prefix)]
    tokens += [(branch, place, real) for branch, real in enumerate(branches) for place in range(SUFFIX)]
    for row, (branch, place, real) in enumerate(tokens):
        for column, (other, there, other_real) in enumerate(tokens):
            within = other == branch and not (branch is not None and place < state_tokens <= there)
            sees = real and other_real and (within or (other is None and branch is not None))
            assert found[row, column] == sees
    positions = shared_position_ids(pad, ones, len(branches))[0].tolist()
    real = sum(prefix)
    assert positions[PREFIX:] == [real, real + 1, real + 2] * len(branches)
    assert positions[:PREFIX] == [sum(prefix[: place + 1]) - 1 for place in range(PREFIX)]


@pytest.mark.parametrize("state_tokens", [0, 1])
def test_one_branch_is_the_plain_sequence(state_tokens):
    prefix_starts, suffix_starts = starts(state_tokens)
    pad, ones = torch.tensor([[True, False, True, True]]), torch.ones(1, SUFFIX, dtype=torch.bool)
    shared = shared_allowed(pad, prefix_starts, ones, suffix_starts, torch.ones(1, 1, dtype=torch.bool))
    joined = torch.cat([pad, ones], dim=1), torch.cat([prefix_starts, suffix_starts], dim=1)
    assert torch.equal(shared, allowed(*joined))
    assert torch.equal(shared_position_ids(pad, ones, 1), position_ids(pad, ones))


def test_what_is_not_seen_stays_finite():
    mask = torch.tensor([[True, False], [False, False]])
    assert additive(mask).tolist() == [[0.0, MASK_VALUE], [MASK_VALUE, MASK_VALUE]]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert additive(mask, dtype).dtype == dtype
        weights = (torch.randn(2, 2, dtype=dtype) + additive(mask, dtype)).softmax(-1)
        assert weights[0].tolist() == [1, 0]
        assert weights[1].tolist() == [0.5, 0.5]


def test_shapes_that_do_not_fit_are_refused():
    ones = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="block_starts: got"):
        allowed(ones, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="suffix_starts: got"):
        shared_allowed(ones, torch.zeros(1, 3), ones, torch.zeros(1, 2), ones)
    with pytest.raises(ValueError, match="prefix_starts: got"):
        shared_allowed(ones, torch.zeros(1, 2), ones, torch.zeros(1, 3), ones)
