"""What one process of a group tells each of the others: tensors, since `torch.distributed` unpickles its objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import pad


def scatter_tensors(shares: Sequence[Mapping[str, Tensor]] | None, device: torch.device | str) -> dict[str, Tensor]:
    """Give every process of the default group its share, from process 0, as safetensors.

    Args:
        shares: one for each process, tensors of any dtypes and shapes by name; None in processes other than 0.
        device: where the group communicates.

    Returns:
        This process's share, on the CPU.

    Raises:
        SafetensorError: what came is damaged.
    """
    parts = [torch.frombuffer(bytearray(save(dict(share))), dtype=torch.uint8) for share in shares or ()]
    sizes = torch.tensor([len(part) for part in parts] or [0] * dist.get_world_size(), device=device)
    dist.broadcast(sizes, src=0)
    longest = int(sizes.max())
    own = torch.empty(longest, dtype=torch.uint8, device=device)
    dist.scatter(own, [pad(part, (0, longest - len(part))).to(device) for part in parts] or None, src=0)
    return load(own[: int(sizes[dist.get_rank()])].cpu().numpy().tobytes())
