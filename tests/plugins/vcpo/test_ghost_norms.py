"""Ghost norms against one backward for each trajectory, in float64: kinds of layers, packing, LoRA, what is refused."""

import pytest
import torch
from tests.models import tiny_model
from tests.plugins.vcpo.policy import Policy, log_probs, one_by_one, rollouts
from torch import nn

from pronghorn.vcpo import GhostNorms, VCPOSettings, accumulate, accumulate_batched

RANGES = [range(4), range(4, 7)]
EVERYTHING = [range(7)]
CASES = [("group", "paper", RANGES), ("group", "exact", EVERYTHING), ("minibatch", "reference", EVERYTHING),
         ("off", "paper", [range(2), range(2, 7)])]  # fmt: skip


def together(policy, ids):
    def log_probs_of(rows):
        chosen = ids[rows.start : rows.stop]
        return log_probs(policy, chosen), torch.arange(len(rows))[:, None].expand(-1, ids.shape[1] - 1)

    return log_probs_of


@pytest.mark.parametrize(("opob", "weight", "micro_batches"), CASES)
@pytest.mark.parametrize("empty", [False, True])
def test_batched_equals_one_by_one(opob, weight, micro_batches, empty):
    policy, config = Policy(), VCPOSettings(opob=opob, opob_weight=weight)
    ids, minibatch = rollouts(policy, groups=(4, 3))
    if empty:
        minibatch.mask[1] = False
    exact = accumulate(one_by_one(policy, ids), list(policy.parameters()), minibatch, config)
    ghost = accumulate_batched(together(policy, ids), policy, minibatch, config, micro_batches)
    assert_equal(ghost, exact)


def assert_equal(ghost, exact):
    torch.testing.assert_close(ghost.score_norms, exact.score_norms, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ghost.statistics, exact.statistics)
    torch.testing.assert_close(ghost.weights, exact.weights)
    assert ghost.baselines == pytest.approx(exact.baselines)
    for ours, wanted in zip(ghost.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def norms_one_by_one(model, sums):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = [torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True) for one in sums]
    return torch.stack([torch.cat([part.flatten() for part in row]).norm() for row in found])


def assert_weighted(ghosts, model, sums, tolerance=1e-10):
    """What the layers saw gives the gradient of any weighted sum."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.linspace(-1, 2, len(sums)).double()
    wanted = torch.autograd.grad((weights * sums).sum(), parameters, retain_graph=True, materialize_grads=True)
    for found, right in zip(ghosts.weighted(weights, parameters), wanted, strict=True):
        assert (found - right).abs().max() <= tolerance * max(1, right.abs().max())


class Layers(nn.Module):
    """Every kind of layer, one of them used twice."""

    def __init__(self, width, padding_idx=None):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(9, width, padding_idx=padding_idx)
        self.first, self.second = nn.LayerNorm(width), nn.RMSNorm(width)
        self.linear, self.last = nn.Linear(width, width), nn.Linear(width, 9)
        self.double()
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, ids):
        hidden = torch.tanh(self.linear(self.first(self.embedding(ids))))
        return self.last(torch.tanh(self.linear(self.second(hidden))))


@pytest.mark.parametrize("width", [3, 40])  # both ways to square a product
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_kinds_of_layers_in_any_order_of_positions(width, padding_idx):
    model = Layers(width, padding_idx)
    ids = torch.randint(0, 9, (3, 12), generator=torch.Generator().manual_seed(0))
    trajectories = torch.randint(-1, 5, (3, 12), generator=torch.Generator().manual_seed(1))
    with GhostNorms(model) as ghosts:
        values = model(ids).square().sum(-1)
        sums = torch.stack([values[trajectories == number].sum() for number in range(5)])
        found = ghosts.norms(sums.sum(), trajectories, 5, keep_graph=True)
        assert_weighted(ghosts, model, sums)
    torch.testing.assert_close(found, norms_one_by_one(model, sums), rtol=1e-10, atol=0)


def llama(kind, **changes):
    return tiny_model(kind, **changes).double()


def llama_norms(model, packed):
    """Four trajectories, in rows of their own or in two rows with positions and a mask that keep them apart."""
    ids = torch.randint(3, 128, (4, 10), generator=torch.Generator().manual_seed(0))
    trajectories = torch.arange(4)[:, None].expand(-1, 10)
    options = {}
    if packed:
        ids, trajectories = ids.reshape(2, 20), trajectories.reshape(2, 20)
        apart = trajectories[:, None, :, None] == trajectories[:, None, None, :]
        mask = apart & torch.ones(20, 20, dtype=torch.bool).tril()
        options = {"attention_mask": torch.where(mask, 0.0, -torch.inf).double(),
                   "position_ids": torch.arange(10).repeat(2, 2)}  # fmt: skip
    with GhostNorms(model) as ghosts:
        logits = model(ids, **options).logits[:, :-1].log_softmax(-1)
        taken = logits.gather(-1, ids[:, 1:, None])[..., 0].masked_fill(trajectories[:, 1:] != trajectories[:, :-1], 0)
        sums = torch.stack([taken[trajectories[:, :-1] == number].sum() for number in range(4)])
        found = ghosts.norms(sums.sum(), trajectories, 4, keep_graph=True)
        assert_weighted(ghosts, model, sums, 1e-5)
    return found, norms_one_by_one(model, sums)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "llama_tied"])
def test_language_models(kind, packed):
    """Their RMS norms and softmax compute partly in float32."""
    model = llama(kind.removesuffix("_tied"), tie_word_embeddings=kind.endswith("_tied"))
    found, wanted = llama_norms(model, packed)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = ["q_proj", "down_proj"]
    model = get_peft_model(llama("llama"), LoraConfig(r=3, target_modules=targets, init_lora_weights=False)).double()
    found, wanted = llama_norms(model, packed=True)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert all("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_gradient_checkpointing():
    model = llama("llama").train()
    wanted, _ = llama_norms(model, packed=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found, _ = llama_norms(model, packed=False)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_in_bfloat16_both_ways_round_alike():
    """As models are trained: the weighted gradient is as near to float64 as autograd's own is."""
    exact = llama("llama")
    model = tiny_model("llama").bfloat16()
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())  # the same weights, rounded
    ids = torch.randint(3, 128, (4, 10), generator=torch.Generator().manual_seed(0))
    trajectories, weights = torch.arange(4)[:, None].expand(-1, 10), torch.tensor([1.0, -0.5, 0.3, 2.0])

    def sums(policy):
        logits = policy(ids).logits[:, :-1].float() if policy is model else policy(ids).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))

    wanted = torch.autograd.grad((weights.double() * sums(exact)).sum(), list(exact.parameters()))
    with GhostNorms(model) as ghosts:
        found = sums(model)
        ghosts.norms(found.sum(), trajectories, 4, keep_graph=True)
        ours = ghosts.weighted(weights, list(model.parameters()))
        theirs = torch.autograd.grad((weights * found).sum(), list(model.parameters()))
    for mine, other, right in zip(ours, theirs, wanted, strict=True):
        assert (mine.double() - right).norm() <= 1.5 * (other.double() - right).norm() + 1e-3 * right.norm()


def test_what_cannot_be_followed_is_refused():
    with pytest.raises(TypeError, match=r"^model: 0 is a Conv1d, accepted are linear layers"):
        GhostNorms(nn.Sequential(nn.Conv1d(2, 2, 1)))
    with pytest.raises(TypeError, match=r"^model: 0 is a Embedding"):
        GhostNorms(nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)))
    with pytest.raises(TypeError, match=r"^model: model\.embed_tokens is a Gemma3TextScaledWordEmbedding"):
        GhostNorms(llama("gemma3"))  # it computes otherwise than the layer that it is derived from
    model, trajectories = Layers(4), torch.zeros(1, 3, dtype=torch.long)
    with GhostNorms(model) as ghosts:
        total = model(torch.tensor([[1, 2, 3]])).sum() + model.last.weight.sum()
        with pytest.raises(ValueError, match=r"^model: last\.weight is used outside of its layer"):
            ghosts.norms(total, trajectories, 1)
    with GhostNorms(model) as ghosts:
        total = model(torch.tensor([[1, 2, 3]])).sum()
        with pytest.raises(ValueError, match=r"^trajectories: got 0 to 1, wanted -1 to 0"):
            ghosts.norms(total, torch.tensor([[0, 0, 1]]), 1)
    with GhostNorms(model) as ghosts:
        total = model(torch.tensor([[1, 2]])).sum()
        with pytest.raises(ValueError, match=r"^trajectories: got \[1, 3\], but a RMSNorm saw \[1, 2, 4\]"):
            ghosts.norms(total, trajectories, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("opob", ["group", "minibatch", "off"])
def test_micro_batches_that_cut_a_scope(opob, size):
    """A group that goes on over several micro-batches, one that ends where another begins, and all in one."""
    policy, config = Policy(), VCPOSettings(opob=opob)
    ids, minibatch = rollouts(policy, groups=(4, 3, 4))
    micro_batches = [range(start, min(start + size, 11)) for start in range(0, 11, size)]
    ghost = accumulate_batched(together(policy, ids), policy, minibatch, config, micro_batches)
    assert_equal(ghost, accumulate(one_by_one(policy, ids), list(policy.parameters()), minibatch, config))


@pytest.mark.parametrize("micro_batches", [[range(4)], [range(4), range(3, 7)], [range(4, 7), range(4)]])
def test_micro_batches_that_are_not_the_minibatch(micro_batches):
    policy = Policy()
    ids, minibatch = rollouts(policy, groups=(4, 3))
    with pytest.raises(ValueError, match=r"^micro_batches: got .*wanted all of 0 to 6, in order"):
        accumulate_batched(together(policy, ids), policy, minibatch, VCPOSettings(), micro_batches)


@pytest.mark.fault(25)
def test_nothing_learns():
    policy = Policy().requires_grad_(False)
    ids, minibatch = rollouts(policy)
    with pytest.raises(ValueError, match=r"^model: nothing learns"):
        accumulate_batched(together(policy, ids), policy, minibatch, VCPOSettings(), [range(8)])


def test_what_the_learner_must_not_give():
    policy = Policy()
    ids, minibatch = rollouts(policy, groups=(4, 3))

    def log_probs_of(rows):
        values, trajectories = together(policy, ids)(rows)
        return values.masked_fill(torch.tensor(rows.start > 0), torch.nan), trajectories

    with pytest.raises(ValueError, match=r"^trajectory 4: log_probs: got nan at \[0\]"):
        accumulate_batched(log_probs_of, policy, minibatch, VCPOSettings(), RANGES)


@pytest.mark.fault(25)
def test_a_gradient_that_is_not_finite():
    policy = Policy()
    ids, minibatch = rollouts(policy, groups=(7,))

    def log_probs_of(rows):
        values, trajectories = together(policy, ids)(rows)
        values.register_hook(lambda gradient: gradient * torch.inf)
        return values, trajectories

    with pytest.raises(FloatingPointError, match="trajectory 0: the norm of its gradient is nan"):
        accumulate_batched(log_probs_of, policy, minibatch, VCPOSettings(), EVERYTHING)
