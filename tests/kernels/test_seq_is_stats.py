"""Statistics of sequences' ratios: any shape and mask, what must not be looked at, extremes, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels.seq_is_stats import SequenceStatistics, seq_is_stats
from pronghorn.kernels.seq_is_stats.cases import OPERATION

BACKENDS = ["reference", "triton"]


def example(sequences, tokens, spread=0.3, seed=0, **changes):
    knobs = {"sequences": sequences, "tokens": tokens, "spread": spread, "truncation": 4.0}
    arguments = OPERATION.example(knobs, torch.float32, torch.Generator().manual_seed(seed), DEVICE)
    return {**arguments, **changes}


def check(found, arguments, exact=False):
    """Sums to 1e-5 of what they are over, the rest to what follows from that."""
    wanted = SequenceStatistics(*OPERATION.oracle(arguments))
    sizes = sizes_of(arguments)
    error = 1e-12 if exact else 1e-6
    assert (found.log_ratios.cpu() - wanted.log_ratios).abs().le(error * sizes + 1e-15).all()
    assert torch.equal(found.counts.cpu(), wanted.counts)
    torch.testing.assert_close(found.k3.cpu(), wanted.k3, rtol=error * 10, atol=1e-15)
    torch.testing.assert_close(found.geometric_mean.cpu(), wanted.geometric_mean, rtol=error * 10, atol=0)
    atol = 4 * error * float(sizes.max()) + 1e-12
    for name in ("log_ess", "log_ess_clipped"):
        assert abs(float(getattr(found, name)) - float(getattr(wanted, name))) <= atol
    for tensor in found:
        assert tensor.isfinite().all()


def sizes_of(arguments):
    learner, sampler = (arguments[name].double().cpu() for name in ("log_probs", "sampler_log_probs"))
    ratios = torch.where(arguments["mask"].cpu() & ~sampler.isnan(), learner - sampler, 0)
    return ratios.abs().sum(dim=1)


def small_tiles(monkeypatch, **sizes):
    """So that small problems have several tiles, of sequences, of tokens and of what joins them."""
    from pronghorn.kernels.seq_is_stats import triton

    for name, size in ({"ELEMENTS": 16, "PROGRAMS": 12, "PARTIAL_SUMS": 16, "SEQUENCES": 4} | sizes).items():
        monkeypatch.setattr(triton, name, size)


@given(
    sequences=st.integers(1, 40), tokens=st.integers(1, 90), spread=st.sampled_from([0.0, 1e-4, 0.1, 3.0]),
    seed=st.integers(0, 99), truncation=st.sampled_from([None, 0.5, 1.0, 8.0]), which=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_any_shape(sequences, tokens, spread, seed, truncation, which):
    arguments = example(sequences, tokens, spread, seed, truncation=truncation)
    with backend(which):
        found = seq_is_stats(**arguments)
    check(found, arguments, exact=which == "reference")


@pytest.mark.parametrize("programs", [1, 12, 1000])
@pytest.mark.parametrize(("sequences", "tokens"), [(1, 1), (1, 300), (3, 64), (7, 50), (40, 33), (90, 5), (4, 16)])
def test_parts_and_tiles(sequences, tokens, programs, monkeypatch):
    small_tiles(monkeypatch, PROGRAMS=programs)
    arguments = example(sequences, tokens, 1.0)
    with backend("triton"):
        check(seq_is_stats(**arguments), arguments)


def test_no_part_is_lost_at_the_real_size():
    arguments = example(2, 9000, 0.05)
    with backend("triton"):
        check(seq_is_stats(**arguments), arguments)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, which):
    arguments = example(5, 40, 0.5)
    for names in (("log_probs", "sampler_log_probs"), ("log_probs",), ("sampler_log_probs",)):
        given_ = {**arguments, **{name: arguments[name].to(dtype) for name in names}}
        with backend(which):
            found = seq_is_stats(**given_)
        assert {tensor.dtype for tensor in found} == {torch.float64, torch.int64}
        check(found, given_, exact=dtype == torch.float64)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1, 0.99, 1.01, 2.0, 20.0, 80.0, 95.0, 160.0])
def test_k3_of_small_and_large_ratios(size, which):
    r = torch.tensor([[size], [-size]])
    with backend(which):
        found = seq_is_stats(r.to(DEVICE), torch.zeros(2, 1, device=DEVICE), torch.ones(2, 1, device=DEVICE).bool())
    exact = r.double()[:, 0]
    series = torch.stack([exact**n / float(math.factorial(n)) for n in range(2, 30)]).sum(dim=0)
    wanted = series if size < 1 else exact.exp() - exact - 1
    # An exponent of float32 is off by up to half a unit in its last place.
    torch.testing.assert_close(found.k3.cpu(), wanted, rtol=4e-6 + 1e-7 * size, atol=0)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["log_probs", "sampler_log_probs"])
def test_masked_places_are_not_looked_at(name, value, which):
    arguments = example(6, 50)
    with backend(which):
        wanted = seq_is_stats(**arguments)
        arguments[name] = arguments[name].masked_fill(~arguments["mask"], value)
        found = seq_is_stats(**arguments)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("which", BACKENDS)
def test_a_sampler_s_nan_is_a_ratio_of_one(which):
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]], device=DEVICE)
    sampler = torch.tensor([[-1.5, math.nan, -3.0]], device=DEVICE)
    with backend(which):
        found = seq_is_stats(log_probs, sampler, torch.ones(1, 3, device=DEVICE).bool())
    assert float(found.log_ratios) == 0.5
    assert int(found.counts) == 3
    assert math.isclose(float(found.geometric_mean), math.exp(0.5 / 3), rel_tol=1e-12)


@pytest.mark.parametrize("which", BACKENDS)
def test_what_is_wrong_with_the_learner_shows(which):
    arguments = example(4, 20)
    arguments["mask"][:] = True
    arguments["sampler_log_probs"] = arguments["log_probs"].nan_to_num(0, 0, 0).clone()
    arguments["log_probs"] = arguments["sampler_log_probs"].clone()
    arguments["log_probs"][1, 3], arguments["log_probs"][2, 5] = math.nan, -math.inf
    with backend(which):
        found = seq_is_stats(**arguments)
    assert found.log_ratios.isnan().tolist() == [False, True, False, False]
    assert float(found.log_ratios[2]) == -math.inf
    assert found.k3.isfinite().tolist() == [True, False, False, True]
    assert found.log_ess.isnan()


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(
    ("log_ratios", "truncation", "wanted", "clipped"),
    [
        ([0.0, 0.0, 0.0], None, 3.0, 3.0),
        ([-40.0, -40.0, -40.0], 8.0, 3.0, 3.0),  # where 1e-8 in the divisor would tell 0
        ([800.0, 0.0], 8.0, 1.0, (8 + 1) ** 2 / (64 + 1)),  # where exp is infinite
        ([-3000.0, 0.0, 0.0], 1.0, 2.0, 2.0),
        ([1000.0, 1000.0], 2.0, 2.0, 2.0),
        ([math.log(3.0), 0.0], 2.0, 16 / 10, 9 / 5),
    ],
)
def test_effective_sizes(log_ratios, truncation, wanted, clipped, which, monkeypatch):
    for size in (1, 1024):
        small_tiles(monkeypatch, SEQUENCES=size)
        log_probs = torch.tensor(log_ratios, device=DEVICE)[:, None]
        with backend(which):
            found = seq_is_stats(log_probs, torch.zeros_like(log_probs), torch.ones_like(log_probs).bool(), truncation)
        assert math.isclose(float(found.log_ess.exp()), wanted, rel_tol=1e-6)
        assert math.isclose(float(found.log_ess_clipped.exp()), clipped, rel_tol=1e-6)


@pytest.mark.parametrize("which", BACKENDS)
def test_a_constant_changes_no_effective_size(which):
    arguments = example(9, 1, 2.0)
    arguments["mask"][:] = True
    arguments["sampler_log_probs"] = torch.zeros_like(arguments["log_probs"])
    arguments["log_probs"] = torch.linspace(-3, 2, 9, device=DEVICE)[:, None]
    with backend(which):
        near = seq_is_stats(**arguments)
        far = seq_is_stats(**{**arguments, "log_probs": arguments["log_probs"] - 512})
    assert math.isclose(float(near.log_ess), float(far.log_ess), rel_tol=1e-4)
    assert 0 <= float(near.log_ess) <= math.log(9)


@pytest.mark.parametrize("which", BACKENDS)
def test_nothing_to_do(which):
    empty = torch.zeros(3, 0, device=DEVICE)
    with backend(which):
        found = seq_is_stats(empty, empty, empty.bool(), 2.0)
        masked = seq_is_stats(*torch.full((2, 3, 5), math.nan, device=DEVICE), torch.zeros(3, 5, device=DEVICE).bool())
        none = seq_is_stats(empty.T, empty.T, empty.T.bool())
    for one in (found, masked):
        assert one.log_ratios.tolist() == one.k3.tolist() == one.counts.tolist() == [0, 0, 0]
        assert one.geometric_mean.tolist() == [1, 1, 1]
        assert math.isclose(float(one.log_ess), math.log(3), rel_tol=1e-12)
    assert [tuple(tensor.shape) for tensor in none] == [(0,), (0,), (0,), (0,), (), ()]
    assert none.log_ess == none.log_ess_clipped == -math.inf


def test_results_have_no_gradient_and_do_not_vary():
    arguments = example(5, 33)
    arguments["log_probs"].requires_grad_()
    for which in BACKENDS:
        with backend(which):
            first, second = seq_is_stats(**arguments), seq_is_stats(**arguments)
        assert not any(tensor.requires_grad for tensor in first)
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize(("sequences", "tokens"), [(4, 6), (0, 3), (2, 0)])
def test_as_a_torch_operation(sequences, tokens, limit):
    log_probs, sampler = torch.randn(2, sequences, tokens, generator=torch.Generator().manual_seed(0))
    arguments = log_probs, sampler, torch.ones(sequences, tokens).bool(), limit
    with backend("reference"):
        torch.library.opcheck(torch.ops.pronghorn.seq_is_stats.default, arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"log_probs": [1.0]}, TypeError, r"log_probs: got list, wanted a torch\.Tensor"),
        ({"log_probs": torch.zeros(3)}, ValueError, r"log_probs: got shape \(3,\), wanted 2 dimensions"),
        ({"log_probs": torch.zeros(2, 3).long()}, TypeError, r"log_probs: got torch\.int64, wanted a floating-point"),
        ({"sampler_log_probs": torch.zeros(2, 4)}, ValueError, r"sampler_log_probs: got shape \(2, 4\), wanted \(2, 3"),
        ({"sampler_log_probs": torch.zeros(2, 3).bool()}, TypeError, r"sampler_log_probs: got torch\.bool"),
        ({"sampler_log_probs": torch.zeros(2, 3, device="meta")}, ValueError, "sampler_log_probs: is on meta"),
        ({"mask": torch.ones(2, 3)}, TypeError, r"mask: got torch\.float32, wanted torch\.bool"),
        ({"mask": torch.ones(2, 1).bool()}, ValueError, r"mask: got shape \(2, 1\), wanted \(2, 3\)"),
        ({"mask": None}, TypeError, "mask: got NoneType"),
        ({"truncation": 0.0}, ValueError, r"truncation: got 0\.0, wanted a positive number or None"),
        ({"truncation": math.nan}, ValueError, "truncation: got nan"),
        ({"truncation": math.inf}, ValueError, "truncation: got inf"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    log_probs = torch.zeros(2, 3)
    arguments = {"log_probs": log_probs, "sampler_log_probs": log_probs, "mask": log_probs.bool(), "truncation": 2.0}
    with pytest.raises(error, match=message):
        seq_is_stats(**{**arguments, **changed})
