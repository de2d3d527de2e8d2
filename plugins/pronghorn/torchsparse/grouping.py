"""Gather, multiply, scatter: offsets of nearly the same size are multiplied together (adaptive grouping)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which offsets are multiplied together.

    Attributes:
        members: offsets of each group.
        batched: whether each group is one batched matmul, for which its members are filled up to its largest.
        sizes: rows of each group's largest member.
        starts: row of the buffer where each offset begins.
        rows: of the buffer.
    """

    members: list[list[int]]
    batched: list[bool]
    sizes: list[int]
    starts: list[int]
    rows: int


def group_offsets(
    sizes: list[int], *, epsilon: float, mm_thresh: int, pairwise: bool = True, without_centre: bool = False
) -> Groups:
    """Walk over the offsets; one that would waste more than a share of `epsilon` begins a new group.

    Args:
        sizes: pairs of each offset.
        epsilon: share of a group's rows that may be filled up.
        mm_thresh: groups whose largest member has fewer rows are batched.
        pairwise: walk from both ends to the middle, where opposite offsets have the same size.
        without_centre: leave out the offset in the middle, which is multiplied without gathering.

    Source: Tang et al. (MLSys 2022), section 4.2, algorithm 1.
    """
    groups: list[list[int]] = []
    least = largest = 0
    for k in _walk(len(sizes), pairwise, without_centre):
        fits = bool(groups) and 1 - min(least, sizes[k]) / max(largest, sizes[k], 1) <= epsilon
        if fits:
            groups[-1].append(k)
            least, largest = min(least, sizes[k]), max(largest, sizes[k])
        else:
            groups.append([k])
            least = largest = sizes[k]
    tops = [max(sizes[k] for k in group) for group in groups]
    batched = [top < mm_thresh for top in tops]
    starts, rows = [0] * len(sizes), 0
    for group, top, together in zip(groups, tops, batched, strict=True):
        for k in group:
            starts[k] = rows
            rows += top if together else sizes[k]
    return Groups(groups, batched, tops, starts, rows)


def _walk(volume: int, pairwise: bool, without_centre: bool) -> list[int]:
    centre = volume // 2
    if not pairwise:
        return [k for k in range(volume) if not (without_centre and k == centre)]
    inwards = [k for low in range(centre) for k in (low, volume - 1 - low)]
    return inwards if without_centre or volume % 2 == 0 else [*inwards, centre]


def gather_scatter(
    x: Tensor, weight: Tensor, pairs: Tensor, sizes: list[int], outputs: int, groups: Groups, centre: int | None = None
) -> Tensor:
    """y[o] += x[i] weight[k] for all pairs (i, o) of offset k; sums are in float32 or better.

    Args:
        x: [inputs, input channels].
        weight: [kernel volume, input channels, output channels].
        pairs: int32 [2, pairs]: input and output rows, by offset.
        sizes: pairs of each offset.
        outputs: number of output rows.
        groups: of the offsets.
        centre: the offset that is in no group, since it takes every row to itself.

    Returns:
        [outputs, output channels] in the dtype of `x`.
    """
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    products, targets = [], []
    for group, together, top in zip(groups.members, groups.batched, groups.sizes, strict=True):
        rows = [pairs[:, starts[k] : starts[k + 1]] for k in group]
        if together and len(group) > 1 and top:
            gathered = torch.stack([_filled_up(x[part[0]], top) for part in rows])
            product = torch.bmm(gathered, weight[group])
            products += [part[: sizes[k]] for part, k in zip(product, group, strict=True)]
        else:
            products += [x[part[0]] @ weight[k] for part, k in zip(rows, group, strict=True)]
        targets += [part[1] for part in rows]
    wide = torch.promote_types(x.dtype, torch.float32)
    if centre is None:
        out = torch.zeros(outputs, weight.shape[2], dtype=wide, device=x.device)
    else:
        out = (x @ weight[centre]).to(wide)
    if products:
        out = out.index_add(0, torch.cat(targets), torch.cat(products).to(wide))
    return out.to(x.dtype)


def _filled_up(rows: Tensor, to: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, to - len(rows)))
