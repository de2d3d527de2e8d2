"""Attention of branches over one observation: who sees whom, what is not read, gradients, bad input."""

import math

import pytest
import torch
from hypothesis import example as always
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.shared_observation_attention import shared_observation_attention
from pronghorn.kernels.shared_observation_attention.cases import OPERATION, pairs

BACKENDS = ["reference", "triton"]
TRAINED = OPERATION.trains
SMALL = {"batch": 2, "length": 21, "branches": 3, "tokens": 6, "groups": 1, "group": 2, "size": 8, "absent": 0.4,
         "state": 1, "invalid": ((1, 2),)}  # fmt: skip


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Of 64 by 32 and few, which an interpreter goes through faster than what suits a GPU."""
    set_tiles(monkeypatch, 64, 32, 2)


def set_tiles(monkeypatch, rows, keys, parts):
    from pronghorn.kernels.shared_observation_attention import triton, triton_backward

    for module in (triton, triton_backward):
        monkeypatch.setattr(module, "EXACT", triton.Tile(rows, keys, 4, 1))
    monkeypatch.setattr(triton_backward, "_parts", lambda *_: parts)


def example(knobs, dtype=torch.float32, seed=0):
    return OPERATION.example(knobs, dtype, torch.Generator().manual_seed(seed), DEVICE)


def grads_for(arguments, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(arguments[name].shape, generator=generator).to(DEVICE, arguments[name].dtype)
        for name in ("prefix_query", "branch_query")
    ]


def results(arguments, which, grads=None):
    """Both results and the gradients of all six tensors, by one backend."""
    inputs = {name: arguments[name].detach().clone().requires_grad_() for name in TRAINED}
    with backend(which):
        out = shared_observation_attention(**{**arguments, **inputs})
        torch.autograd.backward(out, grads_for(arguments) if grads is None else grads)
    return *(tensor.detach() for tensor in out), *(tensor.grad for tensor in inputs.values())


def visible(arguments):
    """Who sees whom in the sequence of the prefix and all branches: bool [batch, length, length]."""
    prefix, branches = arguments["prefix_mask"], arguments["branch_mask"]
    tokens, count = arguments["branch_query"].shape[2], branches.shape[1]
    length = prefix.shape[1] + count * tokens
    place = torch.arange(length, device=DEVICE) - prefix.shape[1]
    branch = torch.where(place < 0, -1, place.clamp(min=0) // max(tokens, 1))
    block = torch.where(place < 0, 0, torch.where(place % max(tokens, 1) < arguments["state_tokens"], 1, 2))
    real = torch.cat([prefix, branches.repeat_interleave(tokens, dim=1)], dim=1)
    together = (branch[:, None] == branch) | (branch == -1)
    return real[:, :, None] & real[:, None] & together & (block[:, None] >= block)


def by_definition(arguments):
    """The same in float64 by one softmax over the joined sequence, with the mask written out, and autograd."""
    inputs = [arguments[name].detach().double().requires_grad_() for name in TRAINED]
    joined = [torch.cat([inputs[i], inputs[i + 3].flatten(1, 2)], dim=1).transpose(1, 2) for i in range(3)]
    query, (key, value) = joined[0], (t.repeat_interleave(joined[0].shape[1] // t.shape[1], dim=1) for t in joined[1:])
    scale = arguments["scale"] or query.shape[-1] ** -0.5
    mask = visible(arguments)[:, None]
    weights = (query @ key.mT * scale).masked_fill(~mask, -1e300).softmax(dim=-1) * mask.any(dim=-1, keepdim=True)
    out = (weights @ value).transpose(1, 2)
    length = inputs[0].shape[1]
    parts = out[:, :length], out[:, length:].unflatten(1, inputs[3].shape[1:3])
    torch.autograd.backward(parts, [grad.double() for grad in grads_for(arguments)])
    return *(part.detach() for part in parts), *(tensor.grad for tensor in inputs)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("knobs", [*OPERATION.shapes[:5], SMALL], ids=range(6))
def test_results_and_gradients_are_those_of_the_joined_sequence(knobs, which):
    arguments = example(knobs)
    for ours, wanted in zip(results(arguments, which), by_definition(arguments), strict=True):
        assert relative_error(ours, wanted) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("which", BACKENDS)
def test_gradients_in_16_bits(dtype, tolerance, which):
    arguments = example(SMALL, dtype)
    for ours, wanted in zip(results(arguments, which), by_definition(arguments), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, wanted) < tolerance


# One token of the prefix sees itself alone, and one branch sees two.
LONELY = {
    "batch": 1, "length": 3, "branches": 2, "tokens": 1, "groups": 1, "group": 1, "size": 16, "state": 0, "scale": None,
    "real": [False, True], "seed": 74,
}  # fmt: skip


@st.composite
def problems(draw):
    batch, branches, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 18))
    return {
        "batch": batch, "length": draw(st.integers(1, 30)), "branches": branches, "tokens": tokens,
        "groups": draw(st.integers(1, 3 - batch)), "group": draw(st.integers(1, 3)),
        "size": draw(st.sampled_from([5, 16])), "state": draw(st.integers(0, tokens)),
        "scale": draw(st.sampled_from([None, 0.4])),
        "real": draw(st.lists(st.booleans(), min_size=batch * branches, max_size=batch * branches)),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@given(knobs=problems(), tile=st.sampled_from([(32, 16), (16, 32), (64, 64)]), parts=st.integers(1, 3))
@always(knobs=LONELY, tile=(32, 16), parts=1)
def test_triton_equals_the_definition_on_any_shape(knobs, tile, parts):
    arguments = example(knobs, seed=knobs["seed"])
    generator = torch.Generator().manual_seed(knobs["seed"])
    holes = torch.rand(knobs["batch"], knobs["length"], generator=generator) < 0.7
    arguments["prefix_mask"] = holes.to(DEVICE)
    arguments["branch_mask"] = torch.tensor(knobs["real"], device=DEVICE).view(knobs["batch"], knobs["branches"])
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_tiles(monkeypatch, *tile, parts)
        ours = results(arguments, "triton")
    # Gradients of queries and keys are differences, and next to nothing where a token sees little besides itself: they
    # are rounded as what is subtracted was.
    rounding = 1e-6 * sum(float(grad.norm()) for grad in grads_for(arguments))
    for mine, wanted in zip(ours, by_definition(arguments), strict=True):
        assert float((mine - wanted).norm()) <= 1e-5 * float(wanted.norm()) + rounding


@pytest.mark.parametrize("which", BACKENDS)
def test_a_branch_is_as_if_it_were_alone(which):
    arguments = example({**SMALL, "invalid": ()})
    with backend(which):
        prefix, branches = shared_observation_attention(**arguments)
        for n in range(branches.shape[1]):
            alone = {name: value[:, n : n + 1] for name, value in arguments.items() if name.startswith("branch_")}
            one = shared_observation_attention(**{**arguments, **alone})
            torch.testing.assert_close(one[1][:, 0], branches[:, n], rtol=1e-5, atol=1e-6)
            assert torch.equal(one[0], prefix)


@pytest.mark.parametrize("which", BACKENDS)
def test_other_branches_do_not_notice_a_change(which):
    arguments = example({**SMALL, "invalid": ()})
    changed = {**arguments}
    for name in ("branch_query", "branch_key", "branch_value"):
        changed[name] = arguments[name].clone()
        changed[name][:, 1] = 7 - 3 * changed[name][:, 1]
    before, after = results(arguments, which), results(changed, which)
    assert torch.equal(before[0], after[0])
    for was, is_now in zip((before[1], *before[5:]), (after[1], *after[5:]), strict=True):  # results, gradients
        assert torch.equal(was[:, [0, 2]], is_now[:, [0, 2]])
        assert not torch.equal(was[:, 1], is_now[:, 1])


@pytest.mark.parametrize("which", BACKENDS)
def test_what_is_masked_out_is_not_read_and_gets_zeros(which):
    arguments = example(SMALL)
    masks = [~arguments["prefix_mask"], ~arguments["branch_mask"]]
    poisoned, grads = dict(arguments), grads_for(arguments)
    for name in TRAINED:
        poisoned[name] = arguments[name].clone()
        poisoned[name][masks[name.startswith("branch")]] = math.nan
    for grad, mask in zip(grads, masks, strict=True):
        grad[mask] = math.nan
    found, wanted = results(poisoned, which, grads), results(arguments, which)
    for name, ours, clean in zip(("prefix", "branch", *TRAINED), found, wanted, strict=True):
        assert torch.equal(ours, clean)
        assert not ours[masks[name.startswith("branch")]].any()


@pytest.mark.parametrize("which", BACKENDS)
def test_nothing_real(which):
    arguments = example({**SMALL, "absent": 0.0, "invalid": (0,)})
    arguments["prefix_mask"][1] = False
    out = results(arguments, which)
    for ours, wanted in zip(out, by_definition(arguments), strict=True):
        assert relative_error(ours, wanted) < 1e-5
    assert not out[0][1].any()
    assert not out[1][0].any()
    assert out[1][1].any(dim=-1).all()  # these see themselves
    for grad in out[3:5]:
        assert not grad[1].any()
    arguments["branch_mask"][:] = False
    assert not any(grad.any() for grad in results(arguments, which)[5:])


@pytest.mark.parametrize("which", BACKENDS)
def test_the_state_does_not_see_the_rest(which):
    arguments = example({**SMALL, "state": 2, "invalid": ()})
    changed = {**arguments, "branch_key": arguments["branch_key"].clone()}
    changed["branch_key"][:, :, 2:] *= -3
    with backend(which):
        before, after = (shared_observation_attention(**given)[1] for given in (arguments, changed))
        assert torch.equal(before[:, :, :2], after[:, :, :2])
        assert (before[:, :, 2:] != after[:, :, 2:]).any(dim=-1).all()
        none, everything = (shared_observation_attention(**{**arguments, "state_tokens": n})[1] for n in (0, 6))
    assert torch.equal(none, everything)
    assert not torch.equal(none, before)


def test_the_same_bits_at_every_call():
    arguments = example(SMALL)
    for ours, again in zip(results(arguments, "triton"), results(arguments, "triton"), strict=True):
        assert torch.equal(ours, again)


def test_parts_of_the_rows(monkeypatch):
    monkeypatch.undo()
    from pronghorn.kernels.shared_observation_attention.triton_backward import MOST_PARTS, _parts

    assert _parts(12, 132) == 11  # one wave
    assert _parts(24, 132) == 5
    assert _parts(132, 132) == _parts(1320, 132) == 1
    assert _parts(2, 1000) == MOST_PARTS


@pytest.mark.parametrize("which", BACKENDS)
def test_strides_of_gradients_and_results(which):
    arguments = example(SMALL)
    shapes = [arguments[name].shape for name in ("prefix_query", "branch_query")]
    expanded = results(arguments, which, [torch.ones(1, device=DEVICE).expand(shape) for shape in shapes])
    dense = results(arguments, which, [torch.ones(shape, device=DEVICE) for shape in shapes])
    for ours, wanted in zip(expanded, dense, strict=True):
        assert torch.equal(ours, wanted)
        assert ours.is_contiguous()


@pytest.mark.parametrize("name", TRAINED)
def test_a_gradient_for_one_input_alone(name):
    arguments = example(OPERATION.shapes[0])
    grads = grads_for(arguments)
    of_both = results(arguments, "reference", [torch.zeros_like(grads[0]), grads[1]])[2:]
    wanted = dict(zip(TRAINED, of_both, strict=True))
    arguments[name].requires_grad_()
    with backend("reference"):
        shared_observation_attention(**arguments)[1].backward(grads[1])
    assert torch.equal(arguments[name].grad, wanted[name])


def test_are_torch_operations():
    arguments = example(OPERATION.shapes[0])
    tensors = [arguments[name] for name in TRAINED]
    how = arguments["prefix_mask"], arguments["branch_mask"], 1, 0.5
    tests = ("test_schema", "test_faketensor")
    with backend("reference"):
        forward = torch.ops.pronghorn.shared_observation_attention.default
        torch.library.opcheck(forward, (*tensors, *how), test_utils=tests)
        out = forward(*tensors, *how)
        backward = torch.ops.pronghorn.shared_observation_attention_gradients.default
        torch.library.opcheck(backward, (*out[:2], *out, *tensors, *how), test_utils=tests)


def test_training_compiles_without_a_graph_break():
    arguments = example(OPERATION.shapes[0])

    def loss(*tensors):
        prefix, branches = shared_observation_attention(
            **{**arguments, **dict(zip(TRAINED, tensors, strict=True))}
        )  # fmt: skip
        return prefix.square().sum() + branches.sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        tensors = [arguments[name].detach().clone().requires_grad_() for name in TRAINED]
        with backend("reference"):
            function(*tensors).backward()
        grads.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("nothing", [{"batch": 0}, {"length": 0}, {"branches": 0}, {"tokens": 0}], ids=str)
def test_no_tokens(nothing, which):
    arguments = example({**SMALL, "state": 0, "invalid": (), **nothing})
    for ours, wanted in zip(results(arguments, which), by_definition(arguments), strict=True):
        assert ours.shape == wanted.shape
        assert relative_error(ours, wanted) < 1e-5


@pytest.mark.parametrize("knobs", [*OPERATION.shapes, {**SMALL, "state": 4}], ids=range(len(OPERATION.shapes) + 1))
def test_cost_counts_what_the_mask_shows(knobs):
    arguments = example({**knobs, "absent": 0.0, "invalid": ()})
    assert pairs(knobs) == visible(arguments).sum()


def arguments_of(**changes):
    prefix, branch = torch.ones(2, 5, 2, 8), torch.ones(2, 3, 4, 2, 8)
    return {
        "prefix_query": torch.ones(2, 5, 4, 8), "prefix_key": prefix, "prefix_value": prefix,
        "branch_query": torch.ones(2, 3, 4, 4, 8), "branch_key": branch, "branch_value": branch,
        "prefix_mask": torch.ones(2, 5, dtype=torch.bool), "branch_mask": torch.ones(2, 3, dtype=torch.bool), **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kind", "named"),
    [
        ({"prefix_query": [1.0]}, TypeError, r"prefix_query: got list, wanted a torch\.Tensor"),
        ({"prefix_query": torch.ones(2, 5, 8)}, ValueError, r"prefix_query: got shape \(2, 5, 8\), wanted 4"),
        ({"prefix_query": torch.ones(2, 5, 4, 8).int()}, TypeError, r"prefix_query: got torch\.int32"),
        ({"prefix_query": torch.ones(2, 5, 3, 8)}, ValueError, "prefix_key: got 2 heads, wanted a divisor of pref"),
        ({"prefix_query": torch.ones(2, 5, 4, 0)}, ValueError, "prefix_query: got a head_dim of 0"),
        ({"prefix_key": torch.ones(2, 5, 0, 8)}, ValueError, "prefix_key: got 0 heads"),
        ({"prefix_key": torch.ones(2, 6, 2, 8)}, ValueError, r"prefix_key: got shape \(2, 6, 2, 8\), wanted \(2, 5, 2"),
        ({"prefix_value": torch.ones(2, 5, 2, 9)}, ValueError, r"prefix_value: got shape"),
        ({"prefix_value": torch.ones(2, 5, 2, 8).half()}, TypeError, r"prefix_value: got torch\.float16, wanted pref"),
        ({"branch_query": torch.ones(2, 12, 4, 8)}, ValueError, r"branch_query: got shape \(2, 12, 4, 8\), wanted 5"),
        ({"branch_query": torch.ones(1, 3, 4, 4, 8)}, ValueError, r"branch_query: got shape .*wanted \(2, 3, 4, 4, 8"),
        ({"branch_key": torch.ones(2, 2, 4, 2, 8)}, ValueError, "branch_key: got shape"),
        ({"branch_value": torch.ones(2, 3, 4, 1, 8)}, ValueError, "branch_value: got shape"),
        ({"branch_value": torch.ones(2, 3, 4, 2, 8, device="meta")}, ValueError, "branch_value: is on meta"),
        ({"prefix_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "prefix_mask: got shape"),
        ({"prefix_mask": torch.ones(2, 5)}, TypeError, r"prefix_mask: got torch\.float32, wanted torch\.bool"),
        ({"branch_mask": torch.ones(2, 3, 4, dtype=torch.bool)}, ValueError, "branch_mask: got shape"),
        ({"branch_mask": None}, TypeError, "branch_mask: got NoneType"),
        ({"state_tokens": -1}, ValueError, "state_tokens: got -1, wanted 0 to the branches' 4 tokens"),
        ({"state_tokens": 5}, ValueError, "state_tokens: got 5"),
        ({"state_tokens": True}, TypeError, "state_tokens: got True, wanted an integer"),
        ({"scale": 0.0}, ValueError, r"scale: got 0\.0, wanted a positive number"),
        ({"scale": math.nan}, ValueError, "scale: got nan"),
    ],
)
def test_bad_arguments(changes, kind, named):
    with pytest.raises(kind, match=named):
        shared_observation_attention(**arguments_of(**changes))


def test_what_the_triton_kernels_do_not_take(monkeypatch):
    from pronghorn.kernels.shared_observation_attention import triton

    arguments = example({**SMALL, "size": 257})
    with backend("triton"), pytest.raises(ValueError, match="prefix_query: got a head_dim of 257"):
        shared_observation_attention(**arguments)
    monkeypatch.setattr(triton, "LARGEST", 6 * 3 * 2 * 8 - 1)
    with backend("triton"), pytest.raises(ValueError, match="branch_query: got 288 numbers a sample"):
        shared_observation_attention(**example({**SMALL, "length": 4}))
