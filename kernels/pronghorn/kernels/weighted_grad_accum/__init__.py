"""Adds weighted gradients to one or two buffers, in place, and gives their squared norm, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pronghorn.kernels._arguments import check_shape, check_tensor
from pronghorn.kernels._dispatch import use_triton
from pronghorn.kernels._library import PLAIN
from pronghorn.kernels.weighted_grad_accum import reference

__all__ = ["weighted_grad_accum"]

# Dtypes of gradients, and of the buffers that they are added to.
BUFFERS = {
    **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float32), torch.float64: torch.float64
}  # fmt: skip


def weighted_grad_accum(
    gradients: Sequence[Tensor],
    accum: Sequence[Tensor],
    score: Sequence[Tensor] | None,
    weights: Tensor,
) -> Tensor:
    """accum += weights[0] * gradient and score += weights[1] * gradient, of all tensors at once, in place.

    The sum of squares is in float64 and in the same order at every call. Nothing is waited for, and
    nothing is differentiable. Tensors of one dtype take one launch, however many they are, and one copy of their
    addresses to the device, none where those are the ones of a call not long ago. A buffer must not overlap with
    another tensor.

    Args:
        gradients: in fp32, bf16 or fp16 (fp64 in the reference), all on one device. What is not contiguous is copied
            first.
        accum: for each gradient a buffer of its shape, contiguous, in float32 (float64 for a gradient of that).
        score: the same, or None to leave it out.
        weights: float32 or float64 [2], on their device, so that they may be what is computed there; the second is not
            looked at without `score`.

    Returns:
        The sum of squares of all gradients, without weights, float64 [], on their device; where one is infinite or
        NaN, so is this.

    Raises:
        ValueError, TypeError: an argument has the wrong length, shape, dtype, device or value.
    """
    for name, tensors in (("gradients", gradients), ("accum", accum), ("score", () if score is None else score)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(f"{name}: got {type(tensors).__name__}, wanted a sequence of tensors")
    gradients, accum, scores = list(gradients), list(accum), list(score or ())
    for name, buffers in (("accum", accum), ("score", scores)):
        if len(buffers) != len(gradients) and (name == "accum" or score is not None):
            raise ValueError(f"{name}: got {len(buffers)} tensors, wanted {len(gradients)}, one for each gradient")
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    if not _all_fit(gradients, accum, scores):
        for name, buffers in (("accum", accum), ("score", scores)):
            _refuse(name, gradients, buffers)
    check_tensor("weights", weights, like=gradients[0])
    check_shape("weights", weights, (2,))
    if weights.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weights: got {weights.dtype}, accepted are torch.float32, torch.float64")
    # The dispatcher takes as long for many tensors as the kernel does.
    seen = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(gradients[0]) not in PLAIN
    run = _operation if seen else _accumulate
    result: Tensor = run(gradients, accum, scores, weights)
    return result


def _all_fit(gradients: list[Tensor], accum: list[Tensor], scores: list[Tensor]) -> bool:
    """Whether nothing is wrong with any of them; list by list, for there are many."""
    buffers = [*accum, *scores]
    shapes, dtypes = [buffer.shape for buffer in accum], [buffer.dtype for buffer in accum]
    return (
        {type(tensor) for tensor in (*gradients, *buffers)} <= {*PLAIN}
        and {gradient.layout for gradient in gradients} == {torch.strided}
        and {tensor.device for tensor in (*gradients, *buffers)} == {gradients[0].device}
        and {(gradient.dtype, dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)} <= {*BUFFERS.items()}
        and [gradient.shape for gradient in gradients] == shapes
        and (not scores or [buffer.shape for buffer in scores] == shapes)
        and (not scores or [buffer.dtype for buffer in scores] == dtypes)
        and all(buffer.is_contiguous() for buffer in buffers)
    )


def _refuse(name: str, gradients: list[Tensor], buffers: list[Tensor]) -> None:
    """The error that says what is wrong, if anything is."""
    for index, (gradient, buffer) in enumerate(zip(gradients, buffers, strict=False)):  # there may be no scores
        check_tensor(f"gradients[{index}]", gradient, like=gradients[0])
        if gradient.dtype not in BUFFERS:
            raise TypeError(f"gradients[{index}]: got {gradient.dtype}, accepted are {', '.join(map(str, BUFFERS))}")
        check_tensor(f"{name}[{index}]", buffer, like=gradient)
        check_shape(f"{name}[{index}]", buffer, tuple(gradient.shape))
        if buffer.dtype != BUFFERS[gradient.dtype]:
            raise TypeError(
                f"{name}[{index}]: got {buffer.dtype}, wanted {BUFFERS[gradient.dtype]} for a gradient in "
                f"{gradient.dtype}"
            )
        if not buffer.is_contiguous():
            raise ValueError(f"{name}[{index}]: got strides {buffer.stride()}, wanted a contiguous tensor")


def _accumulate(gradients: list[Tensor], accum: list[Tensor], score: list[Tensor], weights: Tensor) -> Tensor:
    exact = any(gradient.dtype == torch.float64 for gradient in gradients)
    if use_triton("weighted_grad_accum", gradients[0]) and not exact:
        from pronghorn.kernels.weighted_grad_accum import triton

        return triton.weighted_grad_accum(gradients, accum, score, weights)
    with torch.no_grad():
        return reference.weighted_grad_accum(gradients, accum, score, weights)


_operation = torch.library.custom_op("pronghorn::weighted_grad_accum", _accumulate, mutates_args=("accum", "score"))


@_operation.register_fake
def _(gradients: list[Tensor], *_: object) -> Tensor:
    return gradients[0].new_empty((), dtype=torch.float64)
