"""A policy server and its clients on this machine: the same chunks, and an error whenever there is none."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from tests.plugins.vlash.remote_calls import DESCRIPTION, IMAGE, SETTINGS, message, ramp, raw, request_of
from tests.plugins.vlash.stubs import CountingPolicy, FakeClock
from typer.testing import CliRunner

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.remote import MessageError, PolicyServer, RemotePolicy
from pronghorn.vlash.remote import client as client_module
from pronghorn.vlash.remote.container import VersionError, pack, unpack
from pronghorn.vlash.remote.server import CALLS
from pronghorn.vlash.runner import AsyncRunner
from pronghorn.vlash.watchdog import InvalidChunkError, NeedsResetError, PolicyError, StaleCommandError


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


@pytest.mark.parametrize("state", [(1.0, 2.0), ((1.0, 2.0), (3.0, 4.0))])
def test_a_remote_chunk_is_the_local_one(serve, connect, state):
    client = connect(serve())
    assert client.description == DESCRIPTION
    request = request_of(state)
    assert torch.equal(client(request), ramp(request))
    assert client.seconds >= 0
    double = replace(request, state=request.state.double())
    assert client(double).dtype == torch.float64


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


@pytest.mark.fault(19)
def test_other_versions_are_told_so(serve, monkeypatch, connect):
    code, details = raw(serve(), message({"version": 3}))
    assert code == "FAILED_PRECONDITION"
    assert "same Pronghorn" in details
    newer = pack("description", {"policy": ""}, {}).replace(b'\\"version\\": 2', b'\\"version\\": 3')
    with pytest.raises(VersionError, match="got 3, wanted 2"):
        unpack(newer, "description", ())
    monkeypatch.setattr(PolicyServer, "_describe", lambda *ignored: newer)
    with PolicyServer(ramp, DESCRIPTION) as other, pytest.raises(PolicyError, match="got 3, wanted 2"):
        connect(other)


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


@pytest.mark.fault(26)
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


@pytest.mark.fault(26)
def test_a_chunk_that_is_not_finite_reaches_no_robot(serve, connect):
    client = connect(serve(lambda request: torch.full((6, 2), torch.nan)))
    with AsyncRunner(client, SETTINGS, threaded=False) as runner, pytest.raises(InvalidChunkError, match="NaN"):
        runner.step(Observation({"camera": IMAGE}, torch.zeros(2)))


@pytest.mark.fault(26)
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


@pytest.mark.fault(26)
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


@pytest.mark.fault(26)
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


@pytest.mark.fault(26)
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
