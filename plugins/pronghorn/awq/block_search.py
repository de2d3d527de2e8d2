"""The AWQ search in one decoder block: scales by grid search, then clipping (AWQ, sections 3.2 and 3.3).

Nothing in the block is changed: the search says what to do, `SearchResult.apply` does it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pronghorn.awq.config import AwqConfig
from pronghorn.awq.scaling import candidate_scale, divide_last_rows, normalised_weight_mean
from pronghorn.awq.tracing import ScaleGroup
from pronghorn.kernels.group_clip_search import group_clip_search
from pronghorn.kernels.group_fake_quantize import group_fake_quantize

logger = logging.getLogger(__name__)

CLIP_TOKENS = 512  # the clip search looks at every (tokens // 512)-th token, so at 512 to 1023 of them
NEVER_CLIPPED = ("q_", "k_", "query", "key", "Wqkv")  # their outputs meet in a softmax, where clipping hurts


class Inputs(Protocol):
    """A block's calibration inputs, chunk by chunk, as often as asked for."""

    def __iter__(self) -> Any:
        """Pairs of hidden states [batch, tokens, hidden] and the block's other arguments."""


@dataclass(frozen=True)
class GroupScale:
    """The scale chosen for one group, with the loss of every grid point (the first is round-to-nearest)."""

    group: ScaleGroup
    scale: Tensor
    losses: list[float]

    @property
    def best(self) -> int:
        """Index of the chosen grid point."""
        return min(range(len(self.losses)), key=lambda index: _nan_last(self.losses[index]))


@dataclass(frozen=True)
class BlockSearchResult:
    """Scales in the order of application, clip maxima [N, K/g, 1] by linear, and linears that saw no token."""

    scales: list[GroupScale]
    clips: dict[str, Tensor]
    unreached: list[str] = field(default_factory=list)


@torch.no_grad()
def search_block(
    block: nn.Module,
    inputs: Inputs,
    groups: Iterable[ScaleGroup],
    linears: Mapping[str, nn.Linear],
    config: AwqConfig,
    *,
    keep_first_trial: bool = False,
) -> BlockSearchResult:
    """Search scales and clipping for one block.

    Args:
        block: the decoder layer, in evaluation mode.
        inputs: its calibration inputs.
        groups: its scale groups (`trace_scale_groups` or the user's).
        linears: the linears to quantize, by name inside the block.
        config: bits, group size, grid and rules.
        keep_first_trial: go on from weights that still carry the first trial's scale, and leave them so. That is what
            AutoAWQ does on a CPU, where its backup of the weights shares their memory; it serves to replay its results.

    Raises:
        ValueError: no grid point of a group has a finite loss.
    """
    groups = list(groups)
    names = list(dict.fromkeys([*linears, *(name for group in groups for name in group.readers)]))
    statistics = {name: _InputStatistics(block.get_submodule(name)) for name in names}
    with _observed(statistics, _InputStatistics.count_tokens):
        _run(block, inputs)
    for group in groups:
        if len(group.readers) == 1 and group.inspect == group.readers[0]:
            statistics[group.inspect].want_gram()
    with _observed(statistics, _InputStatistics.gather):
        _run(block, inputs)
    unreached = [name for name in linears if statistics[name].tokens == 0]
    if unreached:
        logger.warning("no calibration token reached %s: rounded to nearest", ", ".join(unreached))

    scales = []
    for group in groups:
        if any(statistics[name].tokens for name in group.readers):
            reached = [name for name in group.linears if statistics[name].tokens]
            scales.append(_search_scale(block, inputs, group, reached, statistics, config, keep_first_trial))
    clips = {}
    if config.clip:
        for name, linear in linears.items():
            if statistics[name].tokens and not any(part in name.rsplit(".", 1)[-1] for part in NEVER_CLIPPED):
                clips[name] = _search_clip(name, linear, statistics[name].sample(), scales, config)
    return BlockSearchResult(scales, clips, unreached)


def _search_scale(
    block: Any,
    inputs: Inputs,
    group: ScaleGroup,
    reached: list[str],
    statistics: Mapping[str, _InputStatistics],
    config: AwqConfig,
    keep_first_trial: bool,
) -> GroupScale:
    # In a mixture of experts the router, or a shared expert, sees all tokens.
    input_mean = max((statistics[name] for name in group.readers), key=lambda item: item.tokens).mean()
    weights = {name: block.get_submodule(name).weight.detach() for name in reached}
    weight_mean = normalised_weight_mean(list(weights.values()), config.group_size) if config.duo_scaling else None
    candidates = [
        candidate_scale(input_mean, index / config.grid, weight_mean).to(next(iter(weights.values())).dtype)
        for index in range(config.grid)
    ]
    gram = statistics[group.inspect].gram if group.inspect in statistics else None
    if gram is not None:
        loss = _output_error_by_gram(weights[group.inspect], gram)
    else:
        loss = _output_error_by_running(block, inputs, group)
    losses = []
    for scale in candidates:
        trial = {name: _fake_quantized(weight * scale, config) / scale for name, weight in weights.items()}
        losses.append(loss(trial))
        if keep_first_trial and len(losses) == 1:
            weights = {name: weight * scale for name, weight in weights.items()}
            for name, weight in weights.items():
                block.get_submodule(name).weight.data = weight
    result = GroupScale(group, torch.empty(0), losses)
    if not any(_nan_last(value) < float("inf") for value in losses):
        raise ValueError(
            f"scale search of {group.prev} -> {', '.join(group.linears)}: no grid point has a finite loss; "
            "the model's activations overflow its dtype (try bfloat16 or float32)"
        )
    return GroupScale(group, candidates[result.best], losses)


def _search_clip(name: str, linear: nn.Linear, sample: Tensor, scales: list[GroupScale], config: AwqConfig) -> Tensor:
    weight = linear.weight.detach().clone()
    for entry in scales:
        if name in entry.group.linears:
            weight *= entry.scale
            sample = sample / entry.scale
        if name == entry.group.prev:
            divide_last_rows(weight, entry.scale)
    maximum = group_clip_search(
        weight, sample, bits=config.bits, group_size=config.group_size, symmetric=not config.zero_point
    )
    return maximum.unsqueeze(-1)


def _fake_quantized(weight: Tensor, config: AwqConfig) -> Tensor:
    fake, _, _ = group_fake_quantize(
        weight, bits=config.bits, group_size=config.group_size, symmetric=not config.zero_point
    )
    return fake


def _output_error_by_gram(weight: Tensor, gram: Tensor) -> Callable[[Mapping[str, Tensor]], float]:
    """Mean squared error of one linear's output: with D = W' - W it is sum(D (X^T X) * D) / (tokens * N)."""

    def loss(trial: Mapping[str, Tensor]) -> float:
        (new,) = trial.values()
        difference = (new - weight).float()
        return (((difference @ gram) * difference).sum(dtype=torch.float64) / weight.shape[0]).item()

    return loss


def _output_error_by_running(
    block: nn.Module, inputs: Inputs, group: ScaleGroup
) -> Callable[[Mapping[str, Tensor]], float]:
    """Mean squared error of the inspected module's output over all calibration tokens."""
    module = block.get_submodule(group.inspect)
    calls = _calls_of(block, module, inputs)
    originals = [_first(module(*args, **kwargs)) for args, kwargs in calls]
    elements = sum(output.numel() for output in originals)

    def loss(trial: Mapping[str, Tensor]) -> float:
        error = 0.0
        with _weights(block, trial):
            for (args, kwargs), original in zip(calls, originals, strict=True):
                error += (original - _first(module(*args, **kwargs))).float().pow(2).sum(dtype=torch.float64).item()
        return error / elements

    return loss


def _calls_of(block: nn.Module, module: nn.Module, inputs: Inputs) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    if module is block:
        return [((hidden,), kwargs) for hidden, kwargs in inputs]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        _run(block, inputs)
    finally:
        hook.remove()
    return calls


def _run(block: nn.Module, inputs: Inputs) -> None:
    for hidden_states, kwargs in inputs:
        block(hidden_states, **kwargs)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _nan_last(value: float) -> float:
    return value if value == value else float("inf")


@contextmanager
def _weights(block: nn.Module, trial: Mapping[str, Tensor]) -> Any:
    modules = {name: block.get_submodule(name) for name in trial}
    kept = {name: module.weight.data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight.data = trial[name]
        yield
    finally:
        for name, module in modules.items():
            module.weight.data = kept[name]


class _InputStatistics:
    """What the search needs to know of one linear's calibration inputs, gathered in two passes over them."""

    def __init__(self, linear: Any) -> None:
        self.linear = linear
        self.channels = linear.weight.shape[1]
        self.tokens = 0
        self.gram: Tensor | None = None
        self._absolute_sum: Tensor | None = None
        self._sample: list[Tensor] = []
        self._seen = 0

    def count_tokens(self, rows: Tensor) -> None:
        """First pass: how many tokens there are, which sets the stride of the second."""
        self.tokens += rows.shape[0]

    def want_gram(self) -> None:
        """Ask the second pass for X^T X / tokens, where that is cheaper than running the linear on every token."""
        if self.tokens > 2 * self.channels:
            self.gram = torch.zeros(self.channels, self.channels, device=self.linear.weight.device)

    def gather(self, rows: Tensor) -> None:
        """Second pass: sum of |x|, every n-th token, and the Gram matrix if it is wanted."""
        total = rows.abs().sum(dim=0, dtype=torch.float64)
        self._absolute_sum = total if self._absolute_sum is None else self._absolute_sum + total
        stride = max(1, self.tokens // CLIP_TOKENS)
        self._sample.append(rows[-self._seen % stride :: stride].clone())
        self._seen += rows.shape[0]
        self._dtype = rows.dtype
        if self.gram is not None:
            self.gram.addmm_(rows.float().T, rows.float(), alpha=1 / self.tokens)

    def mean(self) -> Tensor:
        """[K]: mean of |x| over all tokens, in the inputs' dtype."""
        if self._absolute_sum is None:
            raise ValueError("no token was seen")
        return (self._absolute_sum / self.tokens).to(self._dtype)

    def sample(self) -> Tensor:
        """[tokens, K]: every n-th token."""
        return torch.cat(self._sample)


@contextmanager
def _observed(statistics: Mapping[str, _InputStatistics], note: Callable[[_InputStatistics, Tensor], None]) -> Any:
    with ExitStack() as hooks:
        for entry in statistics.values():

            def hook(_: nn.Module, args: tuple[Any, ...], entry: _InputStatistics = entry) -> None:
                note(entry, args[0].detach().reshape(-1, entry.channels))

            hooks.enter_context(entry.linear.register_forward_pre_hook(hook))
        yield
