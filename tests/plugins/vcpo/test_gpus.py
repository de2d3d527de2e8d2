"""On GPUs: both ways in which TRL samples with vLLM, and FSDP through accelerate."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import transformers
from tests.plugins.vcpo.addition import llama, tokenizer
from tests.plugins.vcpo.test_trainer import SeededRollouts, logged, trained

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
on_gpu = {"use_cpu": False, "bf16": False}


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ---- Sampling by vLLM ------------------------------------------------------------------------------------------------


@pytest.fixture
def policy(tmp_path):
    """A folder with a policy whose heads are of a size that vLLM has kernels for."""
    model = llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    model.save_pretrained(tmp_path / "policy")
    tokenizer().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def server(policy):
    """The port of `trl vllm-serve` on the last GPU."""
    port = _port()
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": str(GPUS - 1)}
    command = [sys.executable, "-m", "trl.scripts.vllm_serve", "--model", str(policy), "--port", str(port),
               "--dtype", "float32", "--max-model-len", "32", "--gpu-memory-utilization", "0.2",
               "--enforce-eager", "true"]  # fmt: skip
    process = subprocess.Popen(command, env=env)
    yield port
    process.terminate()
    process.wait(30)


def _learn(_, policy, folder, settings):
    """Five updates, each of which moves the policy by much, in a process that sees one GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    trainer = trained(
        folder, steps=5, model=transformers.AutoModelForCausalLM.from_pretrained(policy), use_vllm=True,
        vllm_max_model_length=32, vllm_gpu_memory_utilization=0.2, ess_scaling="off", **settings, **on_gpu,
    )  # fmt: skip
    torch.save([logged(trainer, name) for name in ("vcpo/ess_ratio", "grad_norm")], f"{folder}.pt")


def check(policy, folder, **settings):
    """The sampler's log-probabilities are those of the weights that the learner has: after each update they arrived."""
    torch.multiprocessing.spawn(_learn, (policy, folder, settings))
    ratios, norms = torch.load(f"{folder}.pt")
    assert ratios == pytest.approx([1.0] * 5, abs=0.02)
    assert all(norm > 0 for norm in norms)


@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
def test_vllm_beside_the_learner(policy, tmp_path):
    pytest.importorskip("vllm")
    check(policy, tmp_path / "out", vllm_mode="colocate")


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_vllm_as_a_server(policy, server, tmp_path):
    pytest.importorskip("vllm")
    check(policy, tmp_path / "out", vllm_mode="server", vllm_server_port=server)


# ---- Sharded parameters ----------------------------------------------------------------------------------------------


def _rank(rank, world, port, folder):
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        how = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        how = {}
    trainer = trained(folder, steps=2, rollout_func=SeededRollouts(), per_device_train_batch_size=8 // world,
                      opob="group", opob_grad_norm="ghost", **how, **on_gpu)  # fmt: skip
    whole = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()
        for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
    }
    kind = str(trainer.accelerator.distributed_type)
    torch.save((whole, kind, logged(trainer, "grad_norm")), f"{folder}-{rank}.pt")


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_sharded_parameters_learn_what_whole_ones_do(tmp_path):
    for name, world in (("alone", 1), ("sharded", 2)):
        torch.multiprocessing.spawn(_rank, (world, _port(), str(tmp_path / name)), nprocs=world)
    alone, _, norms = torch.load(tmp_path / "alone-0.pt")
    for rank in range(2):
        found, kind, sharded_norms = torch.load(tmp_path / f"sharded-{rank}.pt")
        assert kind == "DistributedType.FSDP"
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-4)
        if rank == 0:  # which logs
            assert sharded_norms == pytest.approx(norms, rel=1e-3)
