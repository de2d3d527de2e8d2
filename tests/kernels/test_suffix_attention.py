"""Attention of new tokens over a prefix and themselves: who sees whom, how keys are split, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.shared_observation_attention import shared_observation_attention
from pronghorn.kernels.suffix_attention import suffix_attention
from pronghorn.kernels.suffix_attention.cases import OPERATION

BACKENDS = ["reference", "triton"]
SMALL = {"batch": 2, "tokens": 7, "length": 40, "groups": 1, "group": 2, "size": 8, "absent": 0.4, "state": 1}


def example(knobs, dtype=torch.float32, seed=0):
    return OPERATION.example(knobs, dtype, torch.Generator().manual_seed(seed), DEVICE)


def run(arguments, which):
    with backend(which):
        return suffix_attention(**arguments)


def by_definition(arguments):
    """In float64 by PyTorch's own operation on joined keys, with the mask written out."""
    query, prefix_key, prefix_value, key, value = (
        arguments[name].double().transpose(1, 2) for name in ("query", "prefix_key", "prefix_value", "key", "value")
    )
    token = torch.arange(query.shape[2], device=DEVICE)
    own = (token[:, None] >= arguments["state_tokens"]) | (token < arguments["state_tokens"])
    prefix = arguments["prefix_mask"][:, None].expand(-1, len(token), -1)
    mask = torch.cat([prefix, own.expand(len(query), -1, -1)], dim=-1)
    return torch.nn.functional.scaled_dot_product_attention(
        query, torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2), mask[:, None],
        scale=arguments["scale"], enable_gqa=True,
    ).transpose(1, 2)  # fmt: skip


def processors(monkeypatch, count):
    """For so many keys are split."""
    from pronghorn.kernels.suffix_attention import triton

    monkeypatch.setattr(triton, "processors", lambda _: count)


@st.composite
def problems(draw):
    tokens, length = draw(st.integers(1, 40)), draw(st.integers(0, 90))
    return {
        "batch": draw(st.integers(1, 2)), "tokens": tokens, "length": length, "groups": draw(st.integers(1, 2)),
        "group": draw(st.integers(1, 3)), "size": draw(st.sampled_from([5, 16])), "absent": draw(st.floats(0, 1)),
        "state": draw(st.integers(0, tokens)), "scale": draw(st.sampled_from([None, 0.4])),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@given(knobs=problems(), count=st.sampled_from([1, 8, 40, 1000]), which=st.sampled_from(BACKENDS))
def test_equals_the_definition_on_any_shape(knobs, count, which):
    arguments = example(knobs, seed=knobs["seed"])
    with pytest.MonkeyPatch.context() as monkeypatch:
        processors(monkeypatch, count)
        assert relative_error(run(arguments, which), by_definition(arguments)) < 1e-5


@pytest.mark.parametrize("count", [1, 5, 10, 1000])
def test_splits_of_any_length(count, monkeypatch):
    """Of 3 tiles of the prefix and one of the tokens, together and apart."""
    processors(monkeypatch, count)
    for knobs in ({**SMALL, "length": 96, "absent": 0.0}, {**SMALL, "length": 90, "absent": 0.7}):
        arguments = example(knobs)
        assert relative_error(run(arguments, "triton"), by_definition(arguments)) < 1e-5


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("state", [0, 2])
def test_is_the_attention_of_one_branch_in_training(state, which):
    arguments = example({**SMALL, "state": state})
    prefix = torch.zeros(2, 40, 2, 8, device=DEVICE)
    one = [arguments[name][:, None] for name in ("query", "key", "value")]
    with backend("reference"):
        wanted = shared_observation_attention(
            prefix, arguments["prefix_key"], arguments["prefix_value"], *one, arguments["prefix_mask"],
            torch.ones(2, 1, dtype=torch.bool, device=DEVICE), state_tokens=state,
        )[1][:, 0]  # fmt: skip
    torch.testing.assert_close(run(arguments, which), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", BACKENDS)
def test_what_is_masked_out_does_not_count(which):
    arguments = example(SMALL)
    changed, absent = dict(arguments), ~arguments["prefix_mask"]
    for name in ("prefix_key", "prefix_value"):
        changed[name] = arguments[name].clone()
        changed[name][absent] = 1e4
    assert torch.equal(run(arguments, which), run(changed, which))
    changed["prefix_mask"] = torch.ones_like(absent)
    assert not torch.allclose(run(arguments, which), run(changed, which))


@pytest.mark.parametrize("which", BACKENDS)
def test_the_state_does_not_see_the_rest(which):
    arguments = example({**SMALL, "state": 3, "absent": 1.0})  # it sees itself alone
    changed = {**arguments, "value": arguments["value"].clone()}
    changed["value"][:, 3:] += 1
    before, after = run(arguments, which), run(changed, which)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).all()


@pytest.mark.parametrize("which", BACKENDS)
def test_nothing_is_differentiable(which):
    arguments = {
        name: value.requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in example(SMALL).items()
    }
    out = run(arguments, which)
    assert not out.requires_grad
    assert out.is_contiguous()


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("nothing", [{"batch": 0}, {"length": 0}, {"tokens": 0, "state": 0}], ids=str)
def test_no_tokens(nothing, which):
    arguments = example({**SMALL, **nothing})
    out = run(arguments, which)
    assert out.shape == arguments["query"].shape
    assert relative_error(out, by_definition(arguments)) < 1e-5


def arguments_of(**changes):
    prefix, own = torch.ones(2, 5, 2, 8), torch.ones(2, 3, 2, 8)
    return {"query": torch.ones(2, 3, 4, 8), "prefix_key": prefix, "prefix_value": prefix, "key": own, "value": own,
            "prefix_mask": torch.ones(2, 5, dtype=torch.bool), **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kind", "named"),
    [
        ({"query": [1.0]}, TypeError, r"query: got list, wanted a torch\.Tensor"),
        ({"query": torch.ones(2, 3, 8)}, ValueError, r"query: got shape \(2, 3, 8\), wanted 4 dimensions"),
        ({"query": torch.ones(2, 3, 4, 8).int()}, TypeError, r"query: got torch\.int32"),
        ({"query": torch.ones(2, 3, 3, 8)}, ValueError, "prefix_key: got 2 heads, wanted a divisor of the query's 3"),
        ({"query": torch.ones(2, 3, 4, 0)}, ValueError, "query: got a head_dim of 0"),
        ({"prefix_key": torch.ones(2, 5, 0, 8)}, ValueError, "prefix_key: got 0 heads"),
        ({"prefix_key": torch.ones(1, 5, 2, 8)}, ValueError, r"prefix_key: got shape .* wanted \(2, 5, 2, 8\)"),
        ({"prefix_value": torch.ones(2, 4, 2, 8)}, ValueError, "prefix_value: got shape"),
        ({"key": torch.ones(2, 5, 2, 8)}, ValueError, r"key: got shape \(2, 5, 2, 8\), wanted \(2, 3, 2, 8\)"),
        ({"value": torch.ones(2, 3, 2, 8).half()}, TypeError, r"value: got torch\.float16, wanted the query's"),
        ({"value": torch.ones(2, 3, 2, 8, device="meta")}, ValueError, "value: is on meta"),
        ({"prefix_mask": torch.ones(5, dtype=torch.bool)}, ValueError, "prefix_mask: got shape"),
        ({"prefix_mask": torch.ones(2, 5)}, TypeError, r"prefix_mask: got torch\.float32, wanted torch\.bool"),
        ({"state_tokens": 4}, ValueError, "state_tokens: got 4, wanted 0 to the query's 3 tokens"),
        ({"state_tokens": 1.0}, TypeError, r"state_tokens: got 1\.0, wanted an integer"),
        ({"scale": -1.0}, ValueError, r"scale: got -1\.0, wanted a positive number"),
        ({"scale": math.inf}, ValueError, "scale: got inf"),
    ],
)
def test_bad_arguments(changes, kind, named):
    with pytest.raises(kind, match=named):
        suffix_attention(**arguments_of(**changes))


def test_what_the_triton_kernels_do_not_take(monkeypatch):
    from pronghorn.kernels.shared_observation_attention import triton

    with pytest.raises(ValueError, match="query: got a head_dim of 257"):
        run(example({**SMALL, "size": 257}), "triton")
    monkeypatch.setattr(triton, "LARGEST", 40 * 8 - 1)
    with pytest.raises(ValueError, match="prefix_key: got 320 numbers a sample"):
        run(example(SMALL), "triton")


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("form", ["beside queries", "every other token", "one for all tokens", "askew"])
def test_values_may_lie_apart(form, which):
    arguments = example({**SMALL, "groups": 2})
    value = arguments["value"]
    if form == "beside queries":
        wide = torch.cat([torch.full_like(value, torch.nan), value], dim=2)
        arguments["value"] = wide[:, :, value.shape[2] :]
    elif form == "every other token":
        arguments["value"] = torch.stack([value, value * torch.nan], dim=2).flatten(1, 2)[:, ::2]
    elif form == "one for all tokens":
        arguments["value"] = value[:, :1].expand_as(value)
    else:
        arguments["value"] = torch.cat([value, value[..., :1]], dim=-1)[..., :-1]
    assert form == "one for all tokens" or torch.equal(arguments["value"], value)
    torch.testing.assert_close(run(arguments, which).double(), by_definition(arguments), rtol=1e-5, atol=1e-5)
