"""Ratios of the learner's to the sampler's probability of whole sequences: truncated in the loss, never in the ESS."""

from __future__ import annotations

import logging
import math
from functools import cache

import torch
from torch import Tensor

from pronghorn.vcpo.config import SEQUENCE_MASK, TOKEN_MASK, TOKEN_TRUNCATE, VCPOSettings

_log = logging.getLogger(__name__)


def token_log_ratios(log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor) -> Tensor:
    """log(learner / sampler) of each token; 0 where masked, and where the sampler gave NaN, as vLLM can.

    Args:
        log_probs: the learner's at the moment of the update, [..., tokens].
        sampler_log_probs: recorded at generation, at the same temperature, [..., tokens].
        mask: which tokens were sampled, bool [..., tokens]. What stands elsewhere is never looked at.

    Returns:
        float64 [..., tokens], without a gradient.

    Raises:
        ValueError: shapes differ, or an unmasked log-probability is infinite, or NaN in the learner.
        TypeError: the mask is not bool.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, wanted torch.bool")
    for name, tensor in (("log_probs", log_probs), ("sampler_log_probs", sampler_log_probs)):
        if tensor.shape != mask.shape:
            raise ValueError(f"{name}: got {list(tensor.shape)}, wanted mask's {list(mask.shape)}")
    check_sampler(sampler_log_probs, mask)
    _check_finite("log_probs", log_probs.detach(), mask, nan=True)
    return unchecked_log_ratios(log_probs, sampler_log_probs, mask)


def unchecked_log_ratios(log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor) -> Tensor:
    """The same, without waiting for the device to look at values: what is not finite stays so."""
    difference = log_probs.detach().double() - sampler_log_probs.detach().double()
    return difference.masked_fill(~mask | sampler_log_probs.isnan(), 0)


def check_sampler(sampler_log_probs: Tensor, mask: Tensor) -> None:
    """Warn once of NaN, which counts as a ratio of 1.

    Raises:
        ValueError: a log-probability is infinite.
    """
    _check_finite("sampler_log_probs", sampler_log_probs, mask, nan=False)
    if (sampler_log_probs.isnan() & mask).any():
        _warn_of_missing()


def _check_finite(name: str, values: Tensor, mask: Tensor, *, nan: bool) -> None:
    wrong = (values.isinf() | values.isnan() if nan else values.isinf()) & mask
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}: got {float(values[tuple(place)])} at {place}, wanted a finite number")


@cache
def _warn_of_missing() -> None:
    _log.warning("sampler_log_probs hold NaN: the ratios of those tokens count as 1")


def sequence_log_ratios(token_log_ratios: Tensor) -> Tensor:
    """The log-ratio of each sequence, [trajectories]: the sum over its tokens; 0 for an empty one."""
    return token_log_ratios.sum(-1)


def truncated_log_ratios(log_ratios: Tensor, config: VCPOSettings) -> Tensor:
    """Log-ratios as they enter the loss: clamped on both sides, then truncated above, or masked: minus infinity."""
    clamped = log_ratios.clamp(-config.log_ratio_clamp, config.log_ratio_clamp)
    if config.is_mode in (SEQUENCE_MASK, TOKEN_MASK) and config.is_truncation is not None:
        return clamped.masked_fill(clamped > math.log(config.is_truncation), -math.inf)
    return clipped_log_ratios(clamped, config)


def token_weights(token_log_ratios: Tensor, config: VCPOSettings) -> Tensor:
    """What the loss weighs each log-probability of a sequence with, [..., tokens], before the sequence's ratio."""
    if config.is_mode in (TOKEN_MASK, TOKEN_TRUNCATE):
        return truncated_log_ratios(token_log_ratios, config).exp()
    return torch.ones_like(token_log_ratios)


def sequence_weights(token_log_ratios: Tensor, config: VCPOSettings) -> Tensor:
    """What the loss weighs each sequence with, [...]; 1 where it weighs tokens."""
    if config.is_mode in (TOKEN_MASK, TOKEN_TRUNCATE):
        return torch.ones_like(token_log_ratios[..., 0])
    return truncated_log_ratios(sequence_log_ratios(token_log_ratios), config).exp()


def clipped_log_ratios(log_ratios: Tensor, config: VCPOSettings) -> Tensor:
    """Log-ratios truncated above alone, as diagnoses have them."""
    return log_ratios if config.is_truncation is None else log_ratios.clamp(max=math.log(config.is_truncation))
