"""Batch norms that several GPUs shared, as one alone has them: what PyTorch converts, it does not convert back."""

from __future__ import annotations

from torch import nn


def restore_batch_norms(module: nn.Module) -> None:
    """Put a plain batch norm, with the same parameters and statistics, in place of each synchronized one within."""
    for name, child in module.named_children():
        if isinstance(child, nn.SyncBatchNorm):
            setattr(module, name, _plain(child))
        else:
            restore_batch_norms(child)


def _plain(norm: nn.SyncBatchNorm) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made._parameters, made._buffers = norm._parameters, norm._buffers
    return made.train(norm.training)
