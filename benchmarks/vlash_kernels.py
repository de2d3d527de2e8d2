"""The kernels of a policy trained at several delays, with the shapes of pi0.5, against what PyTorch has for them.

Two cameras and 200 tokens of text are 712 tokens of the prefix; a branch has 50 actions; 8 heads of 256 share one
key/value head. Nothing is masked out, so that all sides have the same to do. The share of the hardware's limit is of
the tensor cores' operations for attention in training, of the bandwidth for the norm.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import device, measure, measure_in_turn, row, share_of_bandwidth, write
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from pronghorn.kernels.adaptive_rms_norm import adaptive_rms_norm
from pronghorn.kernels.adaptive_rms_norm.cases import OPERATION as NORM
from pronghorn.kernels.shared_observation_attention import shared_observation_attention
from pronghorn.kernels.shared_observation_attention.cases import OPERATION as SHARED
from pronghorn.kernels.suffix_attention import suffix_attention
from pronghorn.kernels.suffix_attention.cases import OPERATION as SUFFIX

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
OPERATIONS_PER_SECOND = {"NVIDIA H100 80GB HBM3": 989e12}  # in bf16, dense
SIZES = [(1, 9), (4, 4), (4, 9), (8, 9), (16, 13)] if GPU else [(1, 2)]  # samples, branches
LENGTH, TOKENS, SIZE, CHANNELS = (712, 50, 256, 1024) if GPU else (20, 5, 8, 16)
ROWS = [1, 36, 208] if GPU else [2]
LAYERS = 18 if GPU else 1
BACKWARD = 2.5  # of the forward's operations

Run = Callable[[], Any]


def main() -> None:
    """Measure and write the results, what there is after each part."""
    parts = {"shared": shared_rows, "suffix": suffix_rows, "norm": norm_rows}
    rows: list[dict[str, Any]] = []
    for name in sys.argv[1:] or list(parts):
        rows += parts[name]()
        write("vlash-kernels", rows)


def shared_rows() -> list[dict[str, Any]]:
    """Attention in training, forward and with its gradients."""
    rows = []
    for batch, branches in SIZES:
        knobs = {**SHARED.large, "batch": batch, "branches": branches, "length": LENGTH, "tokens": TOKENS, "size": SIZE}
        arguments = example(SHARED, knobs)
        inputs = [arguments[name].requires_grad_() for name in SHARED.trains]
        masks = arguments["prefix_mask"], arguments["branch_mask"]
        sides = {"": lambda inputs=inputs, masks=masks: shared_observation_attention(*inputs, *masks)}
        query, key, value = joined = [
            torch.cat([prefix, branch.flatten(1, 2)], dim=1).transpose(1, 2).detach().requires_grad_()
            for prefix, branch in zip(inputs[:3], inputs[3:], strict=True)
        ]
        bias = additive_mask(query.shape[2])
        sides["SDPA with an additive mask"] = lambda q=query, k=key, v=value, bias=bias: scaled_dot_product_attention(
            q, k.expand(-1, 8, -1, -1), v.expand(-1, 8, -1, -1), attn_mask=bias
        )
        if GPU:
            torch.compiler.reset()  # one function is compiled anew for few shapes only
            blocks = create_block_mask(sees, None, None, query.shape[2], query.shape[2], device="cuda")
            compiled = torch.compile(flex_attention, dynamic=False)
            sides["FlexAttention"] = functools.partial(compiled, *joined, block_mask=blocks, enable_gqa=True)
        for what, times_of, share in (
            ("forward", forward, 1), ("forward and backward", with_gradients, 1 + BACKWARD),
        ):  # fmt: skip
            times = {name: measure(times_of(run, joined if name else inputs)) for name, run in sides.items()}
            work = share * SHARED.cost(knobs).flops
            rows += [
                row(f"shared observation, {what}", name, f"{batch} samples, {branches} branches", times[""], theirs,
                    reach=1.3, roofline=share_of_operations(work, times[""]["p50"]), note="operations")
                for name, theirs in times.items() if name
            ]  # fmt: skip
    return rows


def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Whether a query sees a key of the joined sequence."""
    return (key < LENGTH) | ((query >= LENGTH) & ((query - LENGTH) // TOKENS == (key - LENGTH) // TOKENS))


def additive_mask(length: int) -> Tensor:
    """[1, 1, length, length] with the lowest number where a query does not see a key."""
    place = torch.arange(length, device=device())
    seen = sees(None, None, place[:, None], place)
    return torch.zeros(1, 1, length, length, dtype=DTYPE, device=device()).masked_fill(~seen, torch.finfo(DTYPE).min)


def suffix_rows() -> list[dict[str, Any]]:
    """Attention of one step of sampling, of layers that follow each other, each with a prefix of its own."""
    knobs = {**SUFFIX.large, "tokens": TOKENS, "length": LENGTH, "size": SIZE}
    layers = [example(SUFFIX, knobs, seed) for seed in range(LAYERS)]
    ours = in_turn([functools.partial(suffix_attention, **layer) for layer in layers])
    theirs = in_turn([functools.partial(after_cat, **layer) for layer in layers])
    return [
        row("suffix attention, one layer", "SDPA after cat", f"{TOKENS} tokens, prefix of {LENGTH}", ours, theirs,
            roofline=share_of_bandwidth(SUFFIX.cost(knobs).bytes, ours["p50"]), note="launches; limit 8 us")
    ]  # fmt: skip


def after_cat(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, key: Tensor, value: Tensor, **_: Any
) -> Tensor:  # fmt: skip
    """As a layer does it with a cache of the prefix."""
    keys, values = torch.cat([prefix_key, key], dim=1), torch.cat([prefix_value, value], dim=1)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, keys, values))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def norm_rows() -> list[dict[str, Any]]:
    """The gated residual and its norm, in sampling and in training."""
    rows = []
    for count in ROWS:
        knobs = {"rows": (count,), "tokens": TOKENS, "channels": CHANNELS}
        arguments = example(NORM, knobs)
        inputs = [arguments[name].requires_grad_() for name in NORM.trains]
        sides: dict[str, Run] = {
            "": functools.partial(adaptive_rms_norm, **arguments), "eager": functools.partial(eager_norm, **arguments)
        }  # fmt: skip
        if GPU:
            sides["torch.compile"] = functools.partial(torch.compile(eager_norm, dynamic=False), **arguments)
        for what, times_of, share in (("forward", forward, 1.0), ("forward and backward", with_gradients, 2.5)):
            times = {name: measure(times_of(run, inputs)) for name, run in sides.items()}
            moved = share * NORM.cost(knobs).bytes  # the backward reads four numbers and writes two
            rows += [
                row(f"adaptive norm, {what}", name, f"{count} rows", times[""], theirs,
                    roofline=share_of_bandwidth(moved, times[""]["p50"]), note="bytes")
                for name, theirs in times.items() if name
            ]  # fmt: skip
    return rows


def eager_norm(x: Tensor, scale: Tensor, shift: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """As a layer does it."""
    x = x + update * gate[:, None]
    normal = x * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + 1e-6)
    return (normal * (1 + scale[:, None].float()) + shift[:, None].float()).to(x.dtype), x


def forward(run: Run, inputs: list[Tensor]) -> Run:
    """The run alone."""

    def timed() -> None:
        with torch.no_grad():
            run()

    return timed


def with_gradients(run: Run, inputs: list[Tensor]) -> Run:
    """The run, and the gradients of its inputs for gradients of ones."""
    with torch.no_grad():
        results = run()
    grads = [torch.ones_like(result) for result in ([results] if isinstance(results, Tensor) else results)]

    def timed() -> None:
        torch.autograd.grad(run(), inputs, grads)

    return timed


def example(operation: Any, knobs: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Arguments of an operation, save what is left to its defaults."""
    arguments = operation.example(knobs, DTYPE, torch.Generator().manual_seed(seed), device())
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def in_turn(runs: list[Run]) -> dict[str, float]:
    """Seconds a run of several that follow each other."""
    return measure_in_turn(runs) if GPU else measure(runs[0])


def share_of_operations(operations: float, seconds: float) -> float | None:
    """Achieved share of the tensor cores' operations; None where their peak is not known."""
    peak = OPERATIONS_PER_SECOND.get(torch.cuda.get_device_name()) if GPU else None
    return None if peak is None else operations / seconds / peak


if __name__ == "__main__":
    main()
