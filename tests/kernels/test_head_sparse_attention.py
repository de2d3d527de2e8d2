"""Attention with a kind of sparsity for each head: its masks, what its tiles read, and its gradients."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.kernels.harness import DEVICE, backend
from torch.nn.attention.bias import causal_lower_right

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.head_sparse_attention import DENSE, STREAMING, head_sparse_attention
from pronghorn.kernels.head_sparse_attention.cases import OPERATION, visible_pairs
from pronghorn.kernels.head_sparse_attention.reference import visible

GOLDEN = Path(__file__).parents[1] / "golden/data/duoattention/streaming_masks.safetensors"
BACKENDS = ["reference", "triton"]
TRAINED = OPERATION.trains


def types_of(*types):
    return torch.tensor(types, dtype=torch.int32, device=DEVICE)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def example(knobs, dtype=torch.float32, seed=0):
    return OPERATION.example(knobs, dtype, torch.Generator().manual_seed(seed), DEVICE)


def results(arguments, which, grad=None):
    """The output and the gradients of query, key and value, by one backend."""
    inputs = {name: arguments[name].detach().clone().requires_grad_() for name in TRAINED}
    with backend(which):
        out = head_sparse_attention(**{**arguments, **inputs})
        out.backward(random(*out.shape, seed=9, dtype=out.dtype) if grad is None else grad)
    return out.detach(), *(inputs[name].grad for name in TRAINED)


def by_definition(arguments):
    """The same by PyTorch's own operations and their gradients, with the mask written out, in float64."""
    inputs = [arguments[name].detach().double().requires_grad_() for name in TRAINED]
    query, group = inputs[0], inputs[0].shape[1] // inputs[1].shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in inputs[1:])
    sizes = {name: arguments[name] for name in ("sink_size", "recent_size", "start")}
    mask = visible(
        arguments["head_types"], query.shape[2], key.shape[2], **sizes, block_size=arguments["block_size"] or 1
    )
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if arguments["softcap"]:
        scores = arguments["softcap"] * torch.tanh(scores / arguments["softcap"])
    weights = scores.masked_fill(~mask, -1e300).softmax(dim=-1) * mask.any(dim=-1, keepdim=True)
    out = weights @ value
    out.backward(random(*out.shape, seed=9, dtype=arguments["query"].dtype).double())
    return out.detach(), *(tensor.grad for tensor in inputs)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 by 16 and 16 by 32, so that small problems have several, with and without masks."""
    shrink_tiles(monkeypatch)


def shrink_tiles(monkeypatch):
    from pronghorn.kernels.head_sparse_attention import triton, triton_backward

    small = triton.Tile(16, 16, 4, 1)
    monkeypatch.setattr(triton, "FORWARD_FP32", small)
    monkeypatch.setattr(triton_backward, "QUERY_FP32", small._replace(keys=32))
    monkeypatch.setattr(triton_backward, "KEY_FP32", small._replace(rows=32))


@pytest.mark.parametrize("name", load_file(GOLDEN))
def test_official_masks_by_tokens(name):
    wanted = load_file(GOLDEN)[name].bool()
    _, sink, recent = map(int, re.findall(r"\d+", name))
    ours = visible(torch.tensor([STREAMING]), *wanted.shape, sink_size=sink, recent_size=recent)
    assert torch.equal(ours[0, 0], wanted)


@pytest.mark.parametrize(("tokens", "length"), [(64, 64), (40, 104), (33, 50), (20, 95), (1, 70)])
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (16, 16), (3, 17), (33, 40)])
def test_masks_in_blocks_follow_the_rule(tokens, length, sink, recent):
    block = 16
    sinks, locals_ = math.ceil(sink / block), math.ceil(recent / block)
    wanted = torch.zeros(tokens, length, dtype=torch.bool)
    for i in range(tokens):
        limit = math.ceil((length - tokens) / block) + 1 + i // block
        for j in range(i + length - tokens + 1):
            wanted[i, j] = j // block < sinks or limit - locals_ <= j // block < limit
    rule = {"sink_size": sink, "recent_size": recent, "block_size": block}
    ours = visible(torch.tensor([STREAMING, DENSE]), tokens, length, **rule)
    assert torch.equal(ours[0, 0], wanted)
    assert torch.equal(ours[0, 1], torch.ones(tokens, length).tril(length - tokens).bool())


def test_the_sink_begins_after_the_padding():
    start = torch.tensor([0, 3, 6], dtype=torch.int32)
    ours = visible(torch.tensor([STREAMING]), 6, 6, sink_size=1, recent_size=2, start=start)[:, 0]
    assert [row.nonzero().flatten().tolist() for row in ours[0]] == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4],
                                                                     [0, 4, 5]]  # fmt: skip
    assert [row.nonzero().flatten().tolist() for row in ours[1]] == [[], [], [], [3], [3, 4], [3, 4, 5]]
    assert not ours[2].any()


@pytest.mark.parametrize("knobs", OPERATION.shapes, ids=range(len(OPERATION.shapes)))
def test_cost_counts_what_the_mask_shows(knobs):
    arguments = example(knobs)
    sizes = {name: arguments[name] for name in ("sink_size", "recent_size", "start")}
    mask = visible(
        arguments["head_types"], knobs["tokens"], knobs["length"], **sizes, block_size=arguments["block_size"] or 1
    )
    assert visible_pairs(knobs) == mask.sum() * (knobs["batch"] if len(mask) == 1 else 1)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("tokens", [70, 33, 1])
def test_dense_heads_equal_torch(tokens, which):
    query, key, value = random(2, 4, tokens, 32), random(2, 2, 70, 32, seed=1), random(2, 2, 70, 32, seed=2)
    bias = causal_lower_right(tokens, 70)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
    with backend(which):
        ours = head_sparse_attention(query, key, value, types_of(0, 0, 0, 0), sink_size=4, recent_size=4)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", BACKENDS)
def test_a_streaming_head_sees_its_sink_and_its_window_alone(which):
    query, key, value = (random(1, 2, 60, 16, seed=seed) for seed in range(3))
    rule = {"head_types": types_of(STREAMING, DENSE), "sink_size": 4, "recent_size": 8}
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, 4:52], other_value[:, :, 4:52] = 3.0, -5.0
    with backend(which):
        before = head_sparse_attention(query, key, value, **rule)[:, :, -1]
        after = head_sparse_attention(query, other_key, other_value, **rule)[:, :, -1]
        inside = head_sparse_attention(query, key, value.index_fill(2, torch.tensor([52], device=DEVICE), 9.0), **rule)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])
    assert not torch.allclose(before[:, 0], inside[:, 0, -1])


def test_only_tiles_that_a_head_sees_are_visited(small_tiles):
    """Everything else is not a number, which one multiplication, even by 0, would spread."""
    query, key, value = (random(1, 2, 160, 16, seed=seed).requires_grad_() for seed in range(3))
    rule = {"head_types": types_of(STREAMING, STREAMING), "sink_size": 5, "recent_size": 7}
    poisoned = [tensor.detach().clone() for tensor in (query, key, value)]
    for tensor in poisoned[1:]:
        tensor[:, :, 32:96] = math.nan  # between the tiles of the sink and those of the last queries' windows
    # The last 48 queries, in tiles of their own.
    with backend("triton"):
        wanted = head_sparse_attention(query[:, :, 112:], key, value, **rule)
        wanted.sum().backward()
        inputs = [poisoned[0][:, :, 112:].requires_grad_(), *(tensor.requires_grad_() for tensor in poisoned[1:])]
        ours = head_sparse_attention(*inputs, **rule)
        ours.sum().backward()
    assert torch.equal(ours, wanted)
    assert torch.equal(inputs[0].grad, query.grad[:, :, 112:])
    for mine, theirs in zip(inputs[1:], (key, value), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
        assert not mine.grad[:, :, 32:96].any()


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("knobs", OPERATION.shapes, ids=range(len(OPERATION.shapes)))
def test_gradients_equal_pytorchs(knobs, which):
    arguments = example(knobs)
    for ours, wanted in zip(results(arguments, which), by_definition(arguments), strict=True):
        assert relative_error(ours, wanted) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("which", BACKENDS)
def test_gradients_in_16_bits(dtype, tolerance, which):
    arguments = example(OPERATION.shapes[4], dtype)
    for ours, wanted in zip(results(arguments, which), by_definition(arguments), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, wanted) < tolerance


@st.composite
def problems(draw):
    groups, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    tokens = draw(st.integers(1, 80))
    length = tokens + draw(st.integers(0, 60))
    batch = draw(st.integers(1, 2))
    block = draw(st.sampled_from([None, 1, 16, 24]))
    padded = block in (None, 1) and draw(st.booleans())
    return {
        "batch": batch, "groups": groups, "tokens": tokens, "length": length, "size": draw(st.sampled_from([5, 16])),
        "types": tuple(draw(st.lists(st.sampled_from([0, -1]), min_size=groups * group, max_size=groups * group))),
        "sink": draw(st.integers(0, 50)), "recent": draw(st.integers(1, 50)), "block": block,
        "start": draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)) if padded else None,
        "softcap": draw(st.sampled_from([0.0, 3.0])),
    }  # fmt: skip


@given(knobs=problems(), seed=st.integers(0, 99))
def test_triton_equals_the_definition_on_any_shape(knobs, seed):
    arguments = example(knobs, seed=seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink_tiles(monkeypatch)
        ours = results(arguments, "triton")
    for mine, wanted in zip(ours, by_definition(arguments), strict=True):
        assert relative_error(mine, wanted) < 1e-4


@pytest.mark.parametrize(
    ("sink", "recent"), [(0, 15), (15, 16), (16, 17), (31, 32), (32, 33), (1, 1), (3, 47), (0, 48), (5, 63)]
)
@pytest.mark.parametrize(("length", "start"), [(96, None), (111, None), (96, (16,)), (97, (17,))])
def test_windows_that_end_with_a_tile_or_beside_it(small_tiles, length, start, sink, recent):
    knobs = {"batch": 1, "types": (-1,), "groups": 1, "tokens": 96, "length": length, "size": 16, "sink": sink,
             "recent": recent, "start": start}  # fmt: skip
    arguments = example(knobs)
    for ours, wanted in zip(results(arguments, "triton"), by_definition(arguments), strict=True):
        assert relative_error(ours, wanted) < 1e-5


@pytest.mark.parametrize("which", BACKENDS)
def test_a_query_that_sees_nothing(which):
    arguments = example({**OPERATION.shapes[1], "tokens": 9, "start": (0, 4)})
    out, *grads = results(arguments, which)
    assert not out[1, :, :4].any()
    assert not grads[0][1, :, :4].any()
    assert all(tensor.isfinite().all() for tensor in (out, *grads))
    assert out[1, :, 4:].any(dim=-1).all()


@pytest.mark.parametrize("which", BACKENDS)
def test_strides_of_gradients_and_results(which):
    arguments = example(OPERATION.shapes[0])
    shape = arguments["query"].shape
    expanded = results(arguments, which, torch.ones(1, device=DEVICE).expand(shape))
    for ours, wanted in zip(expanded, results(arguments, which, torch.ones(shape, device=DEVICE)), strict=True):
        assert torch.equal(ours, wanted)
    assert expanded[0].transpose(1, 2).is_contiguous()  # heads join without a copy


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_gradient_for_one_input_alone(name, which):
    arguments = example(OPERATION.shapes[0])
    wanted = dict(zip(TRAINED, results(arguments, which)[1:], strict=True))[name]
    arguments[name].requires_grad_()
    with backend(which):
        out = head_sparse_attention(**arguments)
        out.backward(random(*out.shape, seed=9))
    assert torch.equal(arguments[name].grad, wanted)


def test_is_a_torch_operation_that_trains():
    arguments = example(OPERATION.shapes[1])
    tensors = [arguments[name].requires_grad_() for name in TRAINED]
    operation = torch.ops.pronghorn.head_sparse_attention
    inputs = (*tensors, arguments["head_types"], arguments["start"], 1, 2, 1, 1.5, 0.5)
    with backend("reference"):
        torch.library.opcheck(operation, inputs)
        out, log_sum_exp = operation(*(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs))
        assert not operation(*inputs)[1].requires_grad
        detached = (x.detach() if isinstance(x, torch.Tensor) else x for x in (out, out, log_sum_exp, *inputs))
        torch.library.opcheck(torch.ops.pronghorn.head_sparse_attention_backward, tuple(detached))


def test_training_compiles_without_a_graph_break():
    arguments = example(OPERATION.shapes[0])

    def loss(query, key, value):
        return head_sparse_attention(**{**arguments, "query": query, "key": key, "value": value}).square().sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        tensors = [arguments[name].detach().clone().requires_grad_() for name in TRAINED]
        with backend("reference"):
            function(*tensors).backward()
        grads.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(("batch", "tokens", "length"), [(0, 3, 3), (1, 0, 5), (1, 0, 0)])
def test_nothing_to_attend(batch, tokens, length, which):
    query, key = random(batch, 2, tokens, 16).requires_grad_(), random(batch, 1, length, 16).requires_grad_()
    with backend(which):
        out = head_sparse_attention(query, key, key, types_of(0, -1), sink_size=1, recent_size=1)
        out.sum().backward()
    assert out.shape == query.shape
    assert not key.grad.any()


def arguments_of(**changes):
    query, key = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8)
    types = torch.zeros(4, dtype=torch.int32)
    return {"query": query, "key": key, "value": key, "head_types": types, "sink_size": 1, "recent_size": 2, **changes}


@pytest.mark.parametrize(
    ("changes", "kind", "named"),
    [
        ({"query": torch.ones(2, 4, 8)}, ValueError, "query"),
        ({"query": torch.ones(2, 4, 3, 8).int()}, TypeError, "query"),
        ({"query": torch.ones(2, 3, 3, 8), "head_types": torch.zeros(3).int()}, ValueError, "key: got 2 heads"),
        ({"query": torch.ones(2, 4, 6, 8)}, ValueError, "length of 5"),
        ({"query": torch.ones(2, 4, 3, 8).half()}, TypeError, "key, value"),
        ({"key": torch.ones(2, 2, 5, 9)}, ValueError, "key"),
        ({"key": torch.ones(2, 0, 5, 8), "value": torch.ones(2, 0, 5, 8)}, ValueError, "key: got 0 heads"),
        ({"value": torch.ones(2, 2, 4, 8)}, ValueError, "value"),
        ({"value": torch.ones(2, 2, 5, 8, device="meta")}, ValueError, "value"),
        ({"head_types": torch.zeros(3, dtype=torch.int32)}, ValueError, "head_types"),
        ({"head_types": torch.zeros(4)}, TypeError, "head_types"),
        ({"head_types": torch.tensor([0, 1, -1, -2]).int()}, ValueError, r"head_types: got \[1, -2\]"),
        ({"head_types": [0, 0, 0, 0]}, TypeError, "head_types"),
        ({"sink_size": -1}, ValueError, "sink_size"),
        ({"sink_size": 1.0}, TypeError, "sink_size"),
        ({"recent_size": 0}, ValueError, "recent_size"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"block_size": True}, TypeError, "block_size"),
        ({"start": torch.zeros(2).int(), "block_size": 16}, ValueError, "start"),
        ({"start": torch.zeros(3).int()}, ValueError, "start"),
        ({"start": torch.zeros(2)}, TypeError, "start"),
        ({"start": torch.tensor([0, -1]).int()}, ValueError, "start"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"softcap": math.nan}, ValueError, "softcap"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"scale": math.inf}, ValueError, "scale"),
    ],
)
def test_bad_arguments(changes, kind, named):
    with pytest.raises(kind, match=named):
        head_sparse_attention(**arguments_of(**changes))


def test_heads_that_no_tile_holds():
    query = torch.ones(1, 1, 2, 257, device=DEVICE)
    with backend("triton"), pytest.raises(ValueError, match="head_dim of 257"):
        head_sparse_attention(query, query, query, types_of(0), sink_size=1, recent_size=1)
