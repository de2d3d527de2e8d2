"""The synthetic data; its bytes are compared with the official ones by tests/golden."""

import pytest
import torch

from pronghorn.duoattention.passkey import IGNORED, MultiPasskeyDataset, pad_collate
from pronghorn.duoattention.passkey import _Bytes as Bytes

TEXT = ["the quiet river runs by the old oak. " * 100]
SMALL = {"context_length_min": 500, "context_length_max": 2000, "num_passkeys": 2, "passkey_length": 3,
         "context_lengths_num_intervals": 5, "buffer_size": 10}  # fmt: skip


def text(ids):
    return bytes(token for token in ids.tolist() if token < 256).decode()


def test_a_sample_holds_its_answers():
    data = MultiPasskeyDataset(Bytes(), TEXT, **SMALL)
    assert len(data) == 5
    for index in range(len(data)):
        sample = data[index]
        ids, labels = sample["input_ids"], sample["labels"]
        asked = text(ids[labels != IGNORED])
        for ordinal in ("first", "second"):
            key = asked.split(f"{ordinal} passkey to the vault?\nPasskey: ")[1].split("\n\n")[0]
            assert text(ids).count(f"it's the {ordinal} passkey to the vault: {key}\n\n") == 1
        assert len(ids) % 16 == 0
        assert len(ids) <= 2000 + 16
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


def test_samples_differ_and_follow_the_seed():
    data = MultiPasskeyDataset(Bytes(), TEXT, **SMALL)
    torch.manual_seed(1)
    one, two = data[0]["input_ids"], data[0]["input_ids"]
    torch.manual_seed(1)
    assert torch.equal(data[0]["input_ids"], one)
    assert not torch.equal(one, two)


def test_batches_are_filled_up():
    data = MultiPasskeyDataset(Bytes(), TEXT, **SMALL)
    samples = [data[0], data[4]]
    batch = pad_collate(samples, pad_token_id=258)
    length = len(samples[0]["input_ids"])
    assert (batch["input_ids"][0, length:] == 258).all()
    assert (batch["labels"][0, length:] == IGNORED).all()
    assert torch.equal(batch["labels"][1], samples[1]["labels"])


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_passkeys": 21}, "num_passkeys"), ({"num_passkeys": 0}, "num_passkeys"),
    ({"num_passkeys": 5, "depth_ratio_num_intervals": 4}, "num_passkeys"),
    ({"context_length_min": 3000}, "context_length_min"), ({"context_length_min": 0}, "context_length_min"),
    ({"min_depth_ratio": 0.9, "max_depth_ratio": 0.1}, "min_depth_ratio"), ({"passkey_length": 0}, "passkey_length"),
    ({"context_length_max": 5000}, "haystack"), ({"buffer_size": 1900}, "context_length_max"),
])  # fmt: skip
@pytest.mark.fault(7)
def test_what_makes_no_data(changes, message):
    with pytest.raises(ValueError, match=message):
        MultiPasskeyDataset(Bytes(), TEXT, **{**SMALL, **changes})
