"""CUDA C++ compiled at first use with NVRTC, which PyTorch's CUDA builds bring along: no compiler is installed."""

from __future__ import annotations

import ctypes
import functools
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


def compile_cubin(
    source: Path, architecture: str, macros: Mapping[str, int], generated: Mapping[str, str] | None = None
) -> bytes:
    """The machine code of a source file; needs no GPU.

    Args:
        source: CUDA C++ that includes no header of the toolkit, but may include the `.cuh` files beside this one.
        architecture: as `sm_90a`.
        macros: names and values to define.
        generated: names and texts of more headers that it may include.

    Raises:
        RuntimeError: it does not compile; with the compiler's log.
    """
    from cuda.bindings import nvrtc

    headers = {path.name: path.read_text() for path in Path(__file__).parent.glob("*.cuh")} | dict(generated or {})
    names, texts = [name.encode() for name in headers], [text.encode() for text in headers.values()]
    program = _checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(names), texts, names))
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
            attributes = driver.CUfunction_attribute
            limit = _checked(
                driver.cuDeviceGetAttribute(
                    driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device
                )
            )
            static = _checked(driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, self._function))
            dynamic = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, dynamic, limit - static))

    def most_clusters(self, size: int, threads: int, shared_bytes: int) -> int:
        """How many clusters of `size` blocks run at once on its device."""
        from cuda.bindings import driver

        config = _config((size, 1, 1), threads, shared_bytes)
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = size, 1, 1
        config.attrs, config.numAttrs = [attribute], 1
        count: int = _checked(driver.cuOccupancyMaxActiveClusters(self._function, config))
        return count

    def launch(
        self, grid: tuple[int, int, int], threads: int, shared_bytes: int, arguments: Sequence[Any], *,
        ahead: bool = False,
    ) -> None:  # fmt: skip
        """Queue it on its device's current stream.

        Args:
            grid: blocks.
            threads: of a block.
            shared_bytes: of a block, besides what the source declares.
            arguments: int32, float32, tensors as pointers, and tensor maps.
            ahead: it may begin when all blocks of the kernel before allow it (`griddepcontrol.launch_dependents`), and
                waits itself (`griddepcontrol.wait`) for what that one writes. Kept in a CUDA graph.
        """
        from cuda.bindings import driver

        values = tuple(value.data_ptr() if isinstance(value, Tensor) else value for value in arguments)
        types = tuple(_ctype(value) for value in arguments)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        with torch.cuda.device(self._device):
            if ahead:
                config = _config(grid, threads, shared_bytes)
                config.hStream = stream
                _checked(driver.cuLaunchKernelEx(config, self._function, (values, types), 0))
                return
            _checked(
                driver.cuLaunchKernel(self._function, *grid, threads, 1, 1, shared_bytes, stream, (values, types), 0)
            )


def _config(grid: tuple[int, int, int], threads: int, shared_bytes: int) -> Any:
    """Of a launch ahead of time; the stream is still to be set."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.attrs, config.numAttrs = [attribute], 1
    return config


def tensor_map(x: Tensor, box: tuple[int, ...]) -> Any:
    """A kernel argument that tells the copy engine (TMA) how to copy boxes of a tensor to shared memory.

    Args:
        x: of two to five dimensions, float16 or bfloat16, of which the last lies side by side; the caller keeps it
            alive, as with a pointer.
        box: lengths of a copy in these (at most 256 each), 64 in the last. Its rows of 128 bytes are swizzled as wgmma
            expects; what lies outside of x becomes zero.
    """
    # Where there is one of something its stride is any number, of which the copy engine wants a multiple of 16 bytes.
    strides = tuple(stride if length > 1 else 8 for length, stride in zip(x.shape, x.stride(), strict=True))
    return _tensor_map(x.data_ptr(), x.shape, strides, box, x.dtype == torch.bfloat16)


@functools.lru_cache(maxsize=4096)
def _tensor_map(
    pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], bfloat: bool
) -> Any:
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if bfloat else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    return _checked(
        driver.cuTensorMapEncodeTiled(
            kind,
            len(shape),
            pointer,
            [driver.cuuint64_t(length) for length in reversed(shape)],
            [driver.cuuint64_t(2 * stride) for stride in reversed(strides[:-1])],
            [driver.cuuint32_t(length) for length in reversed(box)],
            [driver.cuuint32_t(1)] * len(shape),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _ctype(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p
    types = {int: ctypes.c_int, float: ctypes.c_float}
    return types.get(type(value))  # None: a tensor map knows its bytes


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if values else None
