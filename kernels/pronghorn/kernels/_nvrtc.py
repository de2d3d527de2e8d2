"""CUDA C++ compiled at first use with NVRTC, which PyTorch's CUDA builds bring along: no compiler is installed."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def available() -> bool:
    """Whether NVIDIA's Python bindings are installed; PyTorch's CUDA builds on Linux require them."""
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        return False


def compile_cubin(source: Path, architecture: str, macros: Mapping[str, int], header: tuple[str, str]) -> bytes:
    """The machine code of a source file; needs no GPU.

    Args:
        source: CUDA C++ that includes no header of the toolkit.
        architecture: as `sm_90a`.
        macros: names and values to define.
        header: name and text of a generated header that the source may include.

    Raises:
        RuntimeError: it does not compile; with the compiler's log.
    """
    from cuda.bindings import nvrtc

    name, text = header
    program = _checked(
        nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 1, [text.encode()], [name.encode()])
    )
    options = [f"-arch={architecture}", "-std=c++17", "-default-device", *(f"-D{k}={v}" for k, v in macros.items())]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{source.name} with {macros} does not compile: {log.decode().strip()}")
    cubin: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin


class Kernel:
    """A kernel, loaded on one device: an extern "C" function of a cubin."""

    def __init__(self, cubin: bytes, function: str, device: int) -> None:
        from cuda.bindings import driver

        self._device = device
        torch.cuda.current_stream(device)  # the device's context exists
        with torch.cuda.device(device):
            self._module = _checked(driver.cuModuleLoadData(cubin))
            self._function = _checked(driver.cuModuleGetFunction(self._module, function.encode()))
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            limit = _checked(
                driver.cuDeviceGetAttribute(
                    driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device
                )
            )
            _checked(driver.cuFuncSetAttribute(self._function, attribute, limit))

    def launch(
        self, grid: tuple[int, int, int], threads: int, shared_bytes: int, arguments: Sequence[Tensor | int]
    ) -> None:
        """Queue it on its device's current stream; integers are passed as int32, tensors as pointers."""
        from cuda.bindings import driver

        values = tuple(value.data_ptr() if isinstance(value, Tensor) else value for value in arguments)
        types = tuple(ctypes.c_void_p if isinstance(value, Tensor) else ctypes.c_int for value in arguments)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        with torch.cuda.device(self._device):
            _checked(
                driver.cuLaunchKernel(self._function, *grid, threads, 1, 1, shared_bytes, stream, (values, types), 0)
            )


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if values else None
