"""The optimization of gates; the official numbers are replayed by tests/golden."""

import pathlib
import time

import pytest
import torch
import torch.multiprocessing
from tests.models import token_ids
from tests.plugins.duoattention.conftest import small
from tests.ranks import leave_together, meet, on_two_ranks

from pronghorn import estimate
from pronghorn.duoattention.find import find_heads, rehearse
from pronghorn.duoattention.gates import GateOptimizer, distillation_loss, learning_rate_factor
from pronghorn.duoattention.sequence_parallel import SequenceParallel
from pronghorn.duoattention.transformers.gated import TwoStreams
from pronghorn.files.json_files import load_json, save_json
from pronghorn.kernels._operation import relative_error

MASK = {"sink_size": 3, "recent_size": 6}


def samples(count=4, tokens=32):
    found = []
    for seed in range(count):
        ids = token_ids(1, tokens, seed)[0]
        labels = torch.full_like(ids, -100)
        labels[-8:] = ids[-8:]
        found.append({"input_ids": ids, "labels": labels})
    return found


def hidden(model, ids):
    with torch.no_grad():
        return model.get_decoder()(ids).last_hidden_state


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("dense_branch", ["teacher", "student"])
def test_gates_of_one_are_the_teacher(family, dense_branch):
    model, ids = small(family), token_ids(2, 32)
    wanted = hidden(model, ids)
    with TwoStreams(model, [torch.ones(2)] * 2, dense_branch=dense_branch, **MASK) as streams:
        teacher, student = streams(ids)
    assert relative_error(teacher, wanted) < 1e-5
    assert relative_error(student, teacher) < 1e-5
    assert model.config._attn_implementation == "sdpa"


def test_gates_of_zero_are_the_streaming_model():
    model, ids = small(), token_ids(2, 32)
    place = torch.arange(32)
    mask = (place <= place[:, None]) & ((place < 3) | (place > place[:, None] - 6))
    with torch.no_grad():
        wanted = model.get_decoder()(ids, attention_mask=mask.expand(2, 1, 32, 32)).last_hidden_state
    with TwoStreams(model, [torch.zeros(2)] * 2, **MASK) as streams:
        assert relative_error(streams(ids)[1], wanted) < 1e-5


def test_at_one_only_the_regularization_moves_the_gates():
    model, (sample, *_) = small(), samples()
    optimizer = GateOptimizer((2, 2), num_steps=10, reg_weight=0.05)
    gradients = []
    for gate in optimizer.gates:
        gate.register_hook(gradients.append)
    with TwoStreams(model, optimizer.gates, **MASK) as streams:
        found = optimizer.train_step(streams, sample["input_ids"][None], sample["labels"][None])
    assert found.distillation < 1e-10
    assert torch.allclose(torch.cat(gradients), torch.full((4,), 0.05 / 4), atol=1e-6)


def test_the_learning_rate_goes_up_and_down():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9] == 0.5
    assert factors[19:81] == [1.0] * 62
    assert factors[99] == 0.1
    assert all(0.1 <= factor <= 1 for factor in factors)


def test_the_loss_counts_labels_where_they_stand():
    teacher, student = torch.zeros(1, 4, 2), torch.tensor([[[9.0, 9], [1, 1], [9, 9], [2, 0]]])
    labels = torch.tensor([[-100, 5, -100, 7]])
    assert float(distillation_loss(teacher, student, labels)) == pytest.approx((1 + 2) / 2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.fault(8, 9)
def test_an_interrupted_run_ends_where_it_would_have(tmp_path, checkpointing):
    options = {"num_steps": 7, "lr": 0.1, "block_size": None, "save_steps": 2, "state_dir": tmp_path,
               "gradient_checkpointing": checkpointing, **MASK}  # fmt: skip
    model, data = small(), samples()
    wanted = find_heads(model, data, **{**options, "state_dir": None}).gates

    def stop(found, optimizer):
        if found.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_heads(model, data, **options, on_step=stop)
    assert model.config._attn_implementation == "sdpa"
    steps = []
    assert find_heads(model, data, **options, on_step=lambda found, _: steps.append(found.step)).gates == wanted
    assert steps == [4, 5, 6]
    with pytest.raises(ValueError, match="reg_weight"):
        find_heads(model, data, **options, reg_weight=0.1)
    with pytest.raises(ValueError, match="weights"):
        find_heads(small(seed=1), data, **options)


def broken_off(state, data, **options):
    """The options of a run that was broken off when it had kept two of four steps."""
    options = {"num_steps": 4, "block_size": None, "save_steps": 2, "state_dir": state, **MASK, **options}

    def stop(found, optimizer):
        if found.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_heads(small(), data, **options, on_step=stop)
    return options


def test_a_dry_run_counts_the_lengths_of_the_steps_to_come(monkeypatch):
    """Each step takes as many seconds as its sample has tokens, and few samples are long."""
    data = [sample for tokens in (16, 17, 18, 20, 90) for sample in samples(1, tokens)]
    lengths, clock, step = [], [time.perf_counter()], GateOptimizer.train_step

    def timed(optimizer, streams, input_ids, labels):
        lengths.append(input_ids.shape[1])
        clock[0] += lengths[-1]
        return step(optimizer, streams, input_ids, labels)

    monkeypatch.setattr(GateOptimizer, "train_step", timed)
    monkeypatch.setattr(estimate, "now", lambda device: clock[0])
    options = {"num_steps": 13, "seed": 3, **MASK}
    said = rehearse(small(), data, **options)
    assert set(lengths) == {16, 17, 18, 20, 90}
    lengths.clear()
    find_heads(small(), data, **options)
    assert said.seconds == pytest.approx(sum(lengths), rel=0.01)


@pytest.mark.parametrize("name", ["input_ids", "labels"])
@pytest.mark.fault(9)
def test_other_samples_do_not_continue_a_run(tmp_path, name):
    """Whichever it is, also one that is not drawn before the run was broken off."""
    options = broken_off(tmp_path, samples())
    for index in range(4):
        other = samples()
        other[index][name] = other[index][name].clone()
        other[index][name][-1] = 5
        with pytest.raises(ValueError, match="differ: data"):
            find_heads(small(), other, **options)
    find_heads(small(), samples(), **options)


@pytest.mark.fault(9)
def test_no_more_samples_are_read_than_there_are_steps(tmp_path):
    """A data set may be far larger than what a run takes of it."""

    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    data = Counted(samples(9))
    find_heads(small(), data, num_steps=2, block_size=None, state_dir=tmp_path, **MASK)
    assert data.reads == 2 + 2


@pytest.mark.parametrize("part", ["torch", "transformers", "pronghorn", "code"])
@pytest.mark.fault(9)
def test_other_versions_and_code_do_not_continue_a_run(tmp_path, part):
    options = broken_off(tmp_path, samples())
    path = tmp_path / "fingerprint.json"
    save_json(path, {**load_json(path, newest=2), part: "0.0"}, format=2)
    with pytest.raises(ValueError, match=f"differ: {part}"):
        find_heads(small(), samples(), **options)


def test_the_model_is_left_as_it_was():
    model = small().train()
    model.model.layers[0].self_attn.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_heads(model, samples(), num_steps=2, block_size=None, **MASK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not model.model.layers[0].self_attn.training
    assert not model.is_gradient_checkpointing


def test_gates_can_be_bf16():
    found = find_heads(small(), samples(), num_steps=3, lr=0.2, gate_dtype=torch.bfloat16, block_size=None, **MASK)
    table = torch.tensor(found.gates)
    assert torch.equal(table, table.bfloat16().float())
    assert (table != 1).all()


def retriever():
    """Qwen2 with one head, layer 1's second, that finds a marked token wherever it stands; no other looks far."""
    model = small("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e9}, head_dim=16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight.mul_(0.02)
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                linear.weight.mul_(0.02)
                linear.bias.zero_()
        marked, attention = range(3, 11), model.model.layers[1].self_attn
        mark = torch.zeros(64)
        mark[:8] = 3.0
        model.model.embed_tokens.weight[:, :8] = 0
        for token in marked:
            model.model.embed_tokens.weight[token, :8] = mark[:8]
        heads = slice(32, 64)  # the two query heads of the second key/value head
        slow = 15  # the pair of channels that RoPE hardly turns: 7 and 15
        attention.q_proj.bias[heads] = 0
        attention.q_proj.bias[32 + slow] = attention.q_proj.bias[48 + slow] = 30.0
        attention.k_proj.weight[16 + slow, :8] = 0.5
        attention.o_proj.weight[:, heads].mul_(50 * 4)
    return model, list(marked)


def marked_samples(marked, count=8, tokens=64):
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        ids = torch.randint(20, 128, (tokens,), generator=generator)
        ids[16] = marked[index % len(marked)]
        labels = torch.full_like(ids, -100)
        labels[-8:] = ids[-8:]
        found.append({"input_ids": ids, "labels": labels})
    return found


@pytest.mark.parametrize("method", ["optimise", "on_the_fly"])
def test_a_known_retrieval_head_is_found(method):
    model, marked = retriever()
    found = find_heads(
        model, marked_samples(marked), method=method, num_steps=60, lr=0.1, reg_weight=0.05, block_size=None,
        gradient_checkpointing=False, **MASK,
    )  # fmt: skip
    gates = torch.tensor(found.gates)
    assert gates[1, 1] > 0.5, gates
    gates[1, 1] = 0
    assert gates.max() < 0.35, found.gates


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "guess"}, "method"), ({"num_steps": 0}, "num_steps"), ({"dense_branch": "both"}, "dense_branch"),
    ({"method": "on_the_fly", "samples": 0}, "samples"),
])  # fmt: skip
@pytest.mark.fault(7)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        find_heads(small(), samples(), **options)
    with pytest.raises(ValueError, match="dataset"):
        find_heads(small(), [])


@pytest.mark.fault(6, 7)
def test_bad_data_and_models_are_refused():
    sample = {"input_ids": token_ids(1, 8)[0], "labels": torch.full((8,), -100)}
    with pytest.raises(ValueError, match="labels"):
        find_heads(small(), [sample], block_size=None, **MASK)
    with pytest.raises(ValueError, match="softcap"):
        find_heads(small("gemma2"), samples(), block_size=None, **MASK)
    broken = small()
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.norm\.weight: holds NaN or Inf"):
        find_heads(broken, samples(), block_size=None, **MASK)


def shared_run(rank, port, folder):
    meet(rank, port)
    torch.set_num_threads(1)
    parallel = SequenceParallel(torch.distributed.group.WORLD)
    options = {"num_steps": 3, "lr": 0.1, "block_size": None, **MASK}
    found = find_heads(small(), samples(tokens=31), parallel=parallel, **options)
    try:
        find_heads(small(), samples(tokens=31)[: 1 + rank], parallel=parallel, **options, seed=1)
    except ValueError as error:
        pathlib.Path(f"{folder}/{rank}.txt").write_text(str(error))
    torch.save(torch.tensor(found.gates), f"{folder}/{rank}.pt")
    leave_together()


def test_two_processes_find_what_one_does(tmp_path):
    on_two_ranks(shared_run, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = find_heads(small(), samples(tokens=31), num_steps=3, lr=0.1, block_size=None, **MASK)
    assert torch.equal(one, two)
    assert all("different samples" in (tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert torch.allclose(one, torch.tensor(alone.gates), atol=1e-6)


def test_ranks_must_share_heads_evenly():
    parallel = SequenceParallel()
    parallel.size = 3
    with pytest.raises(ValueError, match="divisor"):
        parallel.own_heads(torch.ones(8))
