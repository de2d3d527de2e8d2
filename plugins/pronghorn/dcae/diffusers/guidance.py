"""Classifier-free guidance of a class-conditional model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def guided(model: Any, sample: Tensor, timestep: Tensor | float, class_labels: Tensor, scale: float) -> Tensor:
    """What no class gives, and `scale` times how the class differs from it.

    Args:
        model: a `UViT2DModel` or `DiT2DModel`.
        sample: [batch, channels, height, width].
        timestep: as the model takes it: [batch] or one number.
        class_labels: int64 [batch].
        scale: 1 is the class alone, and runs the model once rather than for twice the batch.

    Returns:
        [batch, channels, height, width]; of a model that also predicts variances, these follow as the class has them.

    Source: Ho and Salimans (arXiv 2207.12598).
    """
    times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
    if scale == 1:
        alone: Tensor = model(sample, times, class_labels).sample
        return alone
    none = torch.full_like(class_labels, model.num_classes)
    both = model(sample.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([class_labels, none])).sample
    of_class, of_none = both.chunk(2)
    split = sample.shape[1]
    mixed = of_none[:, :split] + scale * (of_class[:, :split] - of_none[:, :split])
    return torch.cat([mixed, of_class[:, split:]], dim=1)
