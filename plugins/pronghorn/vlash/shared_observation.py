"""Who sees whom when N branches follow one prefix, and where everything stands.

Tokens lie as [prefix | branch 0 | ... | branch N-1]: images and text once, then the actions (for pi0 the state before
them) of every delay. This is the definition, with a mask written out; the model's attention applies the same rule
without one.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK_VALUE = torch.finfo(torch.float32).min
"""Added to a score that is not seen. Finite, so that a row that sees nothing gives an average and no NaN."""


def allowed(pad: Tensor, block_starts: Tensor) -> Tensor:
    """Which token sees which, where each sees its own block and those before it.

    Args:
        pad: bool [batch, L], True for a real token.
        block_starts: [batch, L], not 0 at the first token of each block.

    Returns:
        bool [batch, L, L]: whether the token of a row sees the token of a column. Padding neither sees nor is seen.

    Raises:
        ValueError: the shapes differ.
    """
    _check_pair("block_starts", block_starts, pad)
    blocks = block_starts.cumsum(1)
    return (blocks[:, None, :] <= blocks[:, :, None]) & pad[:, None, :] & pad[:, :, None]


def shared_allowed(
    prefix_pad: Tensor, prefix_starts: Tensor, suffix_pad: Tensor, suffix_starts: Tensor, offset_mask: Tensor
) -> Tensor:
    """Which token sees which, when every branch sees the prefix and itself.

    Args:
        prefix_pad: bool [batch, Lp], True for a real token.
        prefix_starts: [batch, Lp], not 0 at the first token of each block.
        suffix_pad: bool [batch, Ls], of one branch; all are alike.
        suffix_starts: [batch, Ls].
        offset_mask: bool [batch, N], False for a branch that is padding.

    Returns:
        bool [batch, Lp + N Ls, Lp + N Ls], as from `allowed`.

    Raises:
        ValueError: shapes do not fit each other.
    """
    _check_pair("prefix_starts", prefix_starts, prefix_pad)
    _check_pair("suffix_starts", suffix_starts, suffix_pad)
    branches, length = offset_mask.shape[1], suffix_pad.shape[1]
    real = (offset_mask[:, :, None] & suffix_pad[:, None, :]).flatten(1)
    starts = torch.cat([prefix_starts, suffix_starts.repeat(1, branches)], dim=1)
    branch = torch.arange(branches, device=real.device).repeat_interleave(length)
    branch = torch.cat([branch.new_full((prefix_pad.shape[1],), -1), branch])
    apart = (branch[None, :] != branch[:, None]) & (branch[None, :] >= 0) & (branch[:, None] >= 0)
    return allowed(torch.cat([prefix_pad, real], dim=1), starts) & ~apart


def position_ids(prefix_pad: Tensor, suffix_pad: Tensor) -> Tensor:
    """Where tokens stand: the number of real tokens before them.

    Args:
        prefix_pad: bool [batch, Lp], True for a real token.
        suffix_pad: bool [batch, Ls].

    Returns:
        int64 [batch, Lp + Ls]. Padding stands where the token before it stands.
    """
    return torch.cat([prefix_pad, suffix_pad], dim=1).cumsum(1) - 1


def shared_position_ids(prefix_pad: Tensor, suffix_pad: Tensor, branches: int) -> Tensor:
    """Where tokens stand when every branch follows right after the prefix.

    Args:
        prefix_pad: bool [batch, Lp], True for a real token.
        suffix_pad: bool [batch, Ls], of one branch.
        branches: N.

    Returns:
        int64 [batch, Lp + N Ls].
    """
    positions = position_ids(prefix_pad, suffix_pad)
    prefix, suffix = positions.split([prefix_pad.shape[1], suffix_pad.shape[1]], dim=1)
    return torch.cat([prefix, suffix.repeat(1, branches)], dim=1)


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What is added to scores: 0 where a mask is True, elsewhere the least number of the dtype."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def _check_pair(name: str, starts: Tensor, pad: Tensor) -> None:
    if starts.shape != pad.shape:
        raise ValueError(f"{name}: got shape {tuple(starts.shape)}, wanted that of the padding, {tuple(pad.shape)}")
