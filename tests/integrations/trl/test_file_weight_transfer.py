"""Weights by files: what is written, what the server is asked, and what its refusals say."""

import http.server
import json
import threading
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from safetensors.torch import load_file

from pronghorn.trl import file_weight_transfer
from pronghorn.trl.file_weight_transfer import FileWeightTransfer


@pytest.fixture
def server():
    """A server of vLLM's addresses; it keeps what it was asked, and the weights that it was given."""
    PartialState(cpu=True)  # TRL's log needs one
    asked, refusals = [], {}

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"vllm_config": {"model_config": {"dtype": "torch.float32"}}})

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/collective_rpc":
                call = json.loads(body)
                folder = Path(call["kwargs"]["path"])
                files = sorted(folder.glob("*"))
                weights = {name: value for file in files for name, value in load_file(file).items()}
                asked.append((call["method"], [file.name for file in files], weights))
                others = sorted(path.name for path in folder.parent.iterdir() if path != folder)
                asked.append(("beside it", others))
            else:
                asked.append(self.path)
            self.answer({"results": [None]})

        def answer(self, content):
            body = json.dumps(content).encode()
            self.send_response(refusals.get(self.path.split("?")[0], 200))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            """Says nothing."""

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    found.address, found.asked, found.refusals = f"http://127.0.0.1:{found.server_address[1]}", asked, refusals
    yield found
    found.shutdown()


def weights(value=1.0, dtype=torch.float32):
    return {"a.weight": torch.full((2, 3), value, dtype=dtype), "b.weight": torch.full((4,), value, dtype=dtype)}


def test_weights_are_handed_over_in_files(server, tmp_path, caplog):
    transfer = FileWeightTransfer(server.address, tmp_path / "weights")
    transfer.init_weight_transfer()
    for value in (1.0, 2.0, 3.0):
        transfer.pause()
        transfer.send_weights(iter(weights(value).items()))
        transfer.resume()
        assert server.asked[0] == "/pause?mode=keep"
        method, files, found = server.asked[1]
        assert (method, files) == ("load_weight_files", ["model-00000.safetensors"])
        assert all(torch.equal(found[name], weight) for name, weight in weights(value).items())
        assert server.asked[2] == ("beside it", [f"weights-{int(value) - 1}"] * (value > 1))
        assert server.asked[3] == "/resume"
        server.asked.clear()
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["weights-3"]
    transfer.destroy()
    assert not list((tmp_path / "weights").iterdir())
    assert not caplog.records


def test_many_weights_are_many_files(server, tmp_path, monkeypatch):
    monkeypatch.setattr(file_weight_transfer, "SHARD_BYTES", 24)
    transfer = FileWeightTransfer(server.address, tmp_path)
    transfer.send_weights(iter({**weights(), "c.weight": torch.zeros(1)}.items()))
    assert server.asked[0][1] == ["model-00000.safetensors", "model-00001.safetensors"]
    assert set(server.asked[0][2]) == {"a.weight", "b.weight", "c.weight"}


def test_another_precision_is_told_once(server, tmp_path, caplog):
    transfer = FileWeightTransfer(server.address, tmp_path)
    transfer.init_weight_transfer()
    for _ in range(2):
        transfer.send_weights(iter(weights(dtype=torch.bfloat16).items()))
    assert caplog.text.count("weights are bfloat16, the server computes in float32") == 1


@pytest.mark.fault(25)
def test_what_a_server_may_refuse(server, tmp_path):
    transfer = FileWeightTransfer(server.address, tmp_path)
    server.refusals |= {"/server_info": 404, "/collective_rpc": 500}
    with pytest.raises(RuntimeError, match="tells nothing of itself; start it with VLLM_SERVER_DEV_MODE=1"):
        transfer.init_weight_transfer()
    with pytest.raises(
        RuntimeError, match="it is to see that folder, and to run with --worker-extension-cls pronghorn"
    ):
        transfer.send_weights(iter(weights().items()))
    with pytest.raises(TimeoutError):
        FileWeightTransfer("http://127.0.0.1:1", tmp_path, ready_seconds=0.0).init_weight_transfer()


@pytest.mark.fault(10)
def test_a_disk_that_is_full(server, tmp_path):
    """The server is asked nothing, and the weights before stay."""
    transfer = FileWeightTransfer(server.address, tmp_path)
    transfer.send_weights(iter(weights().items()))
    server.asked.clear()

    def breaks():
        yield "a.weight", torch.zeros(2)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        transfer.send_weights(breaks())
    assert not server.asked
    assert (tmp_path / "weights-1" / "model-00000.safetensors").exists()
    transfer.send_weights(iter(weights().items()))
    assert [path.name for path in tmp_path.iterdir()] == ["weights-3"]
