"""RMS norms of a model, whatever it calls them, as PyTorch's own: one kernel instead of eight."""

from __future__ import annotations

import torch
from torch import nn

EPSILONS = ("variance_epsilon", "eps", "epsilon")
# Large and small rows (where the epsilon counts), and one that is not centred.
PROBE_SCALES, PROBE_OFFSETS = (1.0, 30.0, 1e-3, 1.0), (0.0, 0.0, 0.0, 2.0)
ROUNDING = 4  # roundings of the dtype that two ways to compute a norm may differ by


@torch.no_grad()
def find_rms_norms(model: nn.Module) -> dict[str, nn.RMSNorm]:
    """Names of modules that compute x / sqrt(mean(x^2) + eps) * weight, each with a `torch.nn.RMSNorm` for its place.

    They are known by what they compute for a few random rows. The replacement shares the weight.

    Source: Zhang and Sennrich (arXiv 1910.07467).
    """
    found = {}
    for name, module in model.named_modules():
        weight = dict(module.named_parameters()).get("weight")
        eps = next((getattr(module, key) for key in EPSILONS if isinstance(getattr(module, key, None), float)), None)
        if weight is None or eps is None or weight.dim() != 1 or len(dict(module.named_parameters())) != 1:
            continue
        norm = nn.RMSNorm(len(weight), eps=eps, device="meta")
        norm.weight = weight
        if type(module) is not nn.RMSNorm and _agree(module, norm):
            found[name] = norm
    return found


def _agree(module: nn.Module, norm: nn.RMSNorm) -> bool:
    weight = norm.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(PROBE_SCALES), len(weight), generator=generator)
    x = x * torch.tensor(PROBE_SCALES)[:, None] + torch.tensor(PROBE_OFFSETS)[:, None]
    x = x.to(weight)
    try:
        theirs, ours = module(x), norm(x)
    except (TypeError, ValueError, RuntimeError):  # it takes something else than rows
        return False
    if not isinstance(theirs, torch.Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    tolerance = ROUNDING * torch.finfo(x.dtype).eps
    return bool(((theirs - ours).abs() <= tolerance * ours.abs() + tolerance * tolerance).all())
