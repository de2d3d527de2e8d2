"""One sequence on several GPUs: each has a part of the tokens, and in attention a part of the heads (Ulysses)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceParallel:
    """The ranks that share a sequence; one rank alone does nothing.

    Args:
        group: their process group; None for a single process.

    Source: Jacobs et al., DeepSpeed Ulysses (arXiv 2309.14509), section 3.1.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def check_equal(self, tokens: Tensor) -> None:
        """Raise ValueError unless all ranks were given the same sequence."""
        if self.group is None:
            return
        place = torch.arange(1, tokens.numel() + 1, device=tokens.device)
        mark = torch.stack([(tokens.flatten() * place).sum(), place.sum()])
        both = torch.stack([mark, -mark])
        dist.all_reduce(both, dist.ReduceOp.MAX, self.group)
        if not torch.equal(both[0], -both[1]):
            raise ValueError("dataset: the ranks read different samples; seed what it draws when it is made")

    def own_part(self, tokens: Tensor, filler: int) -> Tensor:
        """This rank's stretch of [batch, tokens], filled up at the end to a multiple of the ranks."""
        short = -tokens.shape[1] % self.size
        return torch.nn.functional.pad(tokens, (0, short), value=filler).chunk(self.size, dim=1)[self.rank]

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions [1, tokens] of this rank's stretch."""
        return torch.arange(self.rank * tokens, (self.rank + 1) * tokens, device=device)[None]

    def own_heads(self, gate: Tensor) -> Tensor:
        """The gates of the key/value heads that this rank has in attention.

        Raises:
            ValueError: the heads cannot be shared evenly.
        """
        if gate.shape[0] % self.size:
            raise ValueError(
                f"{self.size} ranks cannot share {gate.shape[0]} key/value heads evenly; take a divisor of them"
            )
        return gate.chunk(self.size)[self.rank]

    def to_heads(self, tensor: Tensor) -> Tensor:
        """[batch, heads, own tokens, size] to [batch, own heads, tokens, size]."""
        return tensor if self.group is None else _Exchange.apply(tensor, self.group, 1, 2)

    def to_tokens(self, tensor: Tensor) -> Tensor:
        """[batch, own heads, tokens, size] to [batch, heads, own tokens, size]."""
        return tensor if self.group is None else _Exchange.apply(tensor, self.group, 2, 1)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of all ranks."""
        if self.group is not None:
            for parameter in parameters:
                dist.all_reduce(parameter.grad, group=self.group)

    def total(self, value: Tensor) -> float:
        """The sum of a number over the ranks."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return float(value)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.group is not None:
            dist.barrier(self.group)

    def close(self) -> None:
        """Wait for all ranks and leave the group; one that just ends makes the others fail."""
        self.wait()
        if self.group is not None:
            dist.destroy_process_group()


class _Exchange(torch.autograd.Function):
    """Every rank gives each other a share along one dimension and joins what it gets along another."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, given: int, joined: int) -> Tensor:
        ctx.group, ctx.given, ctx.joined = group, given, joined
        return _exchange(tensor, group, given, joined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.group, ctx.joined, ctx.given), None, None, None


def _exchange(tensor: Tensor, group: Any, given: int, joined: int) -> Tensor:
    shares = torch.stack(tensor.chunk(dist.get_world_size(group), dim=given)).contiguous()
    received = torch.empty_like(shares)
    dist.all_to_all_single(received, shares, group=group)
    return torch.cat(list(received), dim=joined)


def launched() -> SequenceParallel:
    """All processes of this run as one group, where `accelerate launch` or `torchrun` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SequenceParallel()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return SequenceParallel(dist.group.WORLD)
