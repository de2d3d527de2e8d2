"""Tiny pi networks with random weights, and what they are asked."""

import torch

from pronghorn.vlash.pi.adapt import pi_model
from pronghorn.vlash.pi.layers import PiNetwork, PiSizes
from pronghorn.vlash.pi.model import Prefix

STATE, ACTION, HORIZON, PREFIX = 4, 5, 6, 7
PI0_SIZES, PI05_SIZES = (
    PiSizes(kind, depth=3, heads=4, kv_heads=2, head_dim=8, prefix_width=24, prefix_mlp=40, width=16, mlp=32, vocab=11,
            state_dim=STATE, action_dim=ACTION)
    for kind in ("pi0", "pi05")
)  # fmt: skip
KINDS = {
    "pi0": (PI0_SIZES, {}),
    "pi0 told the delay": (PI0_SIZES, {"max_delay_steps": 3}),
    "pi05": (PI05_SIZES, {"state_cond": True}),
    "pi05 told the delay": (PI05_SIZES, {"state_cond": True, "max_delay_steps": 3}),
}


def network(kind, dtype=torch.float64, seed=0):
    """One of `KINDS`, with no weight at zero."""
    sizes, conditions = KINDS[kind]
    return randomized(PiNetwork(sizes, **conditions), seed).to(dtype)


def randomized(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return module


def model(kind, dtype=torch.float64, seed=0):
    return pi_model(network(kind, dtype, seed))


def prefix(batch=2, dtype=torch.float64, seed=1):
    """Random tokens, of which some in the middle are missing and some at the end are padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, PREFIX, generator=generator) < 0.7
    mask[:, 0] = True
    return Prefix(torch.randn(batch, PREFIX, PI0_SIZES.prefix_width, generator=generator).to(dtype), mask)


def branches(count, batch=2, dtype=torch.float64, seed=2):
    """States, actions, noise, times and delays."""
    generator = torch.Generator().manual_seed(seed)
    states, actions, noise = (
        torch.randn(batch, count, *shape, generator=generator).to(dtype)
        for shape in ((STATE,), (HORIZON, ACTION), (HORIZON, ACTION))
    )
    time = torch.rand(batch, count, generator=generator).to(dtype)
    return {"states": states, "actions": actions, "noise": noise, "time": time,
            "delay": torch.arange(count).expand(batch, count)}  # fmt: skip


def of_branch(inputs, branch):
    """What `losses` takes, of one branch."""
    own = {name: part[:, branch] for name, part in inputs.items()}
    own["state"] = own.pop("states")
    return own
