"""What UViT and USiT are sampled with: a fast solver of few evaluations, and one that follows a velocity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor
from torchdiffeq import odeint

BETA_SCHEDULES = ("scaled_linear", "linear")
ADAPTIVE, FIXED = ("dopri5",), ("heun2", "euler")
HIGHEST_ORDER = 3


class DPMSolverFastScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """DPM-Solver++ that spends a number of evaluations on steps of third order, and what remains on one or two lower.

    As UViT is sampled: evaluations are evenly spaced in time, and all are known in advance; a step of order k is
    k evaluations, each of which moves the sample to the time of the next. The last ends at the first training step,
    with the little noise that latents have there. (diffusers' `DPMSolverSinglestepScheduler` also gives inner
    evaluations to samples of their own, and raises and lowers the order otherwise.)

    Args:
        num_train_timesteps: of the training.
        beta_start: of its first step.
        beta_end: of its last.
        beta_schedule: "scaled_linear", evenly spaced roots of betas, or "linear".
        prediction_type: "epsilon": models that predict noise.

    Raises:
        ValueError: a value is not accepted.

    Source: Lu et al. (arXiv 2211.01095), algorithms 1 and 3; Lu et al. (arXiv 2206.00927), appendix B, for orders.
    """

    order = 1  # entries of `timesteps` for an evaluation

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
    ) -> None:
        if beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule: got {beta_schedule!r}, accepted are {', '.join(BETA_SCHEDULES)}")
        if prediction_type != "epsilon":
            raise ValueError(f"prediction_type: got {prediction_type!r}, accepted is epsilon")
        if not 0 < beta_start <= beta_end < 1 or num_train_timesteps < 2:
            got = f"{beta_start}, {beta_end} and {num_train_timesteps}"
            raise ValueError(f"betas and steps: got {got}, wanted 0 < beta_start <= beta_end < 1 and at least 2 steps")
        # diffusers' from_config leaves out what was not given, for another scheduler's own defaults: other betas.
        self.register_to_config(_use_default_values=[])
        root = 0.5 if beta_schedule == "scaled_linear" else 1.0
        betas = np.linspace(beta_start**root, beta_end**root, num_train_timesteps) ** (1 / root)
        self._log_alphas = 0.5 * np.log1p(-betas).cumsum()
        self.init_noise_sigma = 1.0
        self.timesteps = torch.empty(0)
        self._moves: list[_Move] = []
        self._next: int | None = None
        self._start = self._data = torch.empty(0)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set `timesteps`, float32: where the model is evaluated, from the last training step down, counted from 0.

        Args:
            num_inference_steps: evaluations.
            device: of `timesteps`.

        Raises:
            ValueError: there are none.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: got {num_inference_steps}, wanted a positive number")
        steps = len(self._log_alphas)
        times = np.linspace(steps - 1, 0, num_inference_steps + 1)
        self._moves = _moves(np.interp(times, np.arange(steps), self._log_alphas))
        self.timesteps = torch.tensor(times[:-1], dtype=torch.float32, device=device)
        self._next = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample as it is."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at the time of the next evaluation.

        Args:
            model_output: the predicted noise.
            timestep: of this evaluation, one of `timesteps`. After the first, they are taken in their order.
            sample: what the model saw, of the same shape.
            return_dict: give a `SchedulerOutput` rather than a tuple.

        Returns:
            `prev_sample`, in the dtype of the sample; it is computed in float32 or better.

        Raises:
            ValueError: `set_timesteps` was not called, all evaluations are done, or the first is inside a step.
        """
        if self._next is None:
            self._next = self._place(timestep)
        if self._next >= len(self._moves):
            raise ValueError(f"timestep: got {float(timestep)}, but all evaluations are done; call set_timesteps")
        move = self._moves[self._next]
        wide = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(wide)
        data = (x - move.sigma * model_output.to(wide)) / move.alpha
        if move.stage == 0:
            self._start, self._data = x, data
        moved = move.start * self._start + move.data * self._data + move.change * (data - self._data)
        self._next += 1
        moved = moved.to(sample.dtype)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _place(self, timestep: Tensor | float) -> int:
        found = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"timestep: got {float(timestep)}, wanted one that set_timesteps gave")
        if self._moves[found[0]].stage:
            raise ValueError(f"timestep: got {float(timestep)}, which is inside a step of higher order")
        return int(found[0])

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])


@dataclass(frozen=True)
class _Move:
    """To the next evaluation's time: start · x₀ + data · m₀ + change · (m - m₀).

    x₀ is the sample and m₀ the data prediction where the step started; m = (x - sigma · noise) / alpha is that of now.
    """

    stage: int
    alpha: float
    sigma: float
    start: float
    data: float
    change: float


def _moves(log_alphas: np.ndarray) -> list[_Move]:
    """All moves between times of these log alphas, in steps of third order and what remains."""
    alphas, sigmas = np.exp(log_alphas), np.sqrt(-np.expm1(2 * log_alphas))
    signal = log_alphas - np.log(sigmas)  # the paper's lambda: half of the log of the signal-to-noise ratio
    moves: list[_Move] = []
    for order in _orders(len(log_alphas) - 1):
        first = len(moves)
        for stage in range(order):
            here, there = first + stage, first + stage + 1
            h = signal[there] - signal[first]
            phi = np.expm1(-h)
            change = 0.0
            if stage:
                share = (signal[here] - signal[first]) / h
                change = (-phi / 2 if order == 2 else phi / h + 1) / share
            moves.append(
                _Move(
                    stage, float(alphas[here]), float(sigmas[here]), float(sigmas[there] / sigmas[first]),
                    float(-alphas[there] * phi), float(alphas[there] * change),
                )
            )  # fmt: skip
    return moves


def _orders(evaluations: int) -> list[int]:
    """3, 3, …, and at last 2 and 1, 1, or 2: never 3, where the signal changes fastest."""
    threes, rest = divmod(evaluations, HIGHEST_ORDER)
    return [3] * (threes - 1) + [2, 1] if rest == 0 else [3] * threes + [rest]


class FlowODEScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Follows a velocity from noise, at time 0, to data, at time 1: how USiT is sampled.

    It calls the model by itself, by `integrate`: an adaptive method tries steps and takes some back, so there is
    nothing that `step` could be asked for.

    Args:
        method: "dopri5", which chooses its own steps; or "heun2" or "euler", which make as many as they are told to,
            of two and of one evaluation.
        atol: absolute error that dopri5 allows in a step.
        rtol: relative error that it allows.

    Raises:
        ValueError: a value is not accepted.

    Source: Ma et al., SiT (arXiv 2401.08740), section 3; torchdiffeq has the methods.
    """

    order = 1

    @register_to_config
    def __init__(self, method: str = "dopri5", atol: float = 1e-6, rtol: float = 1e-3) -> None:
        if method not in ADAPTIVE + FIXED:
            raise ValueError(f"method: got {method!r}, accepted are {', '.join(ADAPTIVE + FIXED)}")
        for name, value in (("atol", atol), ("rtol", rtol)):
            if not value > 0:
                raise ValueError(f"{name}: got {value}, wanted a positive number")
        self.init_noise_sigma = 1.0

    def integrate(
        self, velocity: Callable[[Tensor, Tensor], Tensor], sample: Tensor, num_inference_steps: int = 250
    ) -> Tensor:
        """The sample at time 1.

        Args:
            velocity: of a sample like this one, at a time from 0 to 1 that is a float32 scalar.
            sample: noise [batch, channels, height, width], float32. dopri5 measures errors over the whole batch, so
                that what becomes of one sample depends, within the tolerance, on the others.
            num_inference_steps: of "heun2" and "euler".

        Raises:
            ValueError: there are no steps.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: got {num_inference_steps}, wanted a positive number")
        ends = torch.tensor([0.0, 1.0], device=sample.device)
        options = {}
        if self.config["method"] in FIXED:
            # Not `step_size`, whose division can round to one step too many.
            grid = torch.linspace(0, 1, num_inference_steps + 1, device=sample.device)
            options["grid_constructor"] = lambda *_: grid
        found: Tensor = odeint(
            lambda time, x: velocity(x, time), sample, ends, method=self.config["method"],
            atol=self.config["atol"], rtol=self.config["rtol"], options=options,
        )[-1]  # fmt: skip
        return found
