"""The configuration of VCPO's trainers: TRL's and the method's settings side by side."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from pronghorn.vcpo.config import AUTO, OFF, VCPOSettings

VCPO, TRL = "vcpo", "trl"
# Settings of GRPOConfig that only TRL's own loss reads.
OF_TRLS_LOSS = (
    "beta", "loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "off_policy_mask_threshold",
    "top_entropy_quantile", "use_adaptive_entropy", "entropy_coef", "use_bias_correction_kl",
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
)  # fmt: skip


@dataclass
class VCPOConfig(VCPOSettings, GRPOConfig):
    """Everything of `GRPOConfig` and `VCPOSettings`, and what follows.

    With `opob_grad_norm="ghost"`, `per_device_train_batch_size` is the number of trajectories in one forward; with
    "exact" each has a forward of its own.

    Attributes:
        estimator: of the policy gradient: "vcpo", or "trl" for TRL's loss (`loss_type`, `importance_sampling_level`,
            clipping) with ratios to the sampler's log-probabilities, to compare with; that needs `opob="off"`.
        lag: sample with the weights of so many updates ago, to study asynchrony in one process.
        ess_reference: as a number or "auto", a string here so that the command line takes both.
        save_records: write `vcpo_stats.jsonl` and `vcpo_steps.jsonl` to `output_dir`, for `pronghorn vcpo report`.
        force_resume: go on from a checkpoint that was made with other settings of this method, other code, or other
            versions of torch, transformers, TRL or Pronghorn.

    Raises:
        ValueError: a value is not accepted, or is of no use beside others.
    """

    estimator: str = field(default=VCPO, metadata={"help": "Policy gradient: 'vcpo', or 'trl' for TRL's own loss."})
    lag: int = field(default=0, metadata={"help": "Sample with the weights of so many updates ago."})
    ess_reference: str = field(
        default="1.0", metadata={"help": "Share of effective samples at which the rate is whole, or 'auto'."}
    )
    save_records: bool = field(default=True, metadata={"help": "Write records for `pronghorn vcpo report`."})
    force_resume: bool = field(
        default=False, metadata={"help": "Go on from a checkpoint of other settings, code or versions."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "TRL's own correction; it must be off with estimator='vcpo'."}
    )

    to_dict = GRPOConfig.to_dict

    def __post_init__(self) -> None:
        GRPOConfig.__post_init__(self)
        check(self)
        if self.estimator not in (VCPO, TRL):
            raise ValueError(f"estimator: got {self.estimator!r}, accepted are {VCPO}, {TRL}")
        if not isinstance(self.lag, int) or isinstance(self.lag, bool) or self.lag < 0:
            raise ValueError(f"lag: got {self.lag!r}, wanted a whole number of at least 0")
        if self.estimator == TRL and self.opob != OFF:
            raise ValueError(f"opob: got {self.opob!r} with estimator='trl', which has no such baseline; wanted 'off'")
        if self.estimator == VCPO:
            refuse_unused(self, GRPOConfig, OF_TRLS_LOSS)
            if self.vllm_importance_sampling_correction:
                raise ValueError("vllm_importance_sampling_correction: got True; VCPO corrects itself, wanted False")


def check(config: Any) -> None:
    """Check a trainer's configuration as `VCPOSettings`, with numbers as numbers."""
    if config.ess_reference != AUTO:
        with contextlib.suppress(TypeError, ValueError):  # told by the check below
            config.ess_reference = float(config.ess_reference)
    VCPOSettings.__post_init__(config)


def refuse_unused(config: Any, kind: type, names: tuple[str, ...]) -> None:
    """Raise a ValueError for settings of TRL's loss that differ from their defaults: they would do nothing."""
    defaults = {entry.name: entry.default for entry in fields(kind)}
    for name in names:
        value = getattr(config, name)
        if value != defaults[name]:
            raise ValueError(f"{name}: got {value!r}, which has no use with VCPO's estimator; leave {defaults[name]!r}")
