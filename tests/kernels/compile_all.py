"""Compiles an operation's Triton kernels for a GPU that is not there: every kernel that its examples would launch.

A program, for Triton reads when it is imported whether kernels are interpreted: `compile_all.py OPERATION CAPABILITY
KIB`, the last of shared memory that a block may have. It prints, as JSON, how many kinds of each kernel were compiled,
and the most bytes of shared memory that one of them wants. What kernels would have written are zeros.
"""

import json
import os
import sys
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)
os.environ["PRONGHORN_KERNELS"] = "triton"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pronghorn.kernels import _dispatch, _triton
from pronghorn.kernels._operation import operations


class Absent:
    """A GPU as far as the compiler asks for it."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_instead_of_launching(capability, room, found):
    """Triton's launches, and the kernels that they note."""

    def get(kernel, grid):
        def launch(*arguments, **options):
            compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
            found.setdefault(kernel.fn.__name__, {})[compiled.hash] = compiled.metadata.shared
            return SimpleNamespace(run=lambda *_: None, function=0, packed_metadata=None)

        return launch

    triton.runtime.driver.set_active(Absent(capability))
    JITFunction.__getitem__ = get
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # which a build for CPUs has not
    _dispatch._obstacle = lambda *_, **__: ""
    _triton.shared_memory = lambda device: room * 1024
    empty, torch.empty_like, torch.Tensor.new_empty = torch.empty, torch.zeros_like, torch.Tensor.new_zeros
    torch.empty = lambda *sizes, **how: empty(*sizes, **how).zero_()


def main(name, capability, room):
    found = {}
    compile_instead_of_launching(int(capability), int(room), found)
    (operation,) = (one for one in operations() if one.name == name)
    for index, knobs in enumerate(operation.shapes):
        for dtype in (torch.bfloat16, torch.float32)[: 2 if index == 0 else 1]:
            arguments = operation.example(knobs, dtype, torch.Generator().manual_seed(0), torch.device("cpu"))
            operation.function(**arguments)
            trained = [arguments[key] for key in operation.trains if arguments.get(key) is not None]
            for tensor in trained:
                tensor.requires_grad_()
            if trained:
                result = operation.function(**arguments)
                (result if isinstance(result, torch.Tensor) else next(iter(result))).float().sum().backward()
    sys.stdout.write(json.dumps({kernel: (len(kinds), max(kinds.values())) for kernel, kinds in found.items()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
