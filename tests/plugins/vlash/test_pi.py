"""pi0 and pi0.5 over shared observations: what a branch gives must not depend on the company it keeps."""

from dataclasses import replace

import pytest
import torch
from tests.plugins.vlash.networks import (
    ACTION,
    HORIZON,
    KINDS,
    PI0_SIZES,
    PI05_SIZES,
    STATE,
    branches,
    model,
    network,
    of_branch,
    prefix,
    randomized,
)

from pronghorn.kernels.suffix_layers import suffix_layers
from pronghorn.vlash import flow
from pronghorn.vlash.guidance import guided_velocity
from pronghorn.vlash.pi import fused, joint
from pronghorn.vlash.pi.adapt import pi_model
from pronghorn.vlash.pi.fusion import fuse
from pronghorn.vlash.pi.layers import PiNetwork, PiSizes
from pronghorn.vlash.pi.model import Prefix
from pronghorn.vlash.pi.modulation import StackedModulation, adaptive_norms

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("seed", range(4))
def test_shared_equals_separate(kind, seed):
    pi, seen, inputs = model(kind, seed=seed), prefix(seed=seed), branches(4, seed=seed)
    mask = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed)) < 0.6
    shared = pi.shared_losses(seen, **inputs, offset_mask=mask)
    separate = torch.stack([pi.losses(seen, **of_branch(inputs, branch)) for branch in range(4)], dim=1)
    torch.testing.assert_close(shared[mask], separate[mask], rtol=1e-9, atol=1e-9)
    assert not shared[~mask].any()
    assert separate.std() > 0.1


@kinds
def test_what_is_padding_in_the_prefix_does_not_matter(kind):
    pi, seen, inputs = model(kind), prefix(), branches(2)
    other = torch.where(seen.mask[..., None], seen.embeddings, 100.0)
    shorter = Prefix(seen.embeddings[:1, seen.mask[0]], seen.mask[:1, seen.mask[0]])
    assert seen.mask[0].sum() < seen.mask.shape[1]
    found = pi.shared_losses(seen, **inputs)
    torch.testing.assert_close(pi.shared_losses(Prefix(other, seen.mask), **inputs), found, rtol=1e-10, atol=1e-10)
    alone = pi.shared_losses(shorter, **{name: part[:1] for name, part in inputs.items()})
    torch.testing.assert_close(alone, found[:1], rtol=1e-9, atol=1e-9)


@kinds
def test_a_branch_does_not_see_another(kind):
    pi, seen, inputs = model(kind, torch.float32), prefix(dtype=torch.float32), branches(3, dtype=torch.float32)
    found = pi.velocity(seen, inputs["states"], inputs["noise"], inputs["time"], delay=inputs["delay"])
    changed = {name: part.clone() for name, part in inputs.items()}
    for part in changed.values():
        part[:, 1] = part[:, 1] * 2 + 1
    changed["delay"] = changed["delay"].clamp(max=3)
    other = pi.velocity(seen, changed["states"], changed["noise"], changed["time"], delay=changed["delay"])
    assert torch.equal(other[:, [0, 2]], found[:, [0, 2]])
    assert not torch.allclose(other[:, 1], found[:, 1])


@kinds
def test_the_prefix_does_not_see_the_branches(kind):
    net, seen = network(kind), prefix()
    pi, recorded = pi_model(net), []
    for layer in net.language_model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.register_forward_hook(lambda _, __, out: recorded.append(out.detach()))
    pi.shared_losses(seen, **branches(3, seed=5))
    pi.shared_losses(seen, **branches(3, seed=6))
    pi.sample(
        seen, torch.zeros(2, STATE).double(), torch.zeros(2, HORIZON, ACTION).double(), 1, delay=torch.tensor([0, 0])
    )
    first, second, alone = (recorded[start : start + 6] for start in (0, 6, 12))
    assert len(recorded) == 18
    for one, other, cached in zip(first, second, alone, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(cached[seen.mask], one[seen.mask], rtol=1e-10, atol=1e-10)


def test_the_state_of_pi0_does_not_see_actions_and_actions_see_it():
    net, seen, inputs = network("pi0"), prefix(), branches(1)
    recorded = []
    net.action_expert["model"].layers[2].self_attn.k_proj.register_forward_hook(
        lambda _, __, out: recorded.append(out.detach())
    )
    pi = pi_model(net)
    for changed in ("actions", "states"):
        other = dict(inputs)
        other[changed] = inputs[changed] + 1
        for arguments in (inputs, other):
            pi.shared_losses(seen, **arguments)
    actions, others, states, moved = recorded
    assert torch.equal(actions[:, 0], others[:, 0])
    assert not torch.allclose(actions[:, 1:], others[:, 1:])
    assert not torch.allclose(states[:, 0], moved[:, 0])
    assert not torch.allclose(states[:, 1:], moved[:, 1:])


def with_conditions(sizes, **conditions):
    """The same weights twice, without conditions and with new ones."""
    plain = randomized(PiNetwork(sizes))
    conditioned = PiNetwork(sizes, **conditions)
    missing = conditioned.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys
    assert not missing.unexpected_keys
    return plain, conditioned


@pytest.mark.parametrize(
    ("sizes", "conditions"),
    [
        (PI05_SIZES, {"state_cond": True}),
        (PI05_SIZES, {"max_delay_steps": 3}),
        (PI05_SIZES, {"state_cond": True, "max_delay_steps": 3}),
        (PI0_SIZES, {"max_delay_steps": 3}),
    ],
)
def test_a_new_condition_changes_nothing_until_it_is_trained(sizes, conditions):
    plain, conditioned = with_conditions(sizes, **conditions)
    seen, inputs = prefix(dtype=torch.float32), of_branch(branches(2, dtype=torch.float32), 1)
    before, after = pi_model(plain).losses(seen, **inputs), pi_model(conditioned).losses(seen, **inputs)
    assert torch.equal(after, before)
    noise = inputs["noise"]
    sampled = [
        pi_model(net).sample(seen, inputs["state"], noise, 3, delay=inputs["delay"]) for net in (plain, conditioned)
    ]
    assert torch.equal(*sampled)
    after.mean().backward()
    new = [
        parameter for name, parameter in conditioned.named_parameters() if "state_mlp_out" in name or "delay" in name
    ]
    assert new
    assert all(parameter.grad.abs().sum() > 0 for parameter in new)


@pytest.mark.parametrize("kind", ["pi0 told the delay", "pi05 told the delay"])
def test_the_delay_matters_and_longer_ones_count_as_the_longest(kind):
    pi, seen, inputs = model(kind), prefix(), of_branch(branches(1), 0)
    found = [pi.losses(seen, **{**inputs, "delay": torch.full((2,), delay)}) for delay in (0, 3, 9)]
    assert not torch.allclose(found[0], found[1])
    assert torch.equal(found[1], found[2])


@kinds
@pytest.mark.parametrize("steps", [1, 4])
def test_sampling_equals_full_forwards(kind, steps):
    pi, seen, inputs = model(kind), prefix(), of_branch(branches(3), 2)

    def velocity(x, time):
        times = torch.full((2, 1), time, dtype=torch.float64)
        return pi.velocity(seen, inputs["state"][:, None], x[:, None], times, delay=inputs["delay"][:, None])[:, 0]

    whole = flow.integrate(velocity, inputs["noise"], steps)
    cached = pi.sample(seen, inputs["state"], inputs["noise"], steps, delay=inputs["delay"])
    torch.testing.assert_close(cached, whole, rtol=1e-9, atol=1e-9)
    if pi.kind == "pi05":
        stacked = StackedModulation(adaptive_norms(pi.expert))
        joined = pi.sample(seen, inputs["state"], inputs["noise"], steps, delay=inputs["delay"], stacked=stacked)
        torch.testing.assert_close(joined, whole, rtol=1e-9, atol=1e-9)


@kinds
def test_everything_that_is_used_is_trained(kind):
    net, seen = network(kind), prefix()
    pi_model(net).shared_losses(seen, **branches(3)).mean().backward()
    idle = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    last = net.language_model.layers[2]
    unused = [last.post_attention_layernorm, last.mlp, last.self_attn.o_proj, net.language_model.norm,
              net.language_model.embed_tokens]  # fmt: skip
    expected = {id(parameter) for module in unused for parameter in module.parameters()}
    assert {id(dict(net.named_parameters())[name]) for name in idle} == expected
    silent = [name for name, weight in net.named_parameters() if weight.grad is not None and not weight.grad.any()]
    assert silent == ["vlm.model.language_model.layers.2.self_attn.q_proj.weight"]  # nobody reads what it asks for


@kinds
def test_a_branch_that_is_padding_trains_nothing(kind):
    seen, inputs = prefix(), branches(3)
    grads = []
    for inputs["actions"][:, 1] in (0.0, 50.0):
        net = network(kind)
        losses = pi_model(net).shared_losses(seen, **inputs, offset_mask=torch.tensor([[True, False, True]] * 2))
        flow.reduce_loss(losses, offset_mask=torch.tensor([[True, False, True]] * 2)).backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@kinds
def test_gradient_checkpointing_changes_nothing(kind):
    seen, inputs, found = prefix(), branches(2), []
    for checkpointing in (False, True):
        net = network(kind)
        losses = replace(pi_model(net), gradient_checkpointing=checkpointing).shared_losses(seen, **inputs)
        losses.mean().backward()
        found.append([losses.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [None, "two sequences", "two key heads", "separate projections", "a hook", "other numbers", "another eps", "pi0"],
)
def test_layers_run_fused_where_they_can_and_give_the_same(monkeypatch, change):
    kind, batch = "pi0" if change == "pi0" else "pi05", 2 if change == "two sequences" else 1
    sizes = replace(PI0_SIZES if kind == "pi0" else PI05_SIZES, kv_heads=2 if change == "two key heads" else 1)
    built = randomized(PiNetwork(sizes, state_cond=kind == "pi05")).double()
    layers = built.action_expert["model"].layers
    if change != "separate projections":
        fuse(layers)
    if change == "a hook":
        layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)
    if change == "another eps":
        layers[1].post_attention_layernorm.eps = 1e-2
    if change == "other numbers":
        layers[2].self_attn.o_proj = Doubled(layers[2].self_attn.o_proj)
    pi, seen, inputs = pi_model(built), prefix(batch=batch), of_branch(branches(1, batch=batch), 0)
    wanted = pi.sample(seen, inputs["state"], inputs["noise"], 2)

    calls = []
    monkeypatch.setattr(fused, "runs_fused", lambda x, layer: True)
    monkeypatch.setattr(joint, "suffix_layers", lambda *a, **k: calls.append(a) or suffix_layers(*a, **k))
    torch.testing.assert_close(pi.sample(seen, inputs["state"], inputs["noise"], 2), wanted, rtol=1e-9, atol=1e-9)
    assert len(calls) == (2 if change is None else 0)


class Doubled(torch.nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.in_features, self.weight, self.bias = inside.in_features, inside.weight, inside.bias

    def forward(self, x):
        return 2 * self.inside(x)


def test_layers_do_not_run_fused_where_they_are_differentiated(monkeypatch):
    built = randomized(PiNetwork(replace(PI05_SIZES, kv_heads=1), state_cond=True)).double()
    fuse(built.action_expert["model"].layers)
    pi, seen, inputs = pi_model(built), prefix(batch=1), of_branch(branches(1, batch=1), 0)

    def guide(velocity, x, time):
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            assert torch.autograd.grad(velocity(start).sum(), start)[0].abs().sum() > 0
        return x

    monkeypatch.setattr(fused, "runs_fused", lambda x, layer: pytest.fail("nobody asked for values alone"))
    pi.sample(seen, inputs["state"], inputs["noise"], 1, guide=guide)


@kinds
def test_the_sampled_field_can_be_differentiated(kind):
    pi, seen, inputs = model(kind), prefix(batch=1), of_branch(branches(1, batch=1), 0)
    checked = []

    def guide(velocity, x, time):
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            checked.append(torch.autograd.gradcheck(velocity, start))
            torch.testing.assert_close(velocity(start), velocity(x), rtol=1e-9, atol=1e-9)
        return velocity(x)

    pi.sample(seen, inputs["state"], inputs["noise"], 1, delay=inputs["delay"], guide=guide)
    assert checked == [True]


@pytest.mark.parametrize("full_jacobian", [False, True])
def test_sampling_can_be_guided(full_jacobian):
    pi, seen, inputs = model("pi05"), prefix(), of_branch(branches(1), 0)
    leftover = torch.full((2, HORIZON - 2, ACTION), 3.0).double()

    def guide(velocity, x, time):
        return guided_velocity(velocity, x, time, leftover, 2, full_jacobian=full_jacobian)

    free = pi.sample(seen, inputs["state"], inputs["noise"], 5)
    led = pi.sample(seen, inputs["state"], inputs["noise"], 5, guide=guide)
    assert ((led - 3)[:, :2]).abs().mean() < ((free - 3)[:, :2]).abs().mean()


def test_lower_precision_with_norms_in_float32():
    net = network("pi05", torch.float32)
    inputs = branches(2, dtype=torch.float32)
    wanted = pi_model(net).shared_losses(prefix(dtype=torch.float32), **inputs)
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear) and "proj" in name and "suffix" not in name and "out_proj" not in name:
            module.to(torch.bfloat16)
    pi = pi_model(net)
    assert pi.dtype == torch.bfloat16
    found = pi.shared_losses(prefix(dtype=torch.float32), **inputs)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().mean() < 0.1 * wanted.abs().mean()
    assert pi.sample(prefix(dtype=torch.float32), inputs["states"][:, 0], inputs["noise"][:, 0], 2).isfinite().all()


@kinds
def test_autocast_is_no_less_exact_than_half_precision(kind):
    seen, inputs, pi = prefix(dtype=torch.float32), branches(2, dtype=torch.float32), model(kind, torch.float32)
    wanted = pi.shared_losses(seen, **inputs).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = pi.shared_losses(seen, **inputs)
    found.mean().backward()
    halves = model(kind, torch.bfloat16).shared_losses(
        Prefix(seen.embeddings.bfloat16(), seen.mask),
        **{name: part if name == "delay" else part.bfloat16() for name, part in inputs.items()},
    )
    assert (found - wanted).norm() < (halves - wanted).norm()


def test_the_authors_round_the_state_of_pi0():
    net, seen, inputs = network("pi0", torch.float32), prefix(dtype=torch.float32), branches(1, dtype=torch.float32)
    exact, rounded = (
        pi_model(net, state_dtype=dtype).shared_losses(seen, **inputs) for dtype in (None, torch.bfloat16)
    )
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.2, atol=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": None}, "state: got None"),
        ({"states": torch.zeros(2, 3, STATE + 1)}, "state: got"),
        ({"noise": torch.zeros(2, 3, HORIZON, ACTION - 1)}, "noise: got"),
        ({"time": torch.zeros(2)}, "time: got"),
        ({"delay": None}, "delay: got None"),
        ({"delay": torch.zeros(2, dtype=torch.int64)}, "delay: got"),
        ({"delay": torch.full((2, 3), -1)}, "delay: got"),
        ({"offset_mask": torch.ones(2, 2, dtype=torch.bool)}, "offset_mask: got"),
        ({"actions": torch.zeros(2, 3, HORIZON, 2), "noise": torch.zeros(2, 3, HORIZON, 2)}, "actions: got"),
        ({name: part[:1] for name, part in branches(3).items()}, "actions: got"),
    ],
)
@pytest.mark.parametrize("kind", ["pi0 told the delay", "pi05 told the delay"])
def test_refuses(kind, change, message):
    with pytest.raises(ValueError, match=message):
        model(kind).shared_losses(prefix(), **{**branches(3), **change})


def test_refuses_several_delays_where_the_state_is_text():
    pi = pi_model(randomized(PiNetwork(PI05_SIZES)).double())
    inputs = {**branches(2), "states": None}
    with pytest.raises(ValueError, match="state_cond"):
        pi.shared_losses(prefix(), **inputs)
    assert pi.losses(prefix(), **{**of_branch(branches(1), 0), "state": None}).isfinite().all()


def test_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="PI05Pytorch"):
        pi_model(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="action_time_mlp_in"):
        replace(model("pi05"), suffix=torch.nn.Linear(2, 2)).kind  # noqa: B018
    shallow = network("pi05")
    del shallow.language_model.layers[2]
    with pytest.raises(ValueError, match="layers"):
        pi_model(shallow).shared_losses(prefix(), **branches(1))
    with pytest.raises(ValueError, match="kind"):
        PiSizes("pi1")
    with pytest.raises(ValueError, match="state_cond"):
        PiNetwork(PI0_SIZES, state_cond=True)
    with pytest.raises(ValueError, match="mask: got"):
        Prefix(torch.zeros(2, 3, 4), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="image_masks"):
        Prefix.join([torch.zeros(1, 2, 4)], [], torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="steps"):
        model("pi0").sample(prefix(), torch.zeros(2, STATE).double(), torch.zeros(2, HORIZON, ACTION).double(), 0)


def test_the_prefix_is_images_then_text():
    image, text = torch.zeros(2, 3, 4), torch.ones(2, 2, 4)
    joined = Prefix.join(
        [image, image],
        [torch.tensor([True, True]), torch.tensor([True, False])],
        text,
        torch.tensor([[True, True], [True, False]]),
    )
    assert joined.embeddings[:, :, 0].tolist() == [[0] * 6 + [1] * 2] * 2
    assert joined.mask.tolist() == [[True] * 8, [True] * 3 + [False] * 3 + [True, False]]
