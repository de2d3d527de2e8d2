"""Launches Triton kernels where the host's time counts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from pronghorn.kernels._dispatch import interpreting

ALIGNMENT = 16  # bytes: what Triton compiles a kernel for, where every tensor begins at a multiple of it
LARGEST, SMALLEST = (1 << 31) - 1, -(1 << 31)

# Keeps how a kernel is launched for shapes and strides: of small images, working it out takes longer than the kernel.
planned = functools.lru_cache(maxsize=1024)


class Launcher:
    """Launches a kernel; what it compiled for a kind of arguments is kept, and launched without looking these through.

    Triton's own launch examines every argument, which takes longer than a small kernel runs.

    Args:
        kernel: a function of `triton.jit`, of tensors, then numbers that it does not specialise on, then constants.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], tensors: Sequence[Tensor], numbers: Sequence[int],
        constants: tuple[Any, ...], **options: int,
    ) -> None:  # fmt: skip
        """Launch on the current stream.

        Args:
            grid: blocks.
            tensors: all on the current device.
            numbers: whole.
            constants: hashable.
            options: num_warps, num_stages, enable_fp_fusion.
        """
        dtypes, places = [], 0
        for tensor in tensors:
            dtypes.append(tensor.dtype)
            places |= tensor.data_ptr()
        aligned = not places % ALIGNMENT
        wide = tuple([not SMALLEST <= n <= LARGEST for n in numbers]) if _any_wide(numbers) else ()
        device = tensors[0].get_device()
        key = constants, tuple(options.values()), wide, device, *dtypes
        kept = self._compiled.get(key)
        if kept is not None and aligned and not _watched():
            # As Triton's own launch ends, in 3.6 and 3.9 alike; what comes before it takes as long as all of this.
            run, function, metadata = kept
            stream = torch._C._cuda_getCurrentRawStream(device)
            run(*grid, stream, function, metadata, None, None, None, *tensors, *numbers, *constants)
            return
        compiled = self.kernel[grid](*tensors, *numbers, *constants, **options)
        if aligned and not interpreting():
            self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata


def _watched() -> bool:
    """Whether a profiler wants to be told of launches, as Triton's own launch does."""
    runtime: Any = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _any_wide(numbers: Sequence[int]) -> bool:
    return bool(numbers) and (max(numbers) > LARGEST or min(numbers) < SMALLEST)
