"""What a launcher compiled it launches directly, as Triton would; profilers see every launch."""

import inspect

import pytest
import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from pronghorn.kernels import _launch


class Kernel:
    """Stands for a kernel: notes how it was launched."""

    def __init__(self):
        self.launched = []
        self.function, self.packed_metadata = "function", "metadata"

    def __getitem__(self, grid):
        def launch(*given, **options):
            self.launched.append(("compiled", grid, given, options))
            return self

        return launch

    def run(self, *given):
        self.launched.append(("direct", given))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_launch, "interpreting", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: "stream", raising=False)
    return Kernel()


def test_the_second_launch_is_direct(kernel):
    launcher, x = _launch.Launcher(kernel), torch.zeros(64)
    for numbers in ((5,), (6,), (1 << 40,), (7,)):
        launcher((1, 2, 3), (x,), numbers, ("constant",), num_warps=4)
    compiled, direct, wide, again = kernel.launched
    assert compiled == ("compiled", (1, 2, 3), (x, 5, "constant"), {"num_warps": 4})
    assert direct == ("direct", (1, 2, 3, "stream", "function", "metadata", None, None, None, x, 6, "constant"))
    assert wide[0] == "compiled"  # for numbers of 64 bits it compiles anew
    assert again[0] == "direct"
    launcher((1, 2, 3), (x[1:],), (5,), ("constant",), num_warps=4)
    assert kernel.launched[-1][0] == "compiled"  # what is not aligned was not compiled for


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_see_launches(hook, kernel, monkeypatch):
    launcher, x = _launch.Launcher(kernel), torch.zeros(64)
    launcher((1, 1, 1), (x,), (), ())

    def seen(metadata):
        raise AssertionError

    with monkeypatch.context() as patched:
        getattr(knobs.runtime, hook).add(seen)
        launcher((1, 1, 1), (x,), (), ())
        getattr(knobs.runtime, hook).remove(seen)
        for value, wanted in ((seen, "compiled"), (None, "direct")):
            patched.setattr(knobs.runtime, hook, value)
            launcher((1, 1, 1), (x,), (), ())
            assert kernel.launched[-1][0] == wanted
    assert [how for how, *_ in kernel.launched] == ["compiled", "compiled", "compiled", "direct"]


def test_triton_launches_as_we_do():
    """The order of arguments is no promise of Triton's: its own two launches are looked at."""
    hooks = ",".join(f"knobs.runtime.launch_{when}_hook" for when in ("enter", "exit"))
    order = "stream,{0}.function,{0}.packed_metadata,launch_metadata," + hooks + ",*"
    for function, name in ((JITFunction.run, "kernel"), (CompiledKernel.__getitem__, "self")):
        assert order.format(name) in "".join(inspect.getsource(function).split())
