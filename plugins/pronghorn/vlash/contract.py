"""VLASH's part of the contract of all methods: a small pi0.5 that is told state and delay."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.contract import Contract, randomize
from pronghorn.vlash.pi.adapt import pi_model
from pronghorn.vlash.pi.layers import PiNetwork, PiSizes
from pronghorn.vlash.pi.model import Prefix

SIZES = PiSizes(
    depth=2, heads=2, head_dim=4, prefix_width=8, prefix_mlp=8, width=8, mlp=8, vocab=16, state_dim=3, action_dim=3
)


def _module(seed: int) -> PiNetwork:
    network = PiNetwork(SIZES, state_cond=True, max_delay_steps=2).eval()
    randomize(network, seed, 1 / 2)
    return network


def _run(module: PiNetwork) -> Tensor:
    seen = Prefix(module.embed_tokens(torch.arange(4)[None]), torch.ones(1, 4, dtype=torch.bool))
    state, noise = torch.linspace(-1, 1, 3)[None], torch.linspace(-1, 1, 12).view(1, 4, 3)
    return pi_model(module).sample(seen, state, noise, 2, delay=torch.tensor([1])).detach()


contract = Contract(
    module=_module,
    run=_run,
    exceptions={
        "compile": "not claimed: its policies replay their steps as CUDA graphs, or run as LeRobot runs them",
    },
)
