"""Messages between a robot and a policy server: whole, or refused, whatever was sent."""

import io
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tests.plugins.vlash.remote_calls import DESCRIPTION, IMAGE, SETTINGS, message, ramp, raw, request_of

from pronghorn.vlash.remote import Description, MessageError, PolicyServer, container, messages
from pronghorn.vlash.remote.container import pack
from pronghorn.vlash.remote.messages import pack_chunk, pack_request, unpack_chunk, unpack_request


def test_a_request_arrives_whole():
    sent = request_of(depth=np.ones((3, 4), np.float64), steps=np.int32(4), both=["a", "b"], on=torch.tensor([True]))
    found = unpack_request(pack_request(sent))
    assert (found.delay, found.observation.content["task"], found.observation.content["both"]) == (3, "go", ["a", "b"])
    for one, other in zip(
        (sent.state, sent.observation.state, sent.leftover, IMAGE),
        (found.state, found.observation.state, found.leftover, found.observation.content["camera"]), strict=True,
    ):  # fmt: skip
        assert torch.equal(one, other)
    assert found.observation.content["depth"].dtype == torch.float32
    assert found.observation.content["steps"].item() == 4
    assert unpack_request(pack_request(replace(sent, leftover=None))).leftover is None


@pytest.mark.parametrize("batch", [(), (2,)])
def test_images_as_jpeg(batch):
    pytest.importorskip("PIL")
    smooth = torch.linspace(0, 255, 64 * 80).view(64, 80, 1).expand(*batch, 64, 80, 3).to(torch.uint8)
    sent = request_of(camera=smooth, other=torch.zeros(2, 3))
    message = pack_request(sent, jpeg_quality=90)
    assert len(message) < len(pack_request(sent)) / 4
    found = unpack_request(message).observation.content
    assert found["camera"].shape == smooth.shape
    assert (found["camera"].float() - smooth.float()).abs().max() < 8
    assert found["other"].shape == (2, 3)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def deep_header():
    text = b"[" * 100_000
    return len(text).to_bytes(8, "little") + text


def of_jpeg(shape):
    return message({"jpeg": {"camera": {"shape": shape, "sizes": [9]}}}, **{"seen:camera": torch.ones(9).byte()})


def pickled_tensor():
    file = io.BytesIO()
    torch.save({"state": torch.zeros(2)}, file)
    return file.getvalue()


BAD = {
    "nothing": (b"", "no safetensors"),
    "pickle": (pickle.dumps(Bomb()), "no safetensors"),
    "torch.save": (pickled_tensor(), "no safetensors"),
    "long header": ((2**40).to_bytes(8, "little") + b"{}", "long header"),
    "deep header": (deep_header(), "no JSON"),
    "no metadata": (save({"state": torch.zeros(2)}), "metadata"),
    "other metadata": (message(metadata={"vlash": "{}", "format": "pt"}), "metadata"),
    "no object": (message(metadata={"vlash": "[]"}), "list"),
    "cut": (message()[:-1], "can be read"),
    "more": (message() + b"x", "can be read"),
    "kind": (message({"kind": "chunk"}), "kind"),
    "field missing": (message({"delay": None}), "header"),
    "field unknown": (message({"code": "import os"}), "header: got code"),
    "delay": (message({"delay": -1}), "delay"),
    "true": (message({"delay": True}), "delay"),
    "text": (message({"text": {"task": 3}}), "text"),
    "no state": (message(state=None), "state: missing"),
    "state dtype": (message(state=torch.zeros(2, dtype=torch.int64)), "finite float32"),
    "dtype": (message(state=torch.zeros(2, dtype=torch.float16)), "float16"),
    "seen dtype": (message(**{"seen:x": torch.zeros(2, dtype=torch.float16)}), "seen:x: got torch.float16"),
    "NaN": (message(state=torch.tensor([0, torch.nan])), "finite float32"),
    "size": (message(state=torch.zeros(3), measured=torch.zeros(3)), r"wanted [..., 2]"),
    "measured": (message(measured=torch.zeros(3)), "measured"),
    "leftover": (message(leftover=torch.zeros(4)), "leftover"),
    "leftover size": (message(leftover=torch.zeros(4, 3)), "leftover"),
    "unknown": (message(surprise=torch.zeros(1)), "surprise"),
    "twice": (message({"text": {"camera": "a"}}), "twice"),
    "empty": (message(**{"seen:camera": torch.zeros(0, 3)}), "some values"),
    "many": (message(**{f"seen:{number}": torch.zeros(1) for number in range(64)}), "at most 64"),
    "camera": (message(**{"seen:camera": None}), "camera missing"),
    "jpeg alone": (message({"jpeg": {"side": {}}}), "without images"),
    "jpeg list": (message({"jpeg": []}), "jpeg"),
    "jpeg shape": (message({"jpeg": {"camera": {"shape": [8, 10, 3], "sizes": [1]}}}), "its images"),
    "jpeg fields": (message({"jpeg": {"camera": {"shape": [8, 10, 3]}}}), "its images"),
    "no jpeg": (of_jpeg([8, 10, 3]), "no JPEG image"),
    "jpeg bomb": (of_jpeg([9999, 9999, 3]), "at most"),
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    """One for calls that it refuses."""
    with PolicyServer(ramp, DESCRIPTION) as started:
        yield started


@pytest.mark.parametrize("name", BAD)
def test_the_server_refuses(server, name):
    data, reason = BAD[name]
    code, details = raw(server, data)
    assert code == "INVALID_ARGUMENT"
    assert reason in details


def test_jpeg_of_another_size_is_refused(monkeypatch):
    pytest.importorskip("PIL")
    sent = pack_request(request_of(), jpeg_quality=90)
    assert unpack_request(sent).observation.content["camera"].shape == (8, 10, 3)
    checksum = container._checksum
    monkeypatch.setattr(container, "_checksum", lambda header, tensors: checksum({**header, "jpeg": {}}, tensors))
    sent = pack_request(request_of(), jpeg_quality=90)
    with pytest.raises(MessageError, match=r"camera: got RGB \(10, 8\), wanted RGB \(8, 10\)"):
        unpack_request(sent.replace(b"[8, 10, 3]", b"[10, 8, 3]"))


def test_images_have_room_together(monkeypatch):
    pytest.importorskip("PIL")
    sent = pack_request(request_of(other=IMAGE), jpeg_quality=90)
    for room, fits in ((2 * IMAGE.numel(), True), (2 * IMAGE.numel() - 1, False)):
        monkeypatch.setattr(messages, "DECODED_BYTES", room)
        if fits:
            assert unpack_request(sent).observation.content["other"].shape == IMAGE.shape
        else:
            with pytest.raises(MessageError, match=r"at most 239 bytes"):
                unpack_request(sent)


def test_damaged_messages_are_refused_or_harmless():
    good, chance = pack_request(request_of(), jpeg_quality=90), random.Random(0)  # noqa: S311
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 4))):
            data[chance.randrange(min(len(data), 700))] = chance.randrange(256)
        try:
            unpack_request(bytes(data))
        except MessageError:
            refused += 1
    assert refused > 100


def test_answers_are_looked_at_too():
    with pytest.raises(MessageError, match="chunk"):
        unpack_chunk(pack("chunk", {"seconds": 0.1, "digest": ""}, {"other": torch.zeros(2, 2)}))
    with pytest.raises(MessageError, match="seconds"):
        unpack_chunk(pack("chunk", {"seconds": "0.1", "digest": ""}, {"actions": torch.zeros(2, 2)}))
    chunk, *rest = unpack_chunk(pack_chunk(torch.ones(2, 2), 0.5, "a"))
    assert (chunk.sum().item(), rest) == (4, [0.5, "a"])
    for name, value in (("inputs", "camera"), ("policy", 3), ("state_dim", 0), ("settings", {"speed": 1})):
        header = {
            "policy": "", "settings": SETTINGS.to_dict(), "state_dim": 2, "action_dim": 2, "inputs": [], name: value,
        }  # fmt: skip
        with pytest.raises(MessageError):
            Description.unpack(pack("description", header, {}))
    assert Description.unpack(DESCRIPTION.pack()) == DESCRIPTION
