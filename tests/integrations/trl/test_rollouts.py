"""Rows of a batch as trajectories, and trajectories as a batch."""

import torch

from pronghorn.trl.rollouts import PaddedRollouts, Rollout, rollouts_of


def batch(**changed):
    """Two trajectories: prompts padded on the left, completions on the right."""
    made = {
        "prompt_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[1, 2], [3, 0]]), "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "sampling_per_token_logps": torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
        "rewards": torch.tensor([1.0, torch.nan]), "advantages": torch.tensor([0.5, 0.0]),
        "groups": torch.tensor([4, 5]), "policy_versions": torch.tensor([2, 3]),
    }  # fmt: skip
    return {**made, **changed}


def test_rows_without_their_padding():
    first, second = rollouts_of(batch())
    assert (first.prompt_ids.tolist(), first.completion_ids.tolist()) == ([5, 6], [1, 2])
    assert (second.prompt_ids.tolist(), second.completion_ids.tolist()) == ([7, 8, 9], [3])
    assert (first.sampled.tolist(), second.sampled.tolist()) == ([True, True], [True])
    assert second.sampler_log_probs.tolist() == [-3.0]
    assert (first.reward, first.advantage, first.group, first.policy_version) == (1.0, 0.5, 4, 2)
    assert second.reward != second.reward
    assert len(second) == 4
    assert first.forward == {}


def test_tokens_of_tools_and_masked_completions():
    first, second = rollouts_of(
        batch(tool_mask=torch.tensor([[1, 0], [1, 1]]), completion_mask=torch.tensor([[1, 1], [0, 0]]))
    )
    assert first.sampled.tolist() == [True, False]
    assert len(second.completion_ids) == 0


def test_a_sampler_that_is_the_learner():
    made = batch()
    del made["sampling_per_token_logps"]
    assert [rollout.sampler_log_probs for rollout in rollouts_of(made)] == [None, None]


def test_pictures_go_with_their_rows():
    pixels = torch.arange(24.0).reshape(6, 4)
    made = batch(pixel_values=pixels, image_grid_thw=torch.tensor([[1, 2, 2], [1, 1, 2]]), num_images=[1, 1])
    first, second = rollouts_of(made)
    assert torch.equal(first.forward["pixel_values"], pixels[:4])
    assert torch.equal(second.forward["pixel_values"], pixels[4:])
    assert second.forward["image_grid_thw"].tolist() == [[1, 1, 2]]
    assert second.forward["num_images"] == [1]


def rollout(prompt, completion):
    ids = [torch.tensor(part, dtype=torch.long) for part in (prompt, completion)]
    return Rollout(*ids, torch.ones(len(completion), dtype=torch.bool), None, 0.0, 0.0, 0, 0)


def test_padding_is_outside():
    padded = PaddedRollouts.of([rollout([1, 2, 3], [4]), rollout([5], [6, 7])], pad_token_id=9)
    assert padded.input_ids.tolist() == [[1, 2, 3, 4, 9], [9, 9, 5, 6, 7]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert padded.completion_length == 2


def test_empty_completions_have_a_place():
    padded = PaddedRollouts.of([rollout([1, 2], [])], pad_token_id=9)
    assert (padded.input_ids.tolist(), padded.attention_mask.tolist()) == ([[1, 2, 9]], [[1, 1, 0]])
    assert padded.completion_length == 1
