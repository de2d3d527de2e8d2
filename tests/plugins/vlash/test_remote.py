"""A policy server and its clients on this machine: the same chunks, and an error whenever there is none."""

import io
import json
import pickle
import random
import threading
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import save
from tests.plugins.vlash.stubs import CountingPolicy, FakeClock
from typer.testing import CliRunner

from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.remote import Description, MessageError, PolicyServer, RemotePolicy, messages
from pronghorn.vlash.remote import client as client_module
from pronghorn.vlash.remote.container import VERSION, VersionError, pack, unpack
from pronghorn.vlash.remote.messages import pack_chunk, pack_request, unpack_chunk, unpack_request
from pronghorn.vlash.remote.server import CALLS
from pronghorn.vlash.runner import AsyncRunner
from pronghorn.vlash.watchdog import InvalidChunkError, NeedsResetError, PolicyError, StaleCommandError

SETTINGS = VLASHSettings(chunk_size=6, n_action_steps=4, inference_overlap_steps=2, fps=50)
DESCRIPTION = Description("ramp", SETTINGS, state_dim=2, action_dim=2, inputs=("camera",))
IMAGE = (torch.arange(8 * 10 * 3) % 251).to(torch.uint8).view(8, 10, 3)


def ramp(request):
    """Goes on by 1 a step from the state, shifted by what the camera sees, and by the delay."""
    shift = request.observation.content["camera"].float().mean() + 1000 * request.delay
    return request.state[..., None, :] + torch.arange(6.0)[:, None] + shift


def request_of(state=(1.0, 2.0), delay=3, **content):
    state = torch.tensor(state)
    leftover = torch.arange(10.0).view(5, 2).expand(*state.shape[:-1], 5, 2)
    return ChunkRequest(Observation({"camera": IMAGE, "task": "go", **content}, state - 1), state, delay, leftover)


@pytest.fixture
def serve():
    servers = []

    def start(policy=ramp, description=DESCRIPTION, **options):
        servers.append(PolicyServer(policy, description, **options).start())
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def connect():
    clients = []

    def start(server, **options):
        clients.append(RemotePolicy(getattr(server, "address", server), **options))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def raw(server, data, method="Chunk", token=None):
    """Bytes as they are; the error's code and text."""
    metadata = [("authorization", token)] if token is not None else []
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/pronghorn.vlash.PolicyServer/{method}")(data, timeout=5, metadata=metadata)
    return caught.value.code().name, caught.value.details()


@pytest.mark.parametrize("state", [(1.0, 2.0), ((1.0, 2.0), (3.0, 4.0))])
def test_a_remote_chunk_is_the_local_one(serve, connect, state):
    client = connect(serve())
    assert client.description == DESCRIPTION
    request = request_of(state)
    assert torch.equal(client(request), ramp(request))
    assert client.seconds >= 0
    double = replace(request, state=request.state.double())
    assert client(double).dtype == torch.float64


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


def test_a_runner_with_a_remote_policy_does_what_one_with_a_local_does(serve, connect):
    client = connect(serve())
    settings = client.settings(action_quant_ratio=2)
    found = []
    for policy in (client, ramp):
        state = torch.zeros(2)
        with AsyncRunner(policy, settings, threaded=False) as runner:
            actions = []
            for _ in range(10):
                state = runner.step(Observation({"camera": IMAGE}, state))
                actions.append(state)
        found.append(torch.stack(actions))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="serve with --mode"):
        client.settings(async_mode="naive")
    assert client.settings(async_mode="sync", inference_overlap_steps=0).async_mode == "sync"


def test_two_robots_get_their_own_chunks(serve, connect):
    inside, most = [0], [0]

    def counted(request):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.001)
        inside[0] -= 1
        return ramp(request)

    server, wrong = serve(counted), []

    def drive(number):
        client = connect(server)
        for step in range(10):
            request = request_of((float(number), float(step)))
            if not torch.equal(client(request), ramp(request)):
                wrong.append((number, step))

    threads = [threading.Thread(target=drive, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert wrong == []
    assert most == [1]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def message(header=None, metadata=None, **tensors):
    """A request with something changed."""
    fields = {"version": VERSION, "kind": "request", "delay": 0, "text": {}, "jpeg": {}}
    fields |= header or {}
    fields = {name: value for name, value in fields.items() if value is not None}
    given = {"state": torch.zeros(2), "measured": torch.zeros(2), "seen:camera": IMAGE} | tensors
    return save(
        {name: value for name, value in given.items() if value is not None}, metadata or {"vlash": json.dumps(fields)}
    )


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


def test_other_versions_are_told_so(server, monkeypatch, connect):
    code, details = raw(server, message({"version": 2}))
    assert code == "FAILED_PRECONDITION"
    assert "same Pronghorn" in details
    newer = pack("description", {"policy": ""}, {}).replace(b'\\"version\\": 1', b'\\"version\\": 2')
    with pytest.raises(VersionError, match="got 2, wanted 1"):
        unpack(newer, "description", ())
    monkeypatch.setattr(PolicyServer, "_describe", lambda *ignored: newer)
    with PolicyServer(ramp, DESCRIPTION) as other, pytest.raises(PolicyError, match="got 2, wanted 1"):
        connect(other)


def test_jpeg_of_another_size_is_refused():
    pytest.importorskip("PIL")
    sent = pack_request(request_of(), jpeg_quality=90)
    assert unpack_request(sent).observation.content["camera"].shape == (8, 10, 3)
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


def test_what_cannot_be_sent(serve, connect):
    client = connect(serve())
    with pytest.raises(MessageError, match="content: got str"):
        client(replace(request_of(), observation=Observation("image", torch.zeros(2))))
    with pytest.raises(MessageError, match="thing: got object"):
        client(request_of(thing=object()))
    with pytest.raises(PolicyError, match="camera missing"):
        client(replace(request_of(), observation=Observation({}, torch.zeros(2))))
    with pytest.raises(PolicyError, match="finite float32"):
        client(request_of((1.0, torch.inf)))


def test_a_token(serve, connect):
    server = serve(token="secret")
    request = request_of()
    assert torch.equal(connect(server, token="secret")(request), ramp(request))
    for token in (None, "secre", "secret2"):
        with pytest.raises(PolicyError, match="UNAUTHENTICATED"):
            connect(server, token=token)
    for method in ("Describe", "Chunk"):
        assert raw(server, b"", method)[0] == "UNAUTHENTICATED"
        assert raw(server, b"", method, token="Basic secret")[0] == "UNAUTHENTICATED"
    for host in ("0.0.0.0", "[::]", "192.0.2.1", "robot.example"):  # noqa: S104
        with pytest.raises(ValueError, match="token: got None"):
            PolicyServer(ramp, DESCRIPTION, host)


def test_a_message_that_is_too_large(serve, connect):
    server = serve(largest_message=2000)
    client = connect(server)
    with pytest.raises(PolicyError, match="RESOURCE_EXHAUSTED"):
        client(request_of(more=torch.zeros(1000)))
    assert client(request_of()).shape == (6, 2)


def test_a_port_is_not_shared(serve):
    with pytest.raises(RuntimeError, match=r"bind|address"):
        serve(port=serve().port)


def test_a_policy_that_fails(serve, connect, caplog):
    def fail(request):
        raise KeyError("joint")

    with pytest.raises(PolicyError, match=r"KeyError.*joint"):
        connect(serve(fail))(request_of())
    assert "The policy failed." in caplog.text
    with pytest.raises(PolicyError, match=r"a chunk of \[5, 2\]"):
        connect(serve(lambda request: torch.zeros(5, 2)))(request_of())
    with pytest.raises(PolicyError, match="some values"):
        connect(serve(lambda request: torch.zeros(0, 2)))(request_of())


def test_a_chunk_that_is_not_finite_reaches_no_robot(serve, connect):
    client = connect(serve(lambda request: torch.full((6, 2), torch.nan)))
    with AsyncRunner(client, SETTINGS, threaded=False) as runner, pytest.raises(InvalidChunkError, match="NaN"):
        runner.step(Observation({"camera": IMAGE}, torch.zeros(2)))


def test_a_deadline(serve, connect):
    release, computed = threading.Event(), []

    def slow(request):
        computed.append(request.delay)
        release.wait(10)
        return ramp(request)

    client = connect(serve(slow), timeout_s=0.2)
    for delay in (1, 2):
        with pytest.raises(PolicyError, match=r"no answer within 0.2 s"):
            client(request_of(delay=delay))
    time.sleep(0.1)
    release.set()
    assert torch.equal(client(request_of(delay=3)), ramp(request_of(delay=3)))
    assert computed == [1, 3], "the second was given up before it began"


def test_a_policy_that_hangs_leaves_the_server_free_to_say_so(serve, connect, caplog):
    release = threading.Event()
    server = serve(lambda request: release.wait(10))
    client = connect(server, timeout_s=0.03)
    for _ in range(CALLS + 1):
        with pytest.raises(PolicyError, match=r"no answer within 0.03 s"):
            client(request_of())
    assert connect(server, timeout_s=2.0).description == DESCRIPTION
    assert "The policy failed." not in caplog.text
    release.set()


def settled(runner):
    asked = runner.manager._asked
    while asked is not None and not asked.pending.done():
        time.sleep(0.001)


SEEN = Observation({"camera": torch.zeros(1)}, torch.zeros(2))


def test_a_server_that_dies_in_mid_episode(serve, connect):
    server = serve()
    client = connect(server, timeout_s=2.0)
    with AsyncRunner(client, SETTINGS) as runner:
        given = [runner.step(SEEN)[0].item() for _ in range(2)]
        server.stop()
        given += [runner.step(SEEN)[0].item() for _ in range(2)]  # the first of these asks
        assert given == [0, 1, 2, 3], "the chunk that was there is used up"
        settled(runner)
        with pytest.raises(PolicyError, match=r"UNAVAILABLE|CANCELLED|no answer"):
            runner.step(SEEN)
        with pytest.raises(NeedsResetError):
            runner.step(SEEN)
        serve(port=server.port)
        runner.reset()
        assert runner.step(SEEN)[0].item() == 0, "it is in touch again"
        assert runner.statistics().late_ticks == 0


def test_an_answer_that_does_not_come_is_no_command(serve, connect):
    release = threading.Event()

    def slow(request):
        if request.leftover is not None:
            release.wait(10)
        return ramp(request)

    client, clock = connect(serve(slow), timeout_s=30), FakeClock()
    with AsyncRunner(client, SETTINGS, clock=clock) as runner:
        assert [runner.step(SEEN)[0].item() for _ in range(5)] == [0, 1, 2, 3, 3], "it holds"
        clock.sleep(1.1)
        with pytest.raises(StaleCommandError):
            runner.step(SEEN)
        release.set()


def test_another_policy_at_the_same_address(serve, connect):
    server = serve()
    client = connect(server, timeout_s=2.0)
    server.stop()
    with pytest.raises(PolicyError, match=r"UNAVAILABLE|CANCELLED"):
        client(request_of())
    serve(description=replace(DESCRIPTION, policy="other"), port=server.port)
    for _ in range(2):
        with pytest.raises(PolicyError, match="serves another policy"):
            client(request_of())


def test_no_server(connect):
    with pytest.raises(PolicyError, match=r"127\.0\.0\.1:1: no answer within 0.1 s"):
        connect("127.0.0.1:1", timeout_s=0.1)
    with pytest.raises(ValueError, match="timeout_s"):
        connect("127.0.0.1:1", timeout_s=0)
    with pytest.raises(ValueError, match="jpeg_quality"):
        connect("127.0.0.1:1", jpeg_quality=100)


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


def served(device):
    """What `--policy` may name."""
    return CountingPolicy(6, 2), replace(DESCRIPTION, policy=f"counting on {device}", inputs=())


NO_FUNCTION = 3


def test_the_command(monkeypatch):
    import typer

    from pronghorn.vlash.serve import serve

    app = typer.Typer()
    app.command()(serve)
    found = []

    def call_and_stop(server):
        with client_module.RemotePolicy(server.address, token="secret") as client:
            found.append((client.description.policy, client(replace(request_of(), leftover=None))[0, 0].item()))
        raise KeyboardInterrupt

    monkeypatch.setattr(PolicyServer, "wait", call_and_stop)
    name = f"{__name__}:served"
    result = CliRunner().invoke(
        app, ["--policy", name, "--port", "0", "--device", "cpu"], env={"PRONGHORN_VLASH_TOKEN": "secret"}
    )
    assert result.exit_code == 0, result.output
    assert found == [("counting on cpu", 100.0)]
    assert "counting on cpu on cpu, for vlash: 127.0.0.1:" in result.output
    assert "secret" not in result.output
    for wrong in ("no.such.module:thing", f"{__name__}:NO_FUNCTION", f"{__name__}:missing"):
        result = CliRunner().invoke(app, ["--policy", wrong])
        assert isinstance(result.exception, ValueError)
