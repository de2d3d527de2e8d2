"""Every knob of VCPO, its default and where it comes from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pronghorn.configuration import from_values

OFF, GROUP, MINIBATCH = "off", "group", "minibatch"
PAPER, EXACT, REFERENCE = "paper", "exact", "reference"
MEAN, MEDIAN, WINSORIZED = "mean", "median", "winsorized_mean"
SQRT, LINEAR = "sqrt", "linear"
LOG, AUTO = "log", "auto"
SEQUENCE_MEAN, SEQUENCE_SUM = "seq-mean-token-mean", "seq-mean-token-sum"
SEQUENCE_TRUNCATE, SEQUENCE_MASK = "sequence_truncate", "sequence_mask"
TOKEN_TRUNCATE, TOKEN_MASK = "token_truncate", "token_mask"
GHOST = "ghost"

CHOICES = {
    "is_mode": (SEQUENCE_TRUNCATE, SEQUENCE_MASK, TOKEN_TRUNCATE, TOKEN_MASK),
    "opob": (GROUP, MINIBATCH, OFF),
    "opob_weight": (PAPER, EXACT, REFERENCE),
    "opob_aggregation": (MEAN, MEDIAN, WINSORIZED),
    "opob_grad_norm": (EXACT, GHOST),
    "ess_scaling": (SQRT, LINEAR, OFF),
    "ess_space": (LOG, REFERENCE),
    "loss_aggregation": (SEQUENCE_MEAN, SEQUENCE_SUM),
}
SWITCHES = (
    "is_whitening", "opob_norm_by_std", "use_is_weights", "use_clipped_is_ratios", "normalize_by_length",
    "ess_use_clipped",
)  # fmt: skip


@dataclass
class VCPOSettings:
    """How one step weighs its trajectories, and how far it goes.

    Attributes:
        is_mode: what the loss weighs with: "sequence_truncate" (the paper: ratios of sequences, truncated),
            "sequence_mask" (those above the truncation are left out), or "token_truncate" and "token_mask" (ratios of
            tokens), which have no baseline of this method.
        is_truncation: the largest ratio in the loss (paper: 8); None truncates none.
        is_whitening: divide the ratios in the loss by their mean over the minibatch.
        log_ratio_clamp: log-ratios are kept within plus and minus this in the loss.
        opob: what the off-policy optimal baseline is taken over: "group" (the rollouts of a prompt; of rewards),
            "minibatch" (of advantages), or "off" (advantages as they are).
        opob_weight: a trajectory's weight in it: "paper" is ratio² · ‖score‖²; "exact" minimises the second moment of
            the gradient as it is truncated and divided by length; "reference" is the authors' code, where the ratio
            enters to the fourth power.
        opob_aggregation: "mean", "median" (the lower one) or "winsorized_mean" (5 % on both sides), all weighted.
        opob_grad_norm: how each trajectory's gradient is measured: "exact" takes a backward for each, "ghost" one for
            many, of linear layers, embeddings and norm layers.
        opob_norm_by_std: divide by the standard deviation (of the population) of a group's rewards; with
            opob="group" alone.
        use_is_weights: whether the paper's and the reference weight have the factor ratio².
        use_clipped_is_ratios: whether that factor is truncated too.
        normalize_by_length: whether they are divided by the square of the trajectory's length.
        ess_scaling: of the learning rate by the effective sample size: "sqrt" (for Adam), "linear" or "off".
        ess_reference: the share of effective samples at which the rate is whole (paper: 1; 0.55 with several turns);
            "auto" measures it on minibatches without lag.
        ess_reference_decay: of the mean that "auto" keeps.
        ess_use_clipped: whether truncated ratios scale the learning rate.
        ess_space: "log" never overflows; "reference" computes as the authors' code does.
        loss_aggregation: "seq-mean-token-mean" divides a trajectory by its length, "seq-mean-token-sum" does not.
        max_grad_norm: the step's gradient is shortened to this (paper: 1); 0 or None leaves it.

    Raises:
        ValueError, TypeError: a value is not one of those, or has no meaning beside another.

    Source: Stable Asynchrony: Variance-Controlled Off-Policy RL for LLMs (arXiv 2602.17616).
    """

    is_mode: str = SEQUENCE_TRUNCATE
    is_truncation: float | None = 8.0
    is_whitening: bool = False
    log_ratio_clamp: float = 20.0
    opob: str = GROUP
    opob_weight: str = PAPER
    opob_aggregation: str = MEAN
    opob_grad_norm: str = EXACT
    opob_norm_by_std: bool = True
    use_is_weights: bool = True
    use_clipped_is_ratios: bool = False
    normalize_by_length: bool = False
    ess_scaling: str = SQRT
    ess_reference: float | str = 1.0
    ess_reference_decay: float = 0.9
    ess_use_clipped: bool = False
    ess_space: str = LOG
    loss_aggregation: str = SEQUENCE_MEAN
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name, accepted in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in accepted:
                raise ValueError(f"{name}: got {value!r}, accepted are {', '.join(accepted)}")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted True or False")
        if self.is_truncation is not None and not _positive(self.is_truncation):
            raise ValueError(f"is_truncation: got {self.is_truncation!r}, wanted a positive number or None")
        limit = self.max_grad_norm
        if limit is not None and not (_positive(limit) or (type(limit) in (int, float) and limit == 0)):
            raise ValueError(f"max_grad_norm: got {limit!r}, wanted a number of at least 0 or None")
        if not _positive(self.log_ratio_clamp):
            raise ValueError(f"log_ratio_clamp: got {self.log_ratio_clamp!r}, wanted a positive number")
        if self.ess_reference != AUTO and not (_positive(self.ess_reference) and float(self.ess_reference) <= 1):
            raise ValueError(f"ess_reference: got {self.ess_reference!r}, wanted 'auto' or a number above 0, up to 1")
        decay = self.ess_reference_decay
        if not isinstance(decay, int | float) or isinstance(decay, bool) or not 0 <= decay < 1:
            raise ValueError(f"ess_reference_decay: got {decay!r}, wanted a number from 0 to below 1")
        if self.is_mode in (TOKEN_TRUNCATE, TOKEN_MASK) and self.opob != OFF:
            raise ValueError(
                f"is_mode: got {self.is_mode!r} with opob={self.opob!r}; with ratios of tokens wanted 'off'"
            )
        if self.opob_weight == EXACT:
            for name, default in (
                ("use_is_weights", True),
                ("use_clipped_is_ratios", False),
                ("normalize_by_length", False),
            ):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: got {not default}, which has no meaning with opob_weight='exact'")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VCPOSettings:
        """From what `to_dict` gave.

        Raises:
            ValueError, TypeError: there are other names, or values that are none.
        """
        return from_values(cls, values)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
