"""Optimizes a gate for each key/value head: 1 where the head needs all of the context, 0 where it does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from pronghorn.duoattention.sequence_parallel import SequenceParallel

LOWEST_FACTOR = 0.1  # of the learning rate, at the start and at the end


def distillation_loss(teacher: Tensor, student: Tensor, labels: Tensor, count: int | Tensor | None = None) -> Tensor:
    """Squared error of the last hidden states, where a label stands; labels are not shifted.

    Args:
        teacher: final hidden states [batch, tokens, hidden size].
        student: the same.
        labels: [batch, tokens], -100 where nothing is compared.
        count: positions to divide by; those of `labels` by default.

    Source: DuoAttention (arXiv 2410.10819), section 2.2, equation 2.
    """
    chosen = labels != -100
    errors = (teacher[chosen].float() - student[chosen].float()).square().mean(dim=-1)
    return errors.sum() / (chosen.sum() if count is None else count)


def regularization(gates: Sequence[Tensor]) -> Tensor:
    """Mean magnitude of all gates."""
    return torch.cat([gate.float().abs() for gate in gates]).mean()


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Up over the first fifth, down over the last, never below 0.1; steps count from 0."""
    ramp = max(num_steps // 5, 1)
    return min(1.0, max((step + 1) / ramp, LOWEST_FACTOR), max((num_steps - step) / ramp, LOWEST_FACTOR))


@dataclass(frozen=True)
class Step:
    """What one step of the optimization found.

    Attributes:
        step: its number, from 0.
        learning_rate: of the step.
        distillation: loss against the teacher.
        regularization: mean gate.
    """

    step: int
    learning_rate: float
    distillation: float
    regularization: float


class GateOptimizer:
    """The gates of a model and the state of their optimization.

    Args:
        shape: layers and key/value heads.
        num_steps: of the whole run, which sets the learning rate's course.
        lr: highest learning rate (paper: 0.02).
        reg_weight: weight of the mean gate in the loss (paper: 0.05).
        initial_value: of every gate.
        dtype: of the gates: fp32, or bf16 as in the authors' code.
        device: where they live.
        parallel: the ranks that share a sequence.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        num_steps: int,
        lr: float = 0.02,
        reg_weight: float = 0.05,
        initial_value: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        parallel: SequenceParallel | None = None,
    ) -> None:
        layers, heads = shape
        self.gates = [
            nn.Parameter(torch.full((heads,), initial_value, dtype=dtype, device=device)) for _ in range(layers)
        ]
        self.reg_weight, self.parallel = reg_weight, parallel or SequenceParallel()
        self.num_steps, self.lr, self.step = num_steps, lr, 0
        self._optimizer = AdamW(self.gates, lr=lr, weight_decay=0.0)

    def train_step(self, streams: Callable[[Tensor], tuple[Tensor, Tensor]], input_ids: Tensor, labels: Tensor) -> Step:
        """Clamp the gates, compare the two streams, and take a step.

        Args:
            streams: this rank's token ids [batch, tokens] to the teacher's and the student's final hidden states.
            input_ids: [batch, tokens] of the whole sequence.
            labels: [batch, tokens], -100 where nothing is compared.

        Raises:
            ValueError: no label, ranks with other samples, or a loss that is not finite; the gates stay as they are.
        """
        count = int((labels != -100).sum())
        if not count:
            raise ValueError("labels: all are -100, there is nothing to compare")
        with torch.no_grad():
            for gate in self.gates:
                gate.clamp_(0, 1)
        self.parallel.check_equal(input_ids)
        input_ids, labels = self.parallel.own_part(input_ids, 0), self.parallel.own_part(labels, -100)
        teacher, student = streams(input_ids)
        distillation = distillation_loss(teacher, student, labels, count)
        mean_gate = regularization(self.gates)
        loss = distillation + self.reg_weight * mean_gate / self.parallel.size  # each rank adds its share
        loss.backward()
        self.parallel.sum_gradients(self.gates)
        rate = self.lr * learning_rate_factor(self.step, self.num_steps)
        found = Step(self.step, rate, self.parallel.total(distillation.detach()), float(mean_gate.detach()))
        if not math.isfinite(found.distillation):
            self._optimizer.zero_grad()
            raise ValueError(f"model: the loss of step {self.step} is {found.distillation}; are its weights finite?")
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return found

    def table(self) -> list[list[float]]:
        """The gates, [layers][key/value heads]."""
        return [gate.detach().float().tolist() for gate in self.gates]

    def state_dict(self) -> dict[str, Tensor]:
        """All that a run goes on from: the step, and gates and their moments [layers, key/value heads]."""
        states = [self._optimizer.state[gate] for gate in self.gates]
        moments = {
            name: torch.stack([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq") if self.step
        }
        return {"step": torch.tensor(self.step), "gates": torch.stack([g.detach() for g in self.gates]), **moments}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.step = int(state["step"])
        with torch.no_grad():
            for gate, saved in zip(self.gates, state["gates"], strict=True):
                gate.copy_(saved)
        for index, gate in enumerate(self.gates if self.step else ()):
            moments = {name: state[name][index].clone() for name in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[gate] = {"step": torch.tensor(float(self.step)), **moments}
