"""The gradient of one step: a backward for each trajectory and two buffers, or ghost norms of many trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pronghorn.vcpo.baseline import baseline, baseline_weights
from pronghorn.vcpo.config import GROUP, OFF, SEQUENCE_MEAN, VCPOConfig
from pronghorn.vcpo.ghost_norms import GhostNorms
from pronghorn.vcpo.minibatch import Minibatch
from pronghorn.vcpo.ratios import sequence_log_ratios, token_log_ratios, truncated_log_ratios

LEAST_STD = 1e-8  # rewards that differ by less are equal


class GradientBuffers:
    """Σ value · gradient and Σ gradient, so that a baseline known only at the end can still be taken off each value.

    Both are in float32, or float64 for parameters of that.

    Args:
        parameters: what gradients are of.
        with_baseline: whether the second buffer is needed.
    """

    def __init__(self, parameters: list[Tensor], with_baseline: bool) -> None:
        def zeros() -> list[Tensor]:
            return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]

        self.accum = zeros()
        self.score = zeros() if with_baseline else []

    def add(self, gradients: tuple[Tensor, ...], value: float, factor: float) -> None:
        """Add factor · value · gradient to the first buffer, factor · gradient to the second."""
        torch._foreach_add_(self.accum, gradients, alpha=factor * value)
        if self.score:
            torch._foreach_add_(self.score, gradients, alpha=factor)

    def close(self, baseline: float) -> None:
        """Take the baseline off all values since the last call."""
        torch._foreach_add_(self.accum, self.score, alpha=-baseline)
        torch._foreach_zero_(self.score)


@dataclass(frozen=True)
class Accumulated:
    """What a pass over a minibatch found.

    Attributes:
        parameters: what gradients are of.
        gradients: of the loss to be minimised, not yet clipped, one for each parameter.
        score_norms: ‖∇ Σ log p‖ of each trajectory, without its ratio, float64 [trajectories].
        log_ratios: of the tokens, 0 where masked, float64 [trajectories, tokens].
        baselines: one for each group, one in all, or none.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    score_norms: Tensor
    log_ratios: Tensor
    baselines: list[float]


def accumulate(
    log_probs_of: Callable[[int], Tensor], parameters: Sequence[Tensor], minibatch: Minibatch, config: VCPOConfig
) -> Accumulated:
    """The policy gradient of a minibatch with its off-policy optimal baseline.

    Args:
        log_probs_of: gives the learner's log-probabilities of one trajectory's tokens, [tokens], with their graph. It
            is called once for each, in order, save for empty ones.
        parameters: what learns; one that is listed twice counts once.
        minibatch: its trajectories.
        config: the weights.

    Raises:
        ValueError: there is no parameter, or a log-probability is not finite.
        FloatingPointError: a trajectory's gradient is not finite.
    """
    parameters = list(dict.fromkeys(parameters))
    if not parameters:
        raise ValueError("parameters: got none, wanted at least one")
    buffers = GradientBuffers(parameters, with_baseline=config.opob != OFF)
    scopes, baselines = _Scopes(minibatch, config), []
    for rows in scopes.rows:
        values, scale = _values(minibatch, rows, config)
        for row, value in zip(rows, values.tolist(), strict=True):
            if minibatch.mask[row].any():
                gradients = _score(log_probs_of(row), parameters, minibatch, row, scopes.log_ratios)
                scopes.norms[row] = _norm(gradients, row)
                buffers.add(gradients, value, float(scopes.factors(range(row, row + 1))) / scale)
        if config.opob != OFF:
            baselines.append(scopes.baseline(rows, values))
            buffers.close(baselines[-1])
    return Accumulated(parameters, buffers.accum, scopes.norms, scopes.log_ratios, baselines)


def accumulate_batched(
    log_probs_of: Callable[[range], tuple[Tensor, Tensor]],
    model: nn.Module,
    minibatch: Minibatch,
    config: VCPOConfig,
    micro_batches: Sequence[range],
) -> Accumulated:
    """The same gradient as of `accumulate`, with one forward and two backwards for many trajectories.

    Args:
        log_probs_of: gives the learner's log-probabilities of some rows' tokens, [rows, tokens], with their graph, and
            which of these rows each position of the model's input belongs to, integers [batch, positions], -1 for
            padding. It is called once for each micro-batch, in order.
        model: its parameters that need a gradient learn.
        minibatch: its trajectories.
        config: the weights.
        micro_batches: the rows of each forward; whole groups with `opob="group"`, all with `opob="minibatch"`.

    Raises:
        ValueError: micro-batches are not those, or as of `accumulate` and `GhostNorms`.
        TypeError: a layer of the model is not one of those that `GhostNorms` knows.
        FloatingPointError: a trajectory's gradient is not finite.
    """
    parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model: nothing learns, wanted at least one parameter with requires_grad")
    scopes, ghosts, baselines = _Scopes(minibatch, config), GhostNorms(model), []
    buffers = GradientBuffers(parameters, with_baseline=False)
    for rows, inside in zip(micro_batches, scopes.inside(micro_batches), strict=True):
        of_rows = slice(rows.start, rows.stop)
        with ghosts:
            log_probs, trajectories = log_probs_of(rows)
            mask = minibatch.mask[of_rows]
            try:
                scopes.log_ratios[of_rows] = token_log_ratios(log_probs, minibatch.sampler_log_probs[of_rows], mask)
            except ValueError as error:
                raise ValueError(f"trajectories from {rows.start} on: {error}") from error
            sums = log_probs.masked_fill(~mask, 0).sum(-1)
            scopes.norms[of_rows] = ghosts.norms(sums.sum(), trajectories, len(rows)).cpu()
        if not scopes.norms[of_rows].isfinite().all():
            raise FloatingPointError(f"trajectories {rows.start} to {rows.stop - 1}: a gradient's norm is not finite")
        coefficients = []
        for scope in inside:
            values, scale = _values(minibatch, scope, config)
            if config.opob != OFF:
                baselines.append(scopes.baseline(scope, values))
                values = values - baselines[-1]
            coefficients.append(values / scale * scopes.factors(scope))
        gradients = torch.autograd.grad(
            (torch.cat(coefficients).to(sums) * sums).sum(), parameters, materialize_grads=True
        )
        buffers.add(gradients, 1.0, 1.0)
    return Accumulated(parameters, buffers.accum, scopes.norms, scopes.log_ratios, baselines)


class _Scopes:
    """What is known of a minibatch's trajectories as it is gone through, and what follows for each scope."""

    def __init__(self, minibatch: Minibatch, config: VCPOConfig) -> None:
        everything = range(len(minibatch))
        self.rows = minibatch.group_rows() if config.opob == GROUP else [everything]
        self.norms = torch.zeros(len(minibatch), dtype=torch.float64)
        self.log_ratios = torch.zeros(minibatch.mask.shape, dtype=torch.float64)
        self._lengths, self._config = minibatch.lengths.cpu(), config

    def baseline(self, rows: range, values: Tensor) -> float:
        """Of one scope that was gone through."""
        scope = slice(rows.start, rows.stop)
        ratios = sequence_log_ratios(self.log_ratios[scope])
        return baseline(
            values, baseline_weights(self.norms[scope], ratios, self._lengths[scope], self._config), self._config
        )

    def factors(self, rows: range) -> Tensor:
        """d loss / d log p of sequences whose value is 1, float64 [rows]."""
        scope = slice(rows.start, rows.stop)
        ratios = truncated_log_ratios(sequence_log_ratios(self.log_ratios[scope]), self._config).exp()
        divide = self._config.loss_aggregation == SEQUENCE_MEAN
        return -ratios / (self._lengths[scope].clamp(min=1) if divide else 1) / len(self._lengths)

    def inside(self, micro_batches: Sequence[range]) -> list[list[range]]:
        """The scopes of each micro-batch; without a baseline those are the micro-batches."""
        if [row for rows in micro_batches for row in rows] != list(range(len(self._lengths))):
            raise ValueError(f"micro_batches: got {list(micro_batches)}, wanted all {len(self._lengths)} rows in order")
        if self._config.opob == OFF:
            return [[rows] for rows in micro_batches]
        found = [[scope for scope in self.rows if scope.start in rows] for rows in micro_batches]
        for rows, scopes in zip(micro_batches, found, strict=True):
            if sum(map(len, scopes)) != len(rows) or scopes[-1].stop != rows.stop:
                raise ValueError(
                    f"micro_batches: got {rows}, which cuts what a baseline is over; wanted whole {self._config.opob}s"
                )
        return found


def _values(minibatch: Minibatch, rows: range, config: VCPOConfig) -> tuple[Tensor, float]:
    """What the baseline is taken off, float64 [rows], and what the difference is divided by."""
    if config.opob != GROUP:
        return minibatch.advantages[rows.start : rows.stop].double().cpu(), 1.0
    rewards = minibatch.rewards[rows.start : rows.stop].double().cpu()
    deviation = float(rewards.std(correction=0)) if config.opob_norm_by_std else 0.0
    return rewards, deviation if deviation > LEAST_STD else 1.0


def _score(
    log_probs: Tensor, parameters: Sequence[Tensor], minibatch: Minibatch, row: int, log_ratios: Tensor
) -> tuple[Tensor, ...]:
    """The gradient of one trajectory's log-probability; its tokens' ratios go into their row."""
    mask = minibatch.mask[row]
    if log_probs.shape != mask.shape:
        raise ValueError(f"log_probs_of: gave {list(log_probs.shape)} for {row}, wanted [tokens] {list(mask.shape)}")
    try:
        log_ratios[row] = token_log_ratios(log_probs, minibatch.sampler_log_probs[row], mask)
    except ValueError as error:
        raise ValueError(f"trajectory {row}: {error}") from error
    return torch.autograd.grad(log_probs[mask].sum(), parameters, materialize_grads=True)


def _norm(gradients: Sequence[Tensor], row: int) -> float:
    norms = [
        torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).double()
        for gradient in gradients
    ]
    norm = float(torch.stack([part.cpu() for part in norms]).norm())
    if not norm < float("inf"):
        raise FloatingPointError(f"trajectory {row}: the norm of its gradient is {norm}, wanted a finite number")
    return norm
