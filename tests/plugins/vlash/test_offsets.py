"""Which actions and which state a sample gets when the robot has moved on."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.vlash.offsets import (
    OffsetSamples,
    all_offsets,
    apply_offset,
    collate,
    draw_offset,
    draw_offsets,
    offset_indices,
    proxy_state,
    state_index,
)

HORIZON, MOST = 4, 3


def window(batch=3, action_dim=2, state_dim=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randn(batch, HORIZON + MOST, action_dim, generator=generator)
    is_pad = torch.arange(HORIZON + MOST) >= torch.tensor([7, 5, 1])[:batch, None]
    return actions, is_pad, torch.randn(batch, state_dim, generator=generator)


@given(
    begin=st.integers(0, 5), length=st.integers(1, 6), place=st.integers(0, 5), offset=st.integers(0, 9),
    horizon=st.integers(1, 6),
)  # fmt: skip
def test_rows_stay_in_the_episode(begin, length, place, offset, horizon):
    end, t = begin + length, begin + place % length
    rows, is_pad = offset_indices(t, offset, begin, end, horizon)
    for step in range(horizon):
        wanted = t + offset + step
        assert rows[step] == min(wanted, end - 1)
        assert is_pad[step] == (wanted >= end)
    assert state_index(t, offset, begin, end) == (t if offset == 0 else min(t + offset - 1, end - 1))
    assert state_index(t, offset, begin, end, ground_truth=True) == min(t + offset, end - 1)


@pytest.mark.parametrize("function", [lambda *place: offset_indices(*place, 2), state_index])
def test_a_row_of_another_episode_is_refused(function):
    for t in (1, 5):
        with pytest.raises(ValueError, match=f"t: got {t}, wanted a row of the episode, 2 to 4"):
            function(t, 0, 2, 5)
    with pytest.raises(ValueError, match="offset: got -1"):
        function(2, -1, 2, 5)


def test_all_delays_are_as_likely():
    rng = random.Random(0)  # noqa: S311  # a stream of delays, not a secret
    generator = torch.Generator().manual_seed(0)
    drawn = [Counter(draw_offset(MOST, rng) for _ in range(4000))]
    drawn.append(Counter(draw_offsets(4000, MOST, generator).tolist()))
    for counts in drawn:
        assert sorted(counts) == [0, 1, 2, 3]
        assert all(900 < count < 1100 for count in counts.values())


def test_every_delay_is_cut_where_the_rule_says():
    actions, is_pad, state = window()
    every = all_offsets(actions, is_pad, state, HORIZON)
    assert every.actions.shape == (3, MOST + 1, HORIZON, 2)
    assert every.offset_mask.all()
    for delay in range(MOST + 1):
        one = apply_offset(actions, is_pad, state, torch.full((3,), delay), HORIZON)
        torch.testing.assert_close((every.actions[:, delay], every.is_pad[:, delay], every.states[:, delay]), one)
        assert torch.equal(one[0], actions[:, delay : delay + HORIZON])
        assert torch.equal(one[1], is_pad[:, delay : delay + HORIZON])
        assert torch.equal(one[2], state if delay == 0 else actions[:, delay - 1])


def test_a_batch_of_different_delays():
    actions, is_pad, state = window()
    found = apply_offset(actions, is_pad, state, torch.tensor([3, 0, 1]), HORIZON)
    for row, delay in enumerate((3, 0, 1)):
        alone = apply_offset(
            *(part[row : row + 1] for part in (actions, is_pad, state)), torch.tensor([delay]), HORIZON
        )
        torch.testing.assert_close(tuple(part[row : row + 1] for part in found), alone)


def test_only_coordinates_that_an_action_moves_are_replaced():
    actions, is_pad, state = window(action_dim=2, state_dim=3)
    found = all_offsets(actions, is_pad, state, HORIZON, state_from_action=[1, None, 0]).states
    assert torch.equal(found[:, 0], state)
    assert torch.equal(found[:, 1:, 0], actions[:, :MOST, 1])
    assert torch.equal(found[:, 1:, 1], state[:, None, 1].expand(-1, MOST))
    assert torch.equal(found[:, 1:, 2], actions[:, :MOST, 0])
    one = apply_offset(actions, is_pad, state, torch.tensor([2, 0, 3]), HORIZON, state_from_action=[1, None, 0])[2]
    assert torch.equal(one, torch.stack([found[0, 2], found[1, 0], found[2, 3]]))


def test_recorded_states_stand_for_themselves():
    actions, is_pad, state = window(state_dim=5)
    future = torch.randn(3, MOST + 1, 5)
    offset = torch.tensor([2, 0, 3])
    found = apply_offset(actions, is_pad, state, offset, HORIZON, future_states=future)[2]
    assert torch.equal(found, future[torch.arange(3), offset])
    assert torch.equal(all_offsets(actions, is_pad, state, HORIZON, future_states=future).states, future)


def test_sizes_need_not_agree_where_no_delay_is_trained():
    actions, is_pad, state = torch.randn(2, HORIZON, 2), torch.zeros(2, HORIZON, dtype=torch.bool), torch.randn(2, 5)
    assert torch.equal(apply_offset(actions, is_pad, state, torch.zeros(2, dtype=torch.int64), HORIZON)[2], state)
    assert torch.equal(all_offsets(actions, is_pad, state, HORIZON).states, state[:, None])


def test_different_sizes_are_refused_with_the_ways_out():
    actions, is_pad, state = window(state_dim=3)
    for call in (
        lambda: apply_offset(actions, is_pad, state, torch.zeros(3, dtype=torch.int64), HORIZON),
        lambda: all_offsets(actions, is_pad, state, HORIZON),
        lambda: proxy_state(state, actions[:, 0]),
    ):
        with pytest.raises(ValueError, match=r"2 coordinates .* state of 3.*use_state_ground_truth.*state_from_action"):
            call()


@pytest.mark.parametrize("mapping", [[0, 1], [0, 1, 2], [None, None, None, None]])
def test_a_wrong_map_is_refused(mapping):
    with pytest.raises(ValueError, match="state_from_action: got"):
        proxy_state(torch.zeros(3), torch.zeros(2), mapping)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": torch.zeros(3, 7)}, "actions, is_pad"),
        ({"is_pad": torch.zeros(3, 6, dtype=torch.bool)}, "actions, is_pad"),
        ({"state": torch.zeros(2, 2)}, "state: got"),
        ({"horizon": 8}, "horizon: got 8, wanted 1 to the window's 7"),
        ({"horizon": 0}, "horizon: got 0"),
        ({"offset": torch.tensor([0, 1, 4])}, "offset: got .*wanted 0 to 3"),
        ({"offset": torch.tensor([0, -1, 3])}, "offset: got"),
        ({"offset": torch.tensor([0, 1])}, "offset: got shape"),
        ({"future_states": torch.zeros(3, 3, 2)}, "future_states: got"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    actions, is_pad, state = window()
    arguments = {"actions": actions, "is_pad": is_pad, "state": state, "offset": torch.zeros(3, dtype=torch.int64),
                 "horizon": HORIZON}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        apply_offset(**{**arguments, **change})


def test_samples_with_fewer_delays_are_padded():
    samples = []
    for count in (2, 4, 1):
        actions, is_pad, state = (part[0] for part in window(1, seed=count))
        cut = HORIZON + count - 1
        every = all_offsets(actions[None, :cut], is_pad[None, :cut], state[None], HORIZON)
        samples.append(OffsetSamples(*(part[0] for part in every)))
    batch = collate(samples)
    assert batch.offset_mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    for row, sample in enumerate(samples):
        count = len(sample.offset_mask)
        torch.testing.assert_close(OffsetSamples(*(part[row, :count] for part in batch)), sample)
    assert not batch.actions[~batch.offset_mask].any()
    assert not batch.states[~batch.offset_mask].any()
    assert batch.is_pad[~batch.offset_mask].all()
    with pytest.raises(ValueError, match="samples: got none"):
        collate([])
