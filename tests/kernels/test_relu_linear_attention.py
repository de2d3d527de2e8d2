"""Linear attention with ReLU: strides, its two halves, big sums, gradients, bad input."""

import pytest
import torch
from tests.kernels.harness import DEVICE, backend

from pronghorn.kernels._operation import relative_error
from pronghorn.kernels.relu_linear_attention import attend_state, key_value_state, relu_linear_attention
from pronghorn.kernels.relu_linear_attention.cases import OPERATION

BACKENDS = ["reference", "triton"]
# In which order the axes of [batch, heads, tokens, head_dim] lie in memory. Of "batch inside" and "steps" neither
# tokens nor channels are adjacent.
ORDERS = {
    "tokens outside": (0, 2, 1, 3), "channels first": (0, 1, 3, 2), "all channels first": (1, 3, 0, 2),
    "batch inside": (1, 2, 3, 0),
}  # fmt: skip
LAYOUTS = [*ORDERS, "parts of qkv", "channel-first parts", "steps"]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def three(*shape, dtype=torch.float32):
    return [random(*shape, seed=seed, dtype=dtype) for seed in range(3)]


def laid_out(tensor, layout):
    """The same numbers with other strides."""
    if layout in ORDERS:
        order = ORDERS[layout]
        return tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
    if layout == "parts of qkv":
        return torch.cat([tensor, tensor * 2, tensor * 3], dim=3)[..., : tensor.shape[3]]
    if layout == "channel-first parts":
        return torch.cat([tensor.mT, tensor.mT * 2], dim=2)[:, :, : tensor.shape[3]].mT
    return torch.stack([tensor, tensor * 2], dim=-1)[..., 0]


def order_of(tensor):
    return sorted(range(4), key=lambda axis: -tensor.stride(axis))


def by_definition(q, k, v):
    weights = q.relu() @ k.relu().mT
    return weights @ v / (weights.sum(dim=-1, keepdim=True) + 1e-15)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout, which):
    given = three(2, 3, 35, 16)
    strided = [laid_out(tensor, layout) for tensor in given]
    assert strided[0].stride() != given[0].stride()
    with backend(which):
        wanted, found = relu_linear_attention(*given), relu_linear_attention(*strided)
        mixed = relu_linear_attention(strided[0], given[1], strided[2])
    for result in (found, mixed):
        assert relative_error(result, wanted) < 1e-6
        assert order_of(result) == order_of(strided[0])
        assert result.numel() == result.untyped_storage().nbytes() // result.element_size()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_torch_operations(layout):
    q, k, v = (laid_out(tensor, layout) for tensor in three(2, 2, 5, 16))
    operations = torch.ops.pronghorn
    with backend("reference"):
        state = key_value_state(k, v)
        for operation, arguments in (
            (operations.relu_linear_attention, (q, k, v, 1e-15)), (operations.relu_linear_attention_state, (k, v)),
            (operations.relu_linear_attention_read, (q, state, 1e-15)),
            (operations.relu_linear_attention_gradients, (q, k, v, q, 1e-15)),
        ):  # fmt: skip
            torch.library.opcheck(operation.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_states_of_parts_add_up(dtype, which):
    q, k, v = three(2, 3, 50, 24, dtype=dtype)
    with backend(which):
        state = key_value_state(k, v)
        parts = [key_value_state(k[:, :, part], v[:, :, part]) for part in (slice(17), slice(17, None))]
        whole = relu_linear_attention(q, k, v)
        read = attend_state(q, sum(parts))
        same = attend_state(q, state)
    assert state.dtype == torch.float32
    assert state.shape == (2, 3, 25, 24)
    assert relative_error(parts[0] + parts[1], state) < 1e-6
    assert relative_error(state[:, :, -1], k.double().relu().sum(dim=2)) < 1e-6
    assert relative_error(state[:, :, :-1], v.double().mT @ k.double().relu()) < 1e-6
    assert torch.equal(same, whole)
    assert relative_error(read, whole) < OPERATION.tolerance[dtype]


@pytest.mark.parametrize("which", BACKENDS)
def test_queries_may_be_others_than_keys(which):
    q, (_, k, v) = random(1, 2, 3, 16, seed=5), three(1, 2, 40, 16)
    with backend(which):
        found = attend_state(q, key_value_state(k, v))
    assert relative_error(found, by_definition(q.double(), k.double(), v.double())) < 1e-6


@pytest.mark.parametrize("which", BACKENDS)
def test_scales(which):
    """Weights are shares, so the size of a query or of the keys is nothing, and that of the values everything."""
    q, k, v = three(1, 2, 19, 32)
    with backend(which):
        wanted = relu_linear_attention(q, k, v)
        assert relative_error(relu_linear_attention(q * 4, k, v), wanted) < 1e-6
        assert relative_error(relu_linear_attention(q, k * 0.25, v), wanted) < 1e-6
        assert relative_error(relu_linear_attention(q, k, v * 8), wanted * 8) < 1e-6
        assert relative_error(relu_linear_attention(q, k, torch.ones_like(v)), torch.ones_like(v)) < 1e-6


@pytest.mark.parametrize("which", BACKENDS)
def test_a_query_of_nothing_reads_zero(which):
    q, k, v = three(1, 1, 6, 16)
    q[:, :, 2] = -q[:, :, 2].abs()
    q.requires_grad_()
    with backend(which):
        found = relu_linear_attention(q, k.requires_grad_(), v.requires_grad_())
        found.sum().backward()
    assert not found[:, :, 2].any()
    assert found[:, :, [0, 1, 3, 4, 5]].all()
    assert not q.grad[:, :, 2].any()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v))


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("eps", [1e-15, 2.0])
def test_eps_is_added_to_the_weights(eps, which):
    q, k, v = three(1, 1, 4, 16)
    with backend(which):
        found = relu_linear_attention(q, k, v, eps=eps)
        read = attend_state(q, key_value_state(k, v), eps=eps)
    weights = q.relu() @ k.relu().mT
    assert relative_error(found, weights @ v / (weights.sum(dim=-1, keepdim=True) + eps)) < 1e-6
    assert torch.equal(found, read)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_beyond_the_dtype(dtype, which):
    """Sums of 6e5 and 6e7, and a query whose own sums go further."""
    tokens = 6000
    q, k, v = ((random(1, 1, tokens, 16, seed=seed) * 3 + 100).to(dtype) for seed in range(3))
    v = v * torch.tensor([1, -1], device=DEVICE, dtype=dtype).repeat(8)
    with backend(which):
        found = relu_linear_attention(q, k, v)
        state = key_value_state(k, v)
    assert found.isfinite().all()
    assert state.abs().min() > 65504
    exact = key_value_state(k.cpu().double(), v.cpu().double())
    assert relative_error(state, exact) < 1e-5
    wanted = attend_state(q.cpu().double(), exact)
    assert relative_error(found, wanted) < OPERATION.tolerance[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_parts_of_the_tokens(programs, dtype, monkeypatch):
    """All in one loop, in two parts of which the last has no full share, in parts of one tile."""
    from pronghorn.kernels.relu_linear_attention import triton

    monkeypatch.setattr(triton, "PROGRAMS", programs)
    for plan in ("_sum_plan", "_read_plan"):  # those kept have other programs
        monkeypatch.setattr(triton, plan, getattr(triton, plan).__wrapped__)
    for tokens in (300, 128):
        given = three(1, 2, tokens, 16, dtype=dtype)
        with backend("triton"):
            found = relu_linear_attention(*given)
        assert relative_error(found, by_definition(*(t.double() for t in given))) < OPERATION.tolerance[dtype]


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 2, 9, 16), (1, 3, 1, 24), (1, 1, 40, 80)])
@pytest.mark.parametrize("layout", ["channels first", "steps"])
def test_gradients_are_autograd_s(layout, shape, which):
    exact = [tensor.double().requires_grad_() for tensor in three(*shape)]
    grad = random(*shape, seed=9)
    wanted = torch.autograd.grad(by_definition(*exact), exact, grad.double())
    dtype = torch.float64 if which == "reference" else torch.float32
    given = [laid_out(tensor, layout).to(dtype).detach().requires_grad_() for tensor in three(*shape)]
    with backend(which):
        out = relu_linear_attention(*given)
        found = torch.autograd.grad(out, given, grad.to(dtype))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        # Of one token, the result is its value: the other gradients are zero, but for rounding.
        assert (ours - theirs).norm() < (1e-12 if dtype == torch.float64 else 2e-5) * (theirs.norm() + 1)


def test_gradients_when_compiled():
    given = [tensor.requires_grad_() for tensor in three(1, 2, 7, 16)]
    with backend("reference"):
        compiled = torch.compile(relu_linear_attention, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*given).square().sum(), given)
        wanted = torch.autograd.grad(relu_linear_attention(*given).square().sum(), given)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("which", BACKENDS)
def test_no_tokens(which):
    empty = random(1, 2, 0, 16)
    with backend(which):
        assert relu_linear_attention(empty, empty, empty).shape == (1, 2, 0, 16)
        assert not key_value_state(empty, empty).any()


def test_halves_have_no_gradient():
    q, k, v = three(1, 1, 3, 16)
    state = key_value_state(k, v)
    with pytest.raises(RuntimeError, match="key_value_state: is for inference"):
        key_value_state(k.requires_grad_(), v)
    with pytest.raises(RuntimeError, match="attend_state: is for inference"):
        attend_state(q.requires_grad_(), state)
    with torch.no_grad():
        assert attend_state(q, key_value_state(k, v)).shape == q.shape


def test_bad_input_is_named():
    q, k, v = three(1, 2, 3, 16)
    with pytest.raises(TypeError, match=r"q: got list, wanted a torch\.Tensor"):
        relu_linear_attention([1.0], k, v)
    with pytest.raises(ValueError, match=r"q: got shape \(2, 3, 16\), wanted 4 dimensions"):
        relu_linear_attention(q[0], k, v)
    with pytest.raises(TypeError, match=r"q: got torch\.int64, wanted a floating-point dtype"):
        relu_linear_attention(q.long(), k, v)
    with pytest.raises(ValueError, match="q: got a head_dim of 129, wanted 1 to 128"):
        relu_linear_attention(*three(1, 1, 2, 129))
    with pytest.raises(ValueError, match="q: got a head_dim of 0, wanted 1 to 128"):
        relu_linear_attention(*three(1, 1, 2, 0))
    with pytest.raises(ValueError, match=r"k: got shape \(1, 2, 2, 16\), wanted \(1, 2, 3, 16\)"):
        relu_linear_attention(q, k[:, :, 1:], v)
    with pytest.raises(ValueError, match=r"v: got shape \(1, 1, 3, 16\), wanted \(1, 2, 3, 16\)"):
        relu_linear_attention(q, k, v[:, :1])
    with pytest.raises(TypeError, match=r"k: got torch\.float16, wanted the dtype of q, torch\.float32"):
        relu_linear_attention(q, k.half(), v)
    with pytest.raises(TypeError, match=r"v: got torch\.float64, wanted the dtype of k, torch\.float32"):
        key_value_state(k, v.double())
    with pytest.raises(ValueError, match="v: is on meta"):
        relu_linear_attention(q, k, v.to("meta"))
    for eps in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"eps: got {eps}, wanted a number from 1e-37 on"):
            relu_linear_attention(q, k, v, eps=eps)
        with pytest.raises(ValueError, match="eps: got"):
            attend_state(q, key_value_state(k, v), eps=eps)
    with pytest.raises(ValueError, match=r"state: got shape \(1, 2, 16, 16\), wanted \(1, 2, 17, 16\)"):
        attend_state(q, key_value_state(k, v)[:, :, :-1])
    with pytest.raises(TypeError, match=r"state: got torch\.float16, wanted torch\.float32"):
        attend_state(q, key_value_state(k, v).half())
