"""Which implementation of an operation runs: the device picks, `PRONGHORN_KERNELS` overrides."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

VARIABLE = "PRONGHORN_KERNELS"
BACKENDS = ("reference", "triton")
OLDEST_CAPABILITY = (8, 0)


def use_triton(operation: str, tensor: Tensor) -> bool:
    """Whether `operation` runs its Triton kernel on tensors like `tensor`; read anew at every call.

    An NVIDIA GPU of compute capability 8.0 or newer gets Triton, anything else the reference.
    `PRONGHORN_KERNELS=reference|triton` overrides; where Triton was asked for, or could be expected, and cannot run,
    the reference runs and a warning says why, once. AMD GPUs get Triton only if it is asked for: nobody tested them.

    Raises:
        ValueError: the variable holds anything else.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", *BACKENDS):
        raise ValueError(f"{VARIABLE}: got {choice!r}, accepted are {' and '.join(BACKENDS)}")
    if choice == "reference":
        return False
    if tensor.device.type != "cuda" and choice != "triton":
        return False
    reason = _obstacle(tensor.device, asked=choice == "triton")
    if reason:
        _warn_once(operation, reason)
    return not reason


@functools.cache
def triton_kernels(operation: str) -> Any:
    """The module of an operation's Triton kernels, where `use_triton` said that they run: importing takes longer."""
    return importlib.import_module(f"pronghorn.kernels.{operation}.triton")


def use_cuda(operation: str, reason: str, instead: str = "its Triton kernel") -> bool:
    """Whether an operation that may run Triton runs its CUDA kernel instead: nothing speaks against it.

    Args:
        operation: its name.
        reason: why the CUDA kernel cannot run, or nothing. It is logged, once, where Triton was not asked for.
        instead: what runs then.
    """
    if os.environ.get(VARIABLE) == "triton" or torch.version.hip is not None:
        return False
    if reason:
        _warn_once(operation, reason, instead)
    return not reason


def unforced() -> bool:
    """Whether the device picks what runs."""
    return not os.environ.get(VARIABLE)


def interpreting() -> bool:
    """Whether Triton's interpreter is on (`TRITON_INTERPRET=1`), which runs kernels on a CPU for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _obstacle(device: torch.device, asked: bool) -> str:
    if not _installed("triton"):
        return "triton is not installed"
    if device.type == "cpu":
        return "" if interpreting() else "the tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    if device.type != "cuda":
        return f"no Triton backend for {device.type} is known to work"
    if torch.version.hip is not None:
        return "" if asked else f"AMD GPUs are not tested; {VARIABLE}=triton tries"
    return _too_old(device)


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _too_old(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"compute capability {found} is below {'.'.join(map(str, OLDEST_CAPABILITY))}"
    return ""


@functools.cache
def _warn_once(operation: str, reason: str, instead: str = "its reference implementation") -> None:
    logger.warning("%s runs %s: %s", operation, instead, reason)
