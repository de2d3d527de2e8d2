"""The worker in the trainer's process: what it samples, how far it goes, and weights that come in the middle."""

import math
import threading
import time

import pytest
import torch
from tests.faults.fail_at_call import FailAtCall
from tests.plugins.vcpo.addition import EOS, WORDS, llama, sums, tokenizer

from pronghorn.trl.async_rollouts import Position
from pronghorn.trl.in_process_worker import InProcessWorker

SIZE, LENGTH = 4, 6


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def worker(model=None, reward=length, dataset=None, may=2, **settings):
    settings = {"num_generations": SIZE, "max_completion_length": LENGTH, **settings}
    dataset = sums() if dataset is None else dataset
    found = InProcessWorker(model or llama(), tokenizer(), dataset, reward, **settings)
    found.allow(may)
    return found


def groups(one, count=2):
    """The samples of some groups, in order of their numbers; the worker is stopped."""
    one.start()
    try:
        samples = [one.rollout_buffer.get(timeout=30) for _ in range(count * SIZE)]
    finally:
        one.stop()
    return [samples[start : start + SIZE] for start in range(0, len(samples), SIZE)]


def wait(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probabilities_are_those_of_the_tokens(temperature):
    model = llama()
    for number, group in enumerate(groups(worker(temperature=temperature))):
        for sample in group:
            ids, mask = torch.tensor(sample.input_ids), torch.tensor(sample.completion_mask).bool()
            assert ids[~mask].tolist() == tokenizer()(sums()[number]["prompt"])["input_ids"]
            assert not mask[: (~mask).sum()].any()
            with torch.no_grad():
                log_probs = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
            expected = log_probs.gather(-1, ids[1:, None])[:, 0][mask[1:]]
            torch.testing.assert_close(torch.tensor(sample.old_log_probs)[mask], expected, rtol=1e-4, atol=1e-4)
            assert EOS not in ids[mask][:-1]
            assert sample.group_id == number
            assert sample.metrics["group_rows"] == SIZE


def test_the_seed_says_all():
    first, again, other = (
        [sample.input_ids.tolist() for group in groups(worker(seed=seed)) for sample in group] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    one = worker()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    groups(one)
    assert torch.equal(torch.rand(4), expected)  # no other thread's numbers were drawn


def test_it_starts_no_group_before_it_may_and_goes_on_where_a_run_was():
    one = worker()
    one.go_on(Position(98, {99, 101}))
    one.allow(103)
    found = groups(one, 3)
    assert [group[0].group_id for group in found] == [98, 100, 102]
    assert [group[0].prompt for group in found] == ["9+8=", "0+0=", "0+2="]
    assert one.rollout_buffer.empty()


@pytest.mark.fault(25)
def test_it_starts_again_after_a_stop():
    one = worker()
    first = groups(one)
    second = groups(one)
    assert [sample.input_ids.tolist() for sample in first[0]] == [sample.input_ids.tolist() for sample in second[0]]
    one.stop()
    with pytest.raises(RuntimeError, match="is not running"):
        one.check_health(1.0)


def test_weights_come_in_between_two_tokens():
    """An update in the middle of a group: later tokens are sampled, and judged, by the new weights."""
    model, third = llama(), threading.Event()
    one = worker(model, may=1)
    forwards = []

    def held(module, args, kwargs):
        forwards.append(one.model_version)
        if len(forwards) == 3:
            third.set()
            wait(lambda: one._updating)  # the update waits for this token

    model.register_forward_pre_hook(held, with_kwargs=True)
    one.start()
    assert third.wait(30)
    one.pause()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    new = llama(seed=1)
    one.send_weights((name, weight.detach()) for name, weight in new.named_parameters())
    one.resume()
    time.sleep(0.05)
    assert len(forwards) == 3  # it goes on when it knows the version
    one.update_model_version(1)
    samples = [one.rollout_buffer.get(timeout=30) for _ in range(SIZE)]
    one.stop()
    assert forwards[:3] == [0] * 3
    assert set(forwards[3:]) == {1}
    assert all(torch.equal(weight, dict(new.named_parameters())[name]) for name, weight in model.named_parameters())
    assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    lengths = [int(sample.completion_mask.sum()) for sample in samples]
    assert max(lengths) > 3
    for sample, count in zip(samples, lengths, strict=True):
        assert sample.model_version == 0
        assert sample.metrics["model_version_end"] == float(count > 3)
    # What was sampled before has the old weights' probabilities, what follows has others.
    sample = samples[lengths.index(max(lengths))]
    with torch.no_grad():
        log_probs = llama()(torch.tensor(sample.input_ids)[None]).logits[0, :-1].log_softmax(-1)
    old = log_probs.gather(-1, torch.tensor(sample.input_ids)[1:, None])[:, 0]
    gaps = (torch.tensor(sample.old_log_probs)[1:] - old).abs()[3:]
    assert (gaps[:3] < 1e-4).all()
    assert (gaps[3:] > 1e-3).all()


@pytest.mark.fault(25)
def test_rewards_are_added_up_and_may_be_missing():
    async def first(completions, **kwargs):
        return [None, None, 1.0, 2.0]

    def second(prompts, completions, completion_ids, answer, **kwargs):
        assert len(prompts) == len(completions) == len(completion_ids) == len(answer) == SIZE
        return [None, 5.0, 1.0, 0.0]

    group = groups(worker(reward=[first, second]))[0]
    assert [sample.metrics["reward"] for sample in group] == pytest.approx([math.nan, 5, 2, 2], nan_ok=True)
    assert [sample.metrics["rewards/second"] for sample in group] == pytest.approx([math.nan, 5, 1, 0], nan_ok=True)
    std = math.sqrt(2)
    assert [sample.advantage for sample in group] == pytest.approx([0, 2 / std, -1 / std, -1 / std])
    nothing = groups(worker(reward=lambda completions, **kwargs: [None] * len(completions)))[0]
    assert [sample.advantage for sample in nothing] == [0.0] * SIZE


def test_messages():
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append((prompts[0], completions[0]))
        return [0.0] * len(prompts)

    prompt = [{"role": "user", "content": "1+2"}]
    one = InProcessWorker(llama(), words, [{"prompt": prompt}], reward, num_generations=SIZE, max_completion_length=2)
    group = groups(one, 1)[0]
    assert group[0].input_ids[:4].tolist() == [WORDS.index(letter) for letter in "1+2="]
    assert seen[0][0] == prompt
    assert seen[0][1][0]["role"] == "assistant"


@pytest.mark.fault(25)
def test_an_engine_that_dies_says_why():
    one = worker(reward=FailAtCall(length, 2, ZeroDivisionError("no reward")), may=5)
    one.start()
    wait(lambda: not one._thread.is_alive())
    with pytest.raises(RuntimeError, match="has failed") as caught:
        one.check_health(10.0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    one.pause()  # which does not wait for the dead
    one.stop()


@pytest.mark.fault(25)
def test_one_that_hangs_shows_no_sign_of_life():
    release = threading.Event()

    def hangs(completions, **kwargs):
        release.wait(30)
        return length(completions)

    one = worker(reward=hangs)
    one.start()
    wait(lambda: one.model_version == 0 and not one._busy and one._sign_of_life)
    with pytest.raises(RuntimeError, match="no sign of life"):
        wait(lambda: one.check_health(0.05))
    release.set()
    one.stop()


def test_a_full_queue_holds_it_back():
    one = worker(queue_maxsize=SIZE, may=10)
    one.start()
    wait(one.rollout_buffer.full)
    one.check_health(10.0)
    assert [one.rollout_buffer.get(timeout=30).group_id for _ in range(3 * SIZE)] == [0] * 4 + [1] * 4 + [2] * 4
    one.stop()


def test_what_it_does_not_take():
    with pytest.raises(ValueError, match="dataset: got list without rows"):
        worker(dataset=[])
    with pytest.raises(ValueError, match="num_generations: got 0"):
        worker(num_generations=0)
    with pytest.raises(ValueError, match="temperature: got 0"):
        worker(temperature=0.0)
    one = worker()
    with pytest.raises(ValueError, match=r"^other: got \[2\], the sampler's model has no such parameter"):
        one.send_weights(iter([("other", torch.zeros(2))]))
    with pytest.raises(ValueError, match=r"^model.norm.weight: got \[2\], the sampler's model has \[32\]"):
        one.send_weights(iter([("model.norm.weight", torch.zeros(2))]))

    def too_few(completions, **kwargs):
        return [1.0]

    one = worker(reward=too_few)
    one.start()
    wait(lambda: not one._thread.is_alive())
    assert "too_few: gave 1 rewards for 4" in str(one._failure)
    one.stop()
