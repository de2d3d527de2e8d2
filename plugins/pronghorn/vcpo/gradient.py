"""The gradient of one step: a backward for each trajectory and two buffers, or ghost norms of many trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pronghorn.kernels.seq_is_stats import SequenceStatistics, seq_is_stats
from pronghorn.kernels.weighted_grad_accum import weighted_grad_accum
from pronghorn.vcpo.baseline import baseline, baseline_weights
from pronghorn.vcpo.config import (
    GROUP,
    MINIBATCH,
    OFF,
    SEQUENCE_MEAN,
    TOKEN_MASK,
    TOKEN_TRUNCATE,
    VCPOSettings,
)
from pronghorn.vcpo.ghost_norms import GhostNorms
from pronghorn.vcpo.minibatch import Minibatch
from pronghorn.vcpo.ranks import Alone, Ranks
from pronghorn.vcpo.ratios import (
    check_sampler,
    sequence_log_ratios,
    sequence_weights,
    token_weights,
    unchecked_log_ratios,
)

LEAST_STD = 1e-8  # rewards that differ by less are equal


class GradientBuffers:
    """Σ value · gradient and Σ gradient, so that a baseline known only at the end can still be taken off each value.

    Both are in float32, or float64 for parameters of that; each is one tensor, of which a parameter has a part.

    Args:
        parameters: what gradients are of.
        with_baseline: whether the second buffer is needed.
    """

    def __init__(self, parameters: Sequence[Tensor], with_baseline: bool) -> None:
        dtype = torch.float32
        for parameter in parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        count = sum(parameter.numel() for parameter in parameters)

        def zeros() -> Tensor:
            return torch.zeros(count, dtype=dtype, device=parameters[0].device)

        self._parameters = parameters
        self._accum = zeros()
        self._score = zeros() if with_baseline else None
        self._accum_parts = self._parts(self._accum)
        self._score_parts = [] if self._score is None else self._parts(self._score)

    def _parts(self, buffer: Tensor) -> list[Tensor]:
        parts = buffer.split([parameter.numel() for parameter in self._parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]

    def add(self, gradients: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Add gradients to both buffers, weighted.

        Args:
            gradients: one for each parameter.
            weights: in the first buffer, and in the second, [2].

        Returns:
            ‖gradients‖, float64, 0-dimensional.
        """
        scores = self._score_parts or None
        return weighted_grad_accum(gradients, self._accum_parts, scores, weights).sqrt()

    def close(self, baseline: float) -> None:
        """Take the baseline off all values since the last call."""
        if self._score is not None:
            self._accum.add_(self._score, alpha=-baseline)
            self._score.zero_()

    def take(self, ghosts: GhostNorms, sums: Tensor, known: Tensor, later: Tensor) -> None:
        """Add the gradients of Σ known · sums to the first buffer, of Σ later · sums to the second."""
        first, second = torch.eye(2, device=sums.device)
        self.add(ghosts.weighted(known, self._parameters), first)
        if later.any():
            self.add(ghosts.weighted(later, self._parameters), second)

    def gradients(self, ranks: Ranks, scale: float) -> list[Tensor]:
        """The first buffer, added up over ranks and multiplied, as one gradient for each parameter."""
        ranks.add(self._accum)
        self._accum.mul_(scale)
        return self._accum_parts


class ShardedGradients:
    """Gradients of parameters that FSDP shards, which it adds up over ranks itself, in `grad`.

    Args:
        parameters: what gradients are of; their `grad` is emptied.
        count: of ranks, over which FSDP takes means.
    """

    def __init__(self, parameters: Sequence[Tensor], count: int) -> None:
        self._parameters, self._count = parameters, count
        for parameter in parameters:
            parameter.grad = None

    def take(self, ghosts: GhostNorms, sums: Tensor, known: Tensor, later: Tensor) -> None:
        """Add the gradients of Σ known · sums, by another backward.

        Raises:
            ValueError: some are to be added later, for which there is no buffer.
        """
        if later.any():
            raise ValueError("micro_batches: one ends within a group; with sharded parameters wanted whole ones")
        (self._count * (known.to(sums) * sums).sum()).backward()

    def close(self, baseline: float) -> None:
        """Nothing waits for a baseline."""

    def gradients(self, ranks: Ranks, scale: float) -> list[Tensor]:
        """What there is, multiplied."""
        return [torch.zeros_like(p) if p.grad is None else p.grad * scale for p in self._parameters]


@dataclass(frozen=True)
class Accumulated:
    """What a pass over a minibatch found.

    Attributes:
        parameters: what gradients are of.
        gradients: of the loss to be minimised, of all ranks' trajectories, not yet clipped; one for each parameter.
        score_norms: ‖∇ Σ log p‖ of each trajectory, without its ratio, float64 [trajectories].
        weights: of each trajectory in the loss, its truncated ratio, float64 [trajectories]; 1 where tokens have some.
        statistics: of the ratios, on the CPU.
        baselines: one for each group, one in all, or none.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    score_norms: Tensor
    weights: Tensor
    statistics: SequenceStatistics
    baselines: list[float]


def accumulate(
    log_probs_of: Callable[[int], Tensor],
    parameters: Sequence[Tensor],
    minibatch: Minibatch,
    config: VCPOSettings,
    ranks: Ranks | None = None,
) -> Accumulated:
    """The policy gradient of a minibatch with its off-policy optimal baseline.

    Args:
        log_probs_of: gives the learner's log-probabilities of one trajectory's tokens, [tokens], with their graph. It
            is called once for each, in order, save for empty ones.
        parameters: what learns; one that is listed twice counts once.
        minibatch: its trajectories.
        config: the weights.
        ranks: that each have some of the groups; None for a single process.

    Raises:
        ValueError: there is no parameter, or a log-probability is not finite.
        FloatingPointError: a trajectory's gradient is not finite.
    """
    parameters = list(dict.fromkeys(parameters))
    if not parameters:
        raise ValueError("parameters: got none, wanted at least one")
    buffers = GradientBuffers(parameters, with_baseline=config.opob != OFF)
    scopes, baselines = _Scopes(minibatch, config, ranks or Alone()), []
    for rows in scopes.rows:
        values, scale = scopes.values(rows)
        for row, value in zip(rows, values.tolist(), strict=True):
            if scopes.empty[row]:
                continue
            total = scopes.sums(log_probs_of(row)[None], range(row, row + 1)).sum()
            gradients = torch.autograd.grad(total, parameters, materialize_grads=True)
            factor = scopes.factors(range(row, row + 1)) / scale
            scopes.norms[row] = buffers.add(gradients, torch.cat([factor * value, factor]))
        scopes.check(rows)
        if config.opob != OFF:
            baselines.append(scopes.baseline(rows, values))
            buffers.close(baselines[-1])
    return scopes.found(parameters, buffers, baselines)


def accumulate_batched(
    log_probs_of: Callable[[range], tuple[Tensor, Tensor]],
    model: nn.Module,
    minibatch: Minibatch,
    config: VCPOSettings,
    micro_batches: Sequence[range],
    ranks: Ranks | None = None,
) -> Accumulated:
    """The same gradient as of `accumulate`, with one forward and one backward for many trajectories.

    The backward gives the gradients of what layers gave; norms and the weighted gradient follow from those. Where a
    micro-batch ends within a group, or within the minibatch with `opob="minibatch"`, a second buffer is needed.

    Args:
        log_probs_of: gives the learner's log-probabilities of some rows' tokens, [rows, tokens], with their graph, and
            which of these rows each position of the model's input belongs to, integers [batch, positions], -1 for
            padding, best on the CPU: from elsewhere they are waited for. It is called once for each micro-batch, in
            order.
        model: its parameters that need a gradient learn. They may be sharded by `fully_shard`: then every rank has
            equally many micro-batches, each of whole groups.
        minibatch: its trajectories.
        config: the weights.
        micro_batches: the rows of each forward.
        ranks: that each have some of the groups; None for a single process.

    Raises:
        ValueError: micro-batches do not have each row once and in order, or as of `accumulate` and `GhostNorms`.
        TypeError: a layer of the model is not one of those that `GhostNorms` knows.
        FloatingPointError: a trajectory's gradient is not finite.
    """
    parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model: nothing learns, wanted at least one parameter with requires_grad")
    if [row for rows in micro_batches for row in rows] != list(range(len(minibatch))):
        raise ValueError(f"micro_batches: got {list(micro_batches)}, wanted all of 0 to {len(minibatch) - 1}, in order")
    scopes, ghosts, baselines = _Scopes(minibatch, config, ranks or Alone()), GhostNorms(model), []
    buffers: GradientBuffers | ShardedGradients
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        buffers = ShardedGradients(parameters, scopes.ranks)
    else:
        buffers = GradientBuffers(parameters, with_baseline=scopes.are_cut(micro_batches))
    for rows in micro_batches:
        with ghosts:
            log_probs, trajectories = log_probs_of(rows)
            sums = scopes.sums(log_probs, rows)
            scopes.norms[rows.start : rows.stop] = ghosts.norms(
                sums.sum(), trajectories, len(rows), keep_graph=isinstance(buffers, ShardedGradients)
            )
            scopes.check(rows)
            known, later = torch.zeros(2, len(rows), dtype=torch.float64)
            for scope in scopes.rows:
                here = range(max(scope.start, rows.start), min(scope.stop, rows.stop))
                if not here:
                    continue
                inside = slice(here.start - rows.start, here.stop - rows.start)
                values, scale = scopes.values(scope)
                factors = scopes.factors(here).cpu() / scale
                if config.opob != OFF and scope.stop <= rows.stop:
                    baselines.append(scopes.baseline(scope, values))
                    buffers.close(baselines[-1])  # for its trajectories of earlier micro-batches
                    values = values - baselines[-1]
                elif config.opob != OFF:
                    later[inside] = factors
                known[inside] = values[here.start - scope.start : here.stop - scope.start] * factors
            buffers.take(ghosts, sums, known, later)
    return scopes.found(parameters, buffers, baselines)


class _Scopes:
    """What is known of a minibatch's trajectories as it is gone through, and what follows for each scope."""

    def __init__(self, minibatch: Minibatch, config: VCPOSettings, ranks: Ranks) -> None:
        check_sampler(minibatch.sampler_log_probs, minibatch.mask)
        everything, device = range(len(minibatch)), minibatch.mask.device
        self.rows = minibatch.group_rows() if config.opob == GROUP else [everything]
        self.empty = (~minibatch.mask.any(-1)).tolist()
        # Where the model is: nothing is waited for until a scope or a micro-batch is whole.
        self.norms = torch.zeros(len(minibatch), dtype=torch.float64, device=device)
        self.log_probs = torch.zeros(minibatch.mask.shape, device=device)
        self.ranks = ranks.count
        self._minibatch, self._config, self._ranks = minibatch, config, ranks
        self._lengths = minibatch.lengths
        self._rewards, self._advantages = minibatch.rewards.double().cpu(), minibatch.advantages.double().cpu()
        self._count = len(ranks.gather(self._lengths))

    def values(self, rows: range) -> tuple[Tensor, float]:
        """What the baseline is taken off, float64 [rows], and what the difference is divided by."""
        if self._config.opob != GROUP:
            return self._advantages[rows.start : rows.stop], 1.0
        rewards = self._rewards[rows.start : rows.stop]
        deviation = float(rewards.std(correction=0)) if self._config.opob_norm_by_std else 0.0
        return rewards, deviation if deviation > LEAST_STD else 1.0

    def are_cut(self, micro_batches: Sequence[range]) -> bool:
        """Whether a scope that has a baseline goes on from one micro-batch to the next."""
        ends = {scope.stop for scope in self.rows}
        return self._config.opob != OFF and any(rows.stop not in ends for rows in micro_batches)

    def sums(self, log_probs: Tensor, rows: range) -> Tensor:
        """What each trajectory's score is the gradient of, [rows]; ratios of their tokens are kept."""
        of_rows = slice(rows.start, rows.stop)
        mask = self._minibatch.mask[of_rows]
        if log_probs.shape != mask.shape:
            raise ValueError(
                f"log_probs_of: gave {list(log_probs.shape)} for {_names(rows)}, wanted {list(mask.shape)}"
            )
        self.log_probs = self.log_probs.to(torch.promote_types(self.log_probs.dtype, log_probs.dtype))
        self.log_probs[of_rows] = log_probs.detach()
        weights = token_weights(self._log_ratios(rows), self._config).to(log_probs)
        return (log_probs * weights).masked_fill(~mask, 0).sum(-1)

    def _log_ratios(self, rows: range) -> Tensor:
        """Of tokens, 0 where masked, float64 [rows, tokens]."""
        here = slice(rows.start, rows.stop)
        return unchecked_log_ratios(
            self.log_probs[here], self._minibatch.sampler_log_probs[here], self._minibatch.mask[here]
        )

    def check(self, rows: range) -> None:
        """Of trajectories that were gone through."""
        here = slice(rows.start, rows.stop)
        wrong = ~self.log_probs[here].isfinite() & self._minibatch.mask[here]
        if wrong.any():
            row, token = wrong.nonzero()[0].tolist()
            value = float(self.log_probs[rows.start + row, token])
            raise ValueError(
                f"trajectory {rows.start + row}: log_probs: got {value} at [{token}], wanted a finite number"
            )
        wrong = ~self.norms[here].isfinite()
        if wrong.any():
            row = rows.start + int(wrong.nonzero()[0])
            norm = float(self.norms[row])
            raise FloatingPointError(f"trajectory {row}: the norm of its gradient is {norm}, wanted a finite number")

    def baseline(self, rows: range, values: Tensor) -> float:
        """Of one scope that was gone through; of the minibatch on all ranks where it is that."""
        scope = slice(rows.start, rows.stop)
        ratios = sequence_log_ratios(self._log_ratios(rows))
        columns = [self.norms[scope].cpu(), ratios.cpu(), self._lengths[scope].cpu(), values]
        if self._config.opob == MINIBATCH:
            columns = [self._ranks.gather(column) for column in columns]
        norms, ratios, lengths, values = columns
        return baseline(values, baseline_weights(norms, ratios, lengths, self._config), self._config)

    def factors(self, rows: range) -> Tensor:
        """d loss / d log p of sequences whose value is 1, float64 [rows]."""
        scope = slice(rows.start, rows.stop)
        weights = sequence_weights(self._log_ratios(rows), self._config)
        if self._config.loss_aggregation == SEQUENCE_MEAN:
            weights = weights / self._lengths[scope].clamp(min=1)
        return -weights / self._count

    def found(
        self, parameters: list[Tensor], buffers: GradientBuffers | ShardedGradients, baselines: list[float]
    ) -> Accumulated:
        """All of it, when every trajectory was gone through."""
        gradients = buffers.gradients(self._ranks, 1 / self._mean_weight())
        truncation = self._config.is_truncation
        found = seq_is_stats(self.log_probs, self._minibatch.sampler_log_probs, self._minibatch.mask, truncation)
        statistics = SequenceStatistics(*(part.cpu() for part in found))
        weights = sequence_weights(self._log_ratios(range(len(self.norms))), self._config).cpu()
        return Accumulated(parameters, gradients, self.norms.cpu(), weights, statistics, baselines)

    def _mean_weight(self) -> float:
        if not self._config.is_whitening:
            return 1.0
        ratios = self._log_ratios(range(len(self.norms)))
        weights = token_weights(ratios, self._config) * sequence_weights(ratios, self._config)[:, None]
        # Of tokens where they are weighed, else of sequences; an empty one counts as a sequence of ratio 1.
        of_tokens = self._config.is_mode in (TOKEN_MASK, TOKEN_TRUNCATE)
        found = self._ranks.gather(weights[self._minibatch.mask] if of_tokens else weights[:, 0])
        return float(found.mean()) if float(found.sum()) > 0 else 1.0


def _names(rows: range) -> str:
    return f"trajectory {rows.start}" if len(rows) == 1 else f"trajectories {rows.start} to {rows.stop - 1}"
