import pytest
import torch


@pytest.fixture(autouse=True)
def dots_as_a_gpu_takes_them(monkeypatch):
    """The interpreter multiplies tiles of any size; on a GPU a kernel with smaller ones does not compile."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def checked(self, a, b, *arguments):
        assert a.data.shape[-1] >= 16, f"tl.dot of {a.data.shape} and {b.data.shape} sums over less than 16"
        return multiply(self, a, b, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", checked)
