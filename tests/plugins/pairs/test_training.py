"""VCPO with each method that a policy can have: the same steps as without it, or a refusal before the first one."""

import pytest
import torch
from peft import LoraConfig
from tests.plugins.vcpo.addition import SMALL, first_digit, llama, sums, tokenizer
from tests.plugins.vcpo.test_async_trainer import in_process, made
from tests.plugins.vcpo.test_trainer import SeededRollouts, logged, trained, weights
from torch import nn
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

import pronghorn.torchsparse as ts
import pronghorn.transformers  # noqa: F401 - registers
from pronghorn.awq import AwqConfig, prepare_lora
from pronghorn.duoattention import DuoAttentionConfig, apply_duo
from pronghorn.vcpo import Minibatch, VCPOConfig, VCPOSettings, VCPOTrainer, accumulate, accumulate_batched
from pronghorn.vcpo.trl.callback import VCPOCallback

STREAMING = {"gates": [[1.0, 0.0], [0.0, 1.0]], "threshold": 0.5, "sink_size": 1, "recent_size": 1}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Where a policy with packed weights lies."""
    folder = tmp_path_factory.mktemp("packed")
    llama().save_pretrained(folder / "whole")
    config = AwqConfig(group_size=32, method="rtn")
    model = AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder / "packed")
    return str(folder / "packed")


def policy(packed):
    return AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)


def adapter():
    return prepare_lora(LoraConfig(target_modules=["q_proj", "v_proj"], r=4))


def learned(trainer):
    return {name: value for name, value in weights(trainer).items() if "lora" in name}


@pytest.mark.parametrize("norms", ["exact", "ghost"])
def test_adapters_learn_on_packed_weights(packed, norms, tmp_path):
    settings = {"rollout_func": SeededRollouts(), "opob_grad_norm": norms, "save_records": False}
    ours = trained(tmp_path / "a", model=policy(packed), peft_config=adapter(), **settings)
    theirs = trained(tmp_path / "b", model=policy(packed).dequantize(), peft_config=adapter(), **settings)
    torch.testing.assert_close(learned(ours), learned(theirs), rtol=1e-4, atol=1e-6)
    assert any(value.abs().max() > 0 for name, value in learned(ours).items() if "lora_B" in name)
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-4)


def test_a_packed_policy_samples_with_lag(packed, tmp_path):
    trainer = trained(tmp_path, model=policy(packed), peft_config=adapter(), lag=1, save_records=False)
    first, *later = logged(trainer, "vcpo/ess_ratio")
    assert first == pytest.approx(1, abs=1e-6)
    assert all(ratio < 1 - 1e-5 for ratio in later)


def test_packed_weights_do_not_learn(packed, tmp_path):
    with pytest.raises(ValueError, match="attach trainable adapters on top of the quantized model"):
        trained(tmp_path, model=policy(packed))
    with pytest.raises(ValueError, match=r"Target module AwqLinear.* is not supported"):
        trained(tmp_path, model=policy(packed), peft_config=LoraConfig(target_modules=["q_proj"]))


def test_packed_weights_are_not_handed_to_vllm(packed, tmp_path):
    for model in (policy(packed), packed):
        with pytest.raises(ValueError, match=r"^use_vllm: got True.* cannot be merged into packed weights"):
            trained(tmp_path, model=model, peft_config=adapter(), use_vllm=True)
    config = {"peft_config": adapter()}
    with pytest.raises(ValueError, match=r"^weight_transfer: got one that sends whole weights"):
        made(tmp_path, packed, worker=in_process(packed), trainer=config)


def test_without_its_cache_duoattention_changes_no_step(tmp_path):
    model = llama()
    apply_duo(model, DuoAttentionConfig(**STREAMING))
    ours, theirs = (trained(tmp_path / name, model=of) for name, of in (("a", model), ("b", llama())))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-6)
    assert logged(ours, "vcpo/ess_ratio") == pytest.approx([1] * 3, abs=1e-5)


class StreamingRollouts:
    """Samples with DuoAttention's cache, and keeps by how much the learner's log-probabilities differ."""

    def __init__(self, model, gates):
        self.model, self.gaps = model, []
        self.duo = apply_duo(model, DuoAttentionConfig(**{**STREAMING, "gates": gates}))

    def __call__(self, prompts, trainer):
        ids = torch.tensor([trainer.processing_class(prompt)["input_ids"] for prompt in prompts])
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=self.duo.make_cache(), max_new_tokens=4,
            min_new_tokens=4, do_sample=True, top_k=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        new = found.sequences[:, ids.shape[1] :]
        sampler = torch.stack(found.logits, dim=1).log_softmax(-1).gather(-1, new[..., None])[..., 0]
        with torch.no_grad():
            logits = self.model(found.sequences).logits[:, ids.shape[1] - 1 : -1]
        learner = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
        self.gaps.append((learner - sampler).sum(1).double())
        return {"prompt_ids": ids.tolist(), "completion_ids": new.tolist(), "logprobs": sampler.tolist()}


@pytest.mark.parametrize("streaming", [True, False], ids=["half of the heads stream", "none does"])
def test_ratios_are_to_a_sampler_with_streaming_heads(streaming, tmp_path):
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)  # so that attention matters
    rollouts = StreamingRollouts(model, STREAMING["gates"] if streaming else [[1.0, 1.0]] * 2)
    trainer = trained(tmp_path, steps=2, model=model, rollout_func=rollouts, max_completion_length=4)
    for gap, found in zip(rollouts.gaps, logged(trainer, "vcpo/ess_ratio"), strict=True):
        ratios = (gap - gap.max()).exp()
        assert found == pytest.approx(float(ratios.sum() ** 2 / (ratios**2).sum() / len(ratios)), rel=1e-3)
        assert (found < 0.99) == streaming


class Sites(nn.Module):
    """Log-probabilities of an action at each site of a grid, by a layer that is sparse or dense."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        dense = nn.Linear(4, 5)
        self.layer = ts.nn.Conv3d(4, 5, 1, bias=True) if sparse else dense
        if sparse:
            with torch.no_grad():
                self.layer.kernel.copy_(dense.weight.T.reshape(self.layer.kernel.shape))
                self.layer.bias.copy_(dense.bias)
        self.sparse = sparse

    def forward(self, features):
        """[sites, 4] to [sites, 5]."""
        if not self.sparse:
            return self.layer(features).log_softmax(-1)
        places = torch.arange(len(features), dtype=torch.int32)
        coords = torch.stack([places * 0, places, places * 0, places * 0], dim=1)
        return self.layer(ts.SparseTensor(features, coords)).feats.log_softmax(-1)


def of_sites(model):
    """What a step asks a policy for, and its minibatch: eight trajectories of six actions."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(8, 6, 4, generator=generator)
    actions = torch.randint(5, (8, 6), generator=generator)
    sampler = -1.6 + 0.3 * torch.randn(8, 6, generator=generator)
    rewards = torch.rand(8, generator=generator)
    minibatch = Minibatch(sampler, torch.ones(8, 6, dtype=torch.bool), rewards, torch.zeros(8), torch.arange(8) // 4)
    return lambda row: model(features[row]).gather(1, actions[row, :, None])[:, 0], minibatch


def test_a_policy_with_sparse_convolutions():
    found = []
    for sparse in (True, False):
        model = Sites(sparse)
        log_probs_of, minibatch = of_sites(model)
        found.append(accumulate(log_probs_of, list(model.parameters()), minibatch, VCPOSettings()))
    ours, theirs = found
    torch.testing.assert_close(ours.score_norms, theirs.score_norms, rtol=1e-4, atol=1e-6)
    (kernel, bias), (weight, dense_bias) = ours.gradients, theirs.gradients
    torch.testing.assert_close(kernel.reshape(4, 5).T, weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bias, dense_bias, rtol=1e-4, atol=1e-6)
    assert weight.abs().max() > 1e-3


def test_ghost_norms_name_a_sparse_convolution():
    model = Sites(True)
    _, minibatch = of_sites(model)
    with pytest.raises(TypeError, match="model: layer is a Conv3d, accepted are linear layers"):
        accumulate_batched(None, model, minibatch, VCPOSettings(opob_grad_norm="ghost"), [range(8)])


def test_a_rate_is_scaled_once(tmp_path):
    named = {"train_dataset": sums(), "processing_class": tokenizer()}
    ours = VCPOTrainer(llama(), first_digit, VCPOConfig(str(tmp_path), **SMALL), **named)
    with pytest.raises(ValueError, match="this VCPOTrainer scales its learning rate by effective samples already"):
        VCPOCallback(ours)
    theirs = GRPOTrainer(llama(), first_digit, GRPOConfig(str(tmp_path), **SMALL), **named)
    VCPOCallback(theirs)
    with pytest.raises(ValueError, match="this GRPOTrainer scales its learning rate"):
        VCPOCallback(theirs)
