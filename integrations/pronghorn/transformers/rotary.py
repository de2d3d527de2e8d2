"""Rotary position embeddings of a model, whatever function computes them, as one kernel instead of ten."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.kernels.rotary_embedding import rotary_embedding

PROBE = (2, 3, 5, 8)  # batch, heads, tokens, head size of the rows that a function is tried with


def find_rotary(model: nn.Module) -> dict[str, Callable[..., Any]]:
    """Names of modules whose `forward` calls a function that turns queries and keys, each with a new `forward`.

    The function is one of those that `forward` knows by name; it is known by what it computes for random rows:
    `fn(query, key, cos, sin)` is x cos + rotate_half(x) sin. The new `forward` is the module's own, with that function
    exchanged: nothing outside of this model changes. Where gradients are recorded, it calls the old function.

    Source: Su et al. (arXiv 2104.09864), as in GPT-NeoX.
    """
    found: dict[str, Callable[..., Any]] = {}
    for name, module in model.named_modules():
        forward = type(module).forward
        if "forward" in vars(module) or not isinstance(forward, FunctionType):
            continue
        known = {key: forward.__globals__.get(key) for key in forward.__code__.co_names}
        turning = {key: value for key, value in known.items() if isinstance(value, FunctionType) and _turns(value)}
        if turning:
            exchanged = {key: _fused(value) for key, value in turning.items()}
            found[name] = MethodType(_with_globals(forward, exchanged), module)
    return found


@functools.cache
def _turns(function: FunctionType) -> bool:
    names = [parameter.name for parameter in inspect.signature(function).parameters.values()]
    if names[:4] != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator().manual_seed(0)
    batch, _, tokens, size = PROBE
    query = torch.randn(PROBE, generator=generator)
    key = torch.randn(batch, 1, tokens, size, generator=generator)
    angles = torch.randn(batch, tokens, size, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    try:
        theirs = function(query, key, cos, sin)
        ours = rotary_embedding(query, key, cos, sin)
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(theirs, ours, strict=True))
    except (TypeError, ValueError, RuntimeError):  # it takes or gives something else
        return False


def _fused(function: FunctionType) -> Callable[..., Any]:
    @functools.wraps(function)
    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *arguments: Any, **options: Any) -> Any:
        plain = not arguments and not options and q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
        if plain and not torch.is_grad_enabled() and q.dtype == k.dtype:
            return rotary_embedding(q, k, cos, sin)
        return function(q, k, cos, sin, *arguments, **options)

    return turned


def _with_globals(function: FunctionType, exchanged: dict[str, Any]) -> FunctionType:
    copied = FunctionType(
        function.__code__, {**function.__globals__, **exchanged}, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    copied.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copied, function)
    return copied
